"""The training loop that all backbones share: AdamW on a one-cycle cosine, checkpoints, a killed run continues."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.data import split_users


@dataclass(frozen=True)
class Schedule:
    """How a backbone is optimised.

    Attributes:
        batch_size: Examples per step.
        steps: Optimiser steps.
        learning_rate: Peak of the one-cycle cosine schedule (AdamW).
        weight_decay: Decoupled weight decay of the matrices.
        seed: Seeds initialisation, batches, dropout and what is held out.
    """

    batch_size: int = 64
    steps: int = 4500
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate}: expected a positive number")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay}: expected a number of at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: expected an integer from 0 to 2^32 - 1")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up over the first 5 %, then a cosine to a twentieth of the peak."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class TransformerConfig(Schedule):
    """A transformer and how it is optimised.

    Attributes:
        width: Width of the hidden states, d.
        layers: Transformer blocks.
        heads: Attention heads per block.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        super().__post_init__()
        for name in ("width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: expected a multiple of heads={self.heads}")


@dataclass(frozen=True)
class UsersConfig(TransformerConfig):
    """A transformer that is trained on some users' data, while others are held out altogether.

    Attributes:
        validation: Share of users that choose when to stop.
        test: Share of users that nothing is trained on.
    """

    validation: float = 0.08
    test: float = 0.24

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        super().__post_init__()
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share between 0 and 1")

    def split(self, users: Sequence[str]) -> dict[str, list[str]]:
        """Users of ``train``, ``validation`` and ``test``; the same that a bundle of the same file holds out."""
        return split_users(users, validation=self.validation, test=self.test, seed=self.seed)


def claim(out: Path, key: dict[str, Any]) -> None:
    """Make ``out`` the folder of the run that ``key`` describes (configuration and data).

    Raises:
        ValueError: If it holds another run.
    """
    record = out / "checkpoint" / "run.json"
    if not record.exists():
        storage.write_json(record, key)
    elif storage.read_json(record) != key:
        raise ValueError(f"out={str(out)!r}: holds a run with another configuration or data; give a new folder")


def fit(
    model: nn.Module,
    loss: Callable[[np.random.Generator], Tensor],
    schedule: Schedule,
    state_file: Path,
    *,
    checkpoint_every: int = 250,
    validate: Callable[[], float] | None = None,
) -> float:
    """Train ``model`` in place, from ``state_file`` on if it exists.

    Args:
        model: What is trained; its parameters are what a checkpoint holds.
        loss: Draws a batch with the generator of the step and returns its mean loss, scalar. Generator and torch's
            global one (dropout) depend on seed and step alone, so a resumed run sees what the unbroken one would.
        schedule: Optimisation.
        state_file: The checkpoint, written every ``checkpoint_every`` steps.
        checkpoint_every: Optimiser steps between checkpoints.
        validate: Loss on held-out data; if given, it is measured at every checkpoint and at the end, and the model
            ends with the weights that were best.

    Returns:
        Seconds spent, over all runs.

    Raises:
        ValueError: If ``checkpoint_every`` is not positive.
        FloatingPointError: If the loss is not finite; the last checkpoint stays.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={checkpoint_every}: expected a positive number of steps")
    optimizer = _optimizer(model, schedule)
    state = _State()
    if state_file.exists():
        state = _restore(state_file, model, optimizer)
    began = time.monotonic() - state.seconds
    bar = tqdm(total=schedule.steps, initial=state.step, desc="pretrain", unit="step")
    while state.step < schedule.steps:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(state.step)
        torch.manual_seed(schedule.seed * 1_000_003 + state.step)
        value = loss(np.random.default_rng((schedule.seed, state.step)))
        _finite(float(value.detach()), "pre-training", state.step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        bar.update()
        if state.step % 50 == 0:
            bar.set_postfix(loss=f"{float(value.detach()):.3f}")
        at_end = state.step == schedule.steps
        if validate is not None and (at_end or state.step % checkpoint_every == 0):
            state.keep_best(_finite(validate(), "validation", state.step), model)
        if state.step % checkpoint_every == 0 and not at_end:
            state.seconds = time.monotonic() - began
            _checkpoint(state_file, model, optimizer, state)
    bar.close()
    if state.best is not None:
        _load(model, state.best[1])
    return time.monotonic() - began


def _finite(loss: float, name: str, step: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"{name} loss is {loss} at step {step}: lower learning_rate")
    return loss


@dataclass
class _State:
    """Where a run is."""

    step: int = 0
    seconds: float = 0.0
    best: tuple[float, dict[str, Tensor]] | None = None

    def keep_best(self, loss: float, model: nn.Module) -> None:
        if self.best is None or loss < self.best[0]:
            self.best = (loss, {name: p.detach().clone() for name, p in model.named_parameters()})


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98))


def _checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: _State) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= storage.optimizer_tensors(optimizer)
    tensors |= {"step": torch.tensor(state.step), "seconds": torch.tensor(state.seconds)}
    if state.best is not None:
        tensors["best_loss"] = torch.tensor(state.best[0], dtype=torch.float64)
        tensors |= {f"best.{name}": value for name, value in state.best[1].items()}
    storage.write_tensors(path, tensors)


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> _State:
    tensors = storage.read_tensors(path)
    _load(model, {name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    storage.load_optimizer_tensors(optimizer, tensors)
    state = _State(int(tensors["step"]), float(tensors["seconds"]))
    if "best_loss" in tensors:
        best = {name[5:]: value for name, value in tensors.items() if name.startswith("best.")}
        state.best = (float(tensors["best_loss"]), best)
    return state


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
