"""What no mask can change of an input: everything before the first adapter, computed once and remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from dsa_gym.backbone import ReachedError, standing_in
from dsa_gym.domains import Examples, take
from dsa_gym.model import AdaptedModel


class FrozenStates:
    """Losses of an :class:`AdaptedModel` that never recompute what a mask cannot change.

    The outputs of the blocks below the first site, and of the site's own module before its adapter, depend on the input
    alone. They are remembered for each input, up to a number of bytes, and stand in for these modules from then on.
    With adapters in all blocks that is the first attention; with adapters in the upper half, half of the blocks.

    A module that a loss calls more than once, or that returns more than one tensor, is computed anew every time.

    Attributes:
        model: The adapted model.
        slots: Inputs that can be remembered; 0 until the first are, and where nothing can be.
    """

    def __init__(self, model: AdaptedModel, inputs: int, limit: int) -> None:
        """Remember nothing yet.

        Args:
            model: The adapted model.
            inputs: Number of inputs that there are.
            limit: Bytes at most.
        """
        self.model, self.slots = model, 0
        self._inputs, self._limit, self._looked = inputs, limit, False
        first, root = model.shape.sites[0], model.backbone.model
        paths = (*model.backbone.blocks[: first.layer], first.module)
        self._modules: list[Any] = [root.get_submodule(path) for path in paths]
        self._states: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._tails: list[tuple[None, ...] | None] = []
        self._slot = torch.full((inputs,), -1)
        self._owner = torch.empty(0, dtype=torch.int64)
        self._next = 0

    @torch.inference_mode()
    def losses(
        self, inputs: Tensor, examples: Examples, phi: Tensor, mask: Tensor | None, users: Tensor | None
    ) -> Tensor:
        """Losses (rows,) of inputs, int64 (rows,); the other arguments are those of :meth:`AdaptedModel.losses`."""
        if not self._looked:
            self._look(take(examples, torch.zeros(1, dtype=torch.int64)))
        missing = inputs[self._slot[inputs] < 0].unique()
        if not self.slots or len(inputs.unique()) > self.slots:
            return self.model.losses(examples, phi, mask, users=users)
        if len(missing):
            rows = (inputs[None] == missing[:, None]).int().argmax(1)  # where each is first
            self._remember(missing, inputs, self._compute(take(examples, rows)))
        known = self._slot[inputs]
        stubs = [
            _constant(states.index_select(0, known.to(states.device)).view(-1, *shape[1:]), tail)
            for states, shape, tail in zip(self._states, self._shapes, self._tails, strict=True)
        ]
        with standing_in(self._modules, stubs):
            return self.model.losses(examples, phi, mask, users=users)

    def _look(self, example: Examples) -> None:
        """Find out on one row which modules are called once and return one tensor, and how large it is."""
        self._looked = True
        calls: dict[int, list[Any]] = {index: [] for index in range(len(self._modules))}
        with self._hooks(lambda index, output: calls[index].append(output)), self.model.backbone.adapted(None) as model:
            self.model.domain.losses(model, example)
        fit = [index for index, outputs in calls.items() if len(outputs) == 1 and _is_single(outputs[0])]
        self._modules = [self._modules[index] for index in fit]
        outputs = [calls[index][0] for index in fit]
        self._tails = [output[1:] if isinstance(output, tuple) else None for output in outputs]
        tensors = [output[0] if isinstance(output, tuple) else output for output in outputs]
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size:
            self.slots = min(self._inputs, self._limit // size)
            self._states = [tensor.new_empty(self.slots, tensor.numel()) for tensor in tensors]
            self._owner = torch.full((self.slots,), -1)

    def _compute(self, examples: Examples) -> list[Tensor]:
        """Outputs of the modules for some examples, each flat (rows, numbers); nothing beyond the last is run."""
        seen: dict[int, Tensor] = {}

        def note(index: int, output: Any) -> None:
            seen[index] = output[0] if isinstance(output, tuple) else output
            if len(seen) == len(self._modules):
                raise ReachedError

        with self._hooks(note), self.model.backbone.adapted(None) as model, suppress(ReachedError):
            self.model.domain.losses(model, examples)
        return [seen[i].reshape(-1, states.shape[1]) for i, states in enumerate(self._states)]

    def _remember(self, new: Tensor, wanted: Tensor, outputs: list[Tensor]) -> None:
        """Put new inputs into the oldest slots whose inputs are not wanted now."""
        busy = torch.zeros(self.slots, dtype=torch.bool)
        held = self._slot[wanted]
        busy[held[held >= 0]] = True
        order = (torch.arange(self.slots) + self._next) % self.slots
        chosen = order[~busy[order]][: len(new)]
        self._next = (int(chosen[-1]) + 1) % self.slots
        evicted = self._owner[chosen]
        self._slot[evicted[evicted >= 0]] = -1
        self._owner[chosen], self._slot[new] = new, chosen
        for states, output in zip(self._states, outputs, strict=True):
            states[chosen.to(states.device)] = output

    @contextmanager
    def _hooks(self, note: Callable[[int, Any], None]) -> Iterator[None]:
        """Call ``note(index, output)`` after each module."""
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output, index=index: note(index, output))
            for index, module in enumerate(self._modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_single(output: Any) -> bool:
    """Whether a module returned one tensor, alone or at the head of a tuple of nothing else."""
    if isinstance(output, tuple):
        return isinstance(output[0], Tensor) and all(rest is None for rest in output[1:])
    return isinstance(output, Tensor)


def _constant(output: Tensor, tail: tuple[None, ...] | None) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output if tail is None else (output, *tail)
