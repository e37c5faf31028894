"""Meta-training of the library under its gate: it learns, resumes exactly, and never touches the backbone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsa_gym import storage
from dsa_gym.adaptation import AdaptationConfig, adapt_users
from dsa_gym.domains import take
from dsa_gym.gating import GateConfig
from dsa_gym.library_training import LibraryTraining, LibraryTrainingConfig
from dsa_gym.masks import MaskSpace
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import AdapterShape
from dsa_gym.population import Population

CONFIG = LibraryTrainingConfig(
    inner_lr=0.1,
    steps=6,
    users=4,
    support=2,
    query=3,
    validate_every=2,
    learning_rate=3e-2,
    gate=GateConfig(active=1, hidden=8, dropout=0.1),
)

Make = Callable[..., LibraryTraining]


@pytest.fixture
def make(tiny: AdaptedModel, population: Population, observed: tuple[Tensor, Tensor]) -> Make:
    """Builds trainings that differ in settings; ``dropout`` and ``granularity`` are those of the adapters."""

    def build(granularity: str = "site", dropout: float = 0.0, **settings: Any) -> LibraryTraining:
        shape = AdapterShape(tiny.shape.sites, rank=4, pathways=2, dropout=dropout)
        model = AdaptedModel(tiny.backbone, tiny.domain, shape)
        return LibraryTraining(model, MaskSpace(shape, granularity), population, *observed, replace(CONFIG, **settings))

    return build


def state_of(training: LibraryTraining) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in training._state().items()} | {
        "phi": training.library.phi.detach().clone()
    }


def assert_same(first: LibraryTraining, second: LibraryTraining) -> None:
    one, other = state_of(first), state_of(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.history == second.history


def digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.numpy().tobytes())
    return sha.hexdigest()


def test_query_loss_falls(make: Make, population: Population) -> None:
    training = make(steps=60, validate_every=30)
    rows = torch.cat([population.rows(user, "query") for user in population.members("train")])
    before = float(training.reference_losses(rows).mean())
    queries: list[float] = []
    training.run(on_step=lambda _, measured: queries.append(measured["query"]))
    after = float(training.reference_losses(rows).mean())
    assert after < before - 0.1
    assert sum(queries[-5:]) < sum(queries[:5]) - 0.5
    assert training.library.phi[training.model.shape.half :].any()
    assert [entry["step"] for entry in training.history] == [30, 60]


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "anil", "reptile", "meta-sgd"])
def test_every_algorithm_moves_library_and_gate(make: Make, algorithm: str) -> None:
    training = make(algorithm=algorithm, steps=2, validate_every=1, dropout=0.1)
    before = state_of(training)
    training.run()
    after = state_of(training)
    assert all(torch.isfinite(value).all() for value in after.values())
    # up-projections get no gradient while the down-projections are zero: both have moved after two steps
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"learner.phi.up", "learner.phi.down", "phi"} <= moved
    assert any(name.startswith("gate.") for name in moved)
    assert ("learner.alpha.down" in moved) == (algorithm == "meta-sgd")
    assert torch.equal(after["phi"], torch.cat([after["learner.phi.up"], after["learner.phi.down"]]))


@pytest.mark.parametrize("granularity", ["pathway", "layer", "component", "element"])
def test_every_granularity_trains(make: Make, granularity: str) -> None:
    training = make(granularity=granularity, steps=1, gate=replace(CONFIG.gate, relaxation="binary"))
    training.run()
    assert training.step == 1


def test_backbone_never_changes_by_a_bit(make: Make, tiny: AdaptedModel, population: Population) -> None:
    before = digest(tiny.backbone.model)
    training = make(dropout=0.1)
    training.run()
    users = population.members("train")
    rows = torch.cat([population.rows(user, "support")[:2] for user in users])

    def loss(phi: Tensor, generator: torch.Generator) -> Tensor:
        return training.model.losses(take(population.examples, rows), phi).view(len(users), -1).mean(1)

    delta = adapt_users(training.library.phi.detach(), len(users), loss, AdaptationConfig(share=0.1, steps=3))
    assert delta.any()
    assert digest(tiny.backbone.model) == before
    assert all(p.grad is None for p in tiny.backbone.model.parameters())


def test_same_seed_same_library(make: Make) -> None:
    first, again, other = make(dropout=0.1), make(dropout=0.1), make(dropout=0.1, seed=1)
    for training in (first, again, other):
        training.run()
    assert_same(first, again)
    assert not torch.equal(first.library.phi, other.library.phi)


class Killed(Exception):  # noqa: N818
    """What stops a run in the middle."""


def stop_after(step: int) -> Callable[[int, dict[str, float]], None]:
    def stop(now: int, _measured: dict[str, float]) -> None:
        if now == step:
            raise Killed

    return stop


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resumed_run_equals_the_unbroken_one(make: Make, tmp_path: Path, step: int) -> None:
    """Also when it stopped between two checkpoints, or before the first."""
    path = tmp_path / "training.safetensors"
    whole = make(dropout=0.1)
    whole.run()
    with pytest.raises(Killed):
        make(dropout=0.1).run(path, stop_after(step))
    assert path.exists() == (step >= 2)
    resumed = make(dropout=0.1)
    resumed.run(path)
    assert_same(whole, resumed)
    # a finished run is not trained again
    finished = make(dropout=0.1)
    steps: list[int] = []
    finished.run(path, lambda now, _: steps.append(now))
    assert not steps
    assert_same(whole, finished)


def test_meta_sgd_resumes_with_its_rates(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    whole, resumed = make(algorithm="meta-sgd"), make(algorithm="meta-sgd")
    whole.run()
    with pytest.raises(Killed):
        make(algorithm="meta-sgd").run(path, stop_after(3))
    resumed.run(path)
    assert_same(whole, resumed)


def test_checkpoint_of_another_configuration(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    make(steps=2).run(path)
    before = path.read_bytes()
    for settings in ({"steps": 3}, {"steps": 2, "gate": replace(CONFIG.gate, hidden=9)}):
        with pytest.raises(ValueError, match=r"training\.safetensors: checkpoint of another configuration"):
            make(**settings).run(path)
    storage.write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="checkpoint of another configuration"):
        make(steps=2).run(path)
    path.write_bytes(before[:100])
    with pytest.raises(ValueError, match="cannot read"):
        make(steps=2).run(path)


def test_best_state_is_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation decides which state is kept, not the last step."""
    training = make(steps=6)
    losses = iter([3.0, 1.0, 2.0])
    states: list[dict[str, Tensor]] = []

    def validation(_rows: Tensor, **_: object) -> Tensor:
        states.append({name: value.clone() for name, value in training._state().items()})
        return torch.tensor([next(losses)])

    monkeypatch.setattr(training, "reference_losses", validation)
    training.run()
    assert [entry["validation"] for entry in training.history] == [3.0, 1.0, 2.0]
    assert all(torch.equal(value, states[1][name]) for name, value in training._state().items())


def test_batches_take_support_and_query_of_train_users(make: Make, population: Population) -> None:
    training = make()
    chosen, support, query = training._batch()
    assert len(chosen) == 4
    for rows, part, size in ((support, 0, 2), (query, 1, 3)):
        assert (population.part[rows] == part).all()
        users = population.user[rows].view(4, size)
        assert (users == users[:, :1]).all()
        assert users[:, 0].tolist() == [training.members[i] for i in chosen]
    assert all(population.groups[user] == "train" for user in training.members)


def test_validation_that_is_not_finite(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make(steps=1)
    monkeypatch.setattr(training, "reference_losses", lambda *_, **__: torch.tensor([float("nan")]))
    with pytest.raises(FloatingPointError, match="validation loss is nan after 1 meta-steps: lower learning_rate"):
        training.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"users": 0}, "users=0"),
        ({"validate_every": 0}, "validate_every=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"gate_learning_rate": float("nan")}, "gate_learning_rate=nan"),
        ({"algorithm": "protonet"}, "algorithm must be one of"),
        ({"inner_lr": -1.0}, "inner_lr must be"),
        ({"inner_steps": -1}, "inner_steps must be"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LibraryTrainingConfig(**settings)
