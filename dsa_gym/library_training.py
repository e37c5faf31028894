"""Meta-training of the pathway library *under* its gate.

    min over phi, psi of the mean over users u of L_query(phi_u' * g(x, u; psi)),
    phi_u' = phi - alpha grad L_support(phi * g)

The library and the relaxed gate are trained together. A library trained with everything on leaves a gate nothing to
decide (docs/design.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.domains import take
from dsa_gym.gating import GateConfig, GatingNetwork
from dsa_gym.masks import MaskSpace
from dsa_gym.meta import MetaConfig, MetaLearner
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import PathwayLibrary
from dsa_gym.population import PARTS, Population

Algorithm = Literal["maml", "fomaml", "anil", "reptile", "meta-sgd"]


@dataclass(frozen=True)
class LibraryTrainingConfig:
    """How library and gate are trained.

    Attributes:
        algorithm: See :mod:`dsa_gym.meta`. ``anil`` adapts the down-projections only.
        inner_steps: Inner gradient steps on support.
        inner_lr: alpha, the inner learning rate.
        steps: Meta-steps.
        users: Users per batch.
        support: Support examples per user and step.
        query: Query examples per user and step.
        learning_rate: AdamW's peak step size for the library, on a cosine to a tenth.
        gate_learning_rate: The same for the gate.
        weight_decay: Decoupled weight decay of both.
        validate_every: Meta-steps between measurements on the validation users; the best state is kept.
        gate: The gating network.
        seed: Seeds initialisation, batches, noise and dropout.
    """

    algorithm: Algorithm = "maml"
    inner_steps: int = 1
    inner_lr: float = 0.3
    steps: int = 800
    users: int = 16
    support: int = 4
    query: int = 8
    learning_rate: float = 3e-3
    gate_learning_rate: float = 2e-3
    weight_decay: float = 0.01
    validate_every: int = 100
    gate: GateConfig = field(default_factory=GateConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        for name in ("steps", "users", "support", "query", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        for name in ("learning_rate", "gate_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        self.meta  # noqa: B018  (checks the inner loop's values)

    @property
    def meta(self) -> MetaConfig:
        """The inner loop for :class:`MetaLearner`."""
        adapted = ("down",) if self.algorithm == "anil" else None
        return MetaConfig(self.algorithm, self.inner_steps, self.inner_lr, adapted)


class LibraryTraining:
    """Trains a :class:`PathwayLibrary` and its :class:`GatingNetwork` on the train users of a population."""

    def __init__(
        self,
        model: AdaptedModel,
        space: MaskSpace,
        population: Population,
        user_embedding: Tensor,
        context: Tensor,
        config: LibraryTrainingConfig,
    ) -> None:
        """Set up library, gate and optimiser.

        Args:
            model: Backbone, domain and adapter geometry.
            space: Granularity that the library is trained at.
            population: Users and examples.
            user_embedding: Observations of all users (users, user_dim).
            context: Observations of all examples (N, context_dim).
            config: Settings.
        """
        self.model, self.space, self.population, self.config = model, space, population, config
        self.user_embedding, self.context = user_embedding, context
        generator = torch.Generator().manual_seed(config.seed)
        self.library = PathwayLibrary(model.shape, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.gate = GatingNetwork(
                user_embedding.shape[1], context.shape[1], space.gates, model.shape.pathways, config.gate
            )
        half = model.shape.half
        phi = self.library.phi.detach()
        self.learner = MetaLearner({"up": phi[:half], "down": phi[half:]}, config.meta)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.learner.parameters()), "lr": config.learning_rate},
                {"params": list(self.gate.parameters()), "lr": config.gate_learning_rate},
            ],
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),
        )
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.members = population.members("train")
        rows = [[population.rows(user, part) for part in PARTS[:2]] for user in self.members]
        self._support = [support for support, _ in rows]
        self._query = [query for _, query in rows]
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def run(
        self, checkpoint: Path | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None
    ) -> None:
        """Train to the end, from ``checkpoint`` on if it exists, and load the best state into library and gate."""
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        bar = tqdm(total=self.config.steps, initial=self.step, desc="meta-train", unit="step")
        while self.step < self.config.steps:
            measured = self._step()
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in measured.items()})
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                measured["validation"] = self._validate()
                self.history.append({"step": float(self.step), **measured})
                if checkpoint is not None:
                    self._save(checkpoint)
            if on_step is not None:
                on_step(self.step, measured)
        bar.close()
        assert self.best is not None
        self._load_state(self.best[1])
        with torch.no_grad():
            self.library.phi.copy_(self._phi_meta())

    def _phi_meta(self) -> Tensor:
        parameters = self.learner.meta_parameters
        return torch.cat([parameters["up"], parameters["down"]]).detach()

    def _batch(self) -> tuple[list[int], Tensor, Tensor]:
        """Users, support rows and query rows of a step; they depend on seed and step alone."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout and Gumbel noise
        count = min(self.config.users, len(self.members))
        chosen = torch.randperm(len(self.members), generator=generator)[:count].tolist()

        def draw(rows: list[Tensor], size: int) -> Tensor:
            return torch.cat([rows[i][torch.randint(len(rows[i]), (size,), generator=generator)] for i in chosen])

        return chosen, draw(self._support, self.config.support), draw(self._query, self.config.query)

    def _loss(self, params: dict[str, Tensor], batch: tuple[Tensor, float]) -> Tensor:
        """Loss of each user under the relaxed gate plus the load balance of the batch, (users,)."""
        rows, temperature = batch
        phi = torch.cat([params["up"], params["down"]], dim=1)
        users = phi.shape[0]
        logits = self.gate(self.user_embedding[self.population.user[rows]], self.context[rows])
        gates = self.gate.sample(logits, temperature)
        losses = self.model.losses(take(self.population.examples, rows), phi, self.space.expand(gates), training=True)
        balance = self.gate.config.balance * self.gate.load_balance(logits, gates)
        return losses.view(users, -1).mean(1) + balance

    def _step(self) -> dict[str, float]:
        chosen, support, query = self._batch()
        progress = self.step / self.config.steps
        warm = min(1.0, (self.step + 1) / 50)
        factor = warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        temperature = self.gate.config.temperature_at(progress)
        self.gate.train()
        self.optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            result = self.learner.meta_step(
                self._loss, (support, temperature), (query, temperature), len(chosen), measure_support=False
            )
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(self.gate.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {"query": float(result.query_loss.mean())}

    @torch.inference_mode()
    def reference_losses(self, rows: Tensor, *, batch_size: int = 256) -> Tensor:
        """Loss (rows,) of phi_meta under the gate's deterministic decisions."""
        self.gate.eval()
        pieces = []
        phi = self._phi_meta()[None]
        for part in rows.split(batch_size):
            logits = self.gate(self.user_embedding[self.population.user[part]], self.context[part])
            mask = self.space.expand(self.gate.decide(logits))
            pieces.append(self.model.losses(take(self.population.examples, part), phi, mask))
        return torch.cat(pieces)

    def _validate(self) -> float:
        """Mean loss on the validation users; keeps the best state."""
        rows = torch.cat([self.population.rows(user, "unseen") for user in self.population.members("validation")])
        loss = float(self.reference_losses(rows[:: max(1, len(rows) // 512)]).mean())
        if not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss} after {self.step} meta-steps: lower learning_rate")
        if self.best is None or loss < self.best[0]:
            self.best = (loss, {name: value.clone() for name, value in self._state().items()})
        return loss

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        return tensors | {f"gate.{name}": value for name, value in self.gate.state_dict().items()}

    def _load_state(self, tensors: dict[str, Tensor]) -> None:
        for prefix, module in (("learner.", self.learner), ("gate.", self.gate)):
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})

    def _save(self, path: Path) -> None:
        tensors = {f"now.{name}": value for name, value in self._state().items()}
        assert self.best is not None
        tensors |= {f"best.{name}": value for name, value in self.best[1].items()}
        tensors |= storage.optimizer_tensors(self.optimizer)
        record: dict[str, Any] = {"step": self.step, "best": self.best[0], "history": self.history}
        storage.write_tensors(path, tensors, {"record": json.dumps(record), "config": self._fingerprint()})

    def _fingerprint(self) -> str:
        return json.dumps(asdict(self.config))

    def _restore(self, path: Path) -> None:
        metadata = storage.read_metadata(path)
        if metadata.get("config") != self._fingerprint():
            raise ValueError(f"{path}: checkpoint of another configuration; give a new folder or the old configuration")
        tensors, record = storage.read_tensors(path), json.loads(metadata["record"])
        self.step, self.history = record["step"], record["history"]
        self._load_state({k[4:]: v for k, v in tensors.items() if k.startswith("now.")})
        self.best = (record["best"], {k[5:]: v for k, v in tensors.items() if k.startswith("best.")})
        storage.load_optimizer_tensors(self.optimizer, tensors)
