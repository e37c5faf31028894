"""The loop of all pre-trainings: the best weights are kept, and a run that was interrupted is the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dsa_gym import storage
from dsa_gym.pretrain.loop import Schedule, claim, fit

STEPS, EVERY = 12, 2


def run(
    path: Path,
    *,
    stop: int | None = None,
    measure: Callable[[nn.Linear], float] | None = None,
    seed: int = 0,
    spoil: float = 1.0,
) -> nn.Linear:
    """Fit a line under dropout; the loss of step ``stop`` raises, or is multiplied by ``spoil``."""
    torch.manual_seed(seed)
    model, calls = nn.Linear(3, 1), 0

    def loss(generator: np.random.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop and spoil == 1:
            raise KeyboardInterrupt
        inputs = torch.from_numpy(generator.normal(size=(8, 3))).float()
        error = nn.functional.dropout(model(inputs), 0.2) - inputs.sum(1, keepdim=True)
        return error.square().mean() * (spoil if calls == stop else 1)

    validate = (lambda: measure(model)) if measure else None
    schedule = Schedule(steps=STEPS, learning_rate=0.1)
    fit(model, loss, schedule, path, checkpoint_every=EVERY, validate=validate)
    return model


@pytest.fixture(scope="module")
def path_of_weights(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    """The weights at each measurement of an unbroken run."""
    weights: list[Tensor] = []

    def measure(model: nn.Linear) -> float:
        weights.append(model.weight.detach().clone())
        return 0.0

    run(tmp_path_factory.mktemp("whole") / "state.safetensors", measure=measure)
    assert len(weights) == STEPS // EVERY
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(weights)
    return weights


@pytest.mark.parametrize("stop", [None, 1, 3, 8, 12])
@pytest.mark.parametrize("best", [0, 2, 5])
def test_the_best_weights_are_kept(tmp_path: Path, path_of_weights: list[Tensor], best: int, stop: int | None) -> None:
    def measure(model: nn.Linear) -> float:
        return float((model.weight.detach() - path_of_weights[best]).abs().sum())

    path = tmp_path / "state.safetensors"
    if stop is not None:
        with pytest.raises(KeyboardInterrupt):
            run(path, stop=stop, measure=measure)
        assert path.exists() == (stop > EVERY)
    assert torch.equal(run(path, measure=measure).weight, path_of_weights[best])


def test_of_equals_the_first_is_kept(tmp_path: Path, path_of_weights: list[Tensor]) -> None:
    assert torch.equal(run(tmp_path / "state.safetensors", measure=lambda _: 1.0).weight, path_of_weights[0])


def test_without_validation_the_last_weights_are_kept(tmp_path: Path, path_of_weights: list[Tensor]) -> None:
    path = tmp_path / "state.safetensors"
    assert torch.equal(run(path).weight, path_of_weights[-1])
    assert not [name for name in storage.read_tensors(path) if name.startswith("best")]


def test_a_resumed_run_owes_nothing_to_its_process(tmp_path: Path, path_of_weights: list[Tensor]) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(path, stop=6)
    assert int(storage.read_tensors(path)["step"]) == 4
    # another initialisation and another state of the global generator
    assert torch.equal(run(path, seed=99).weight, path_of_weights[-1])


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(tmp_path: Path, path_of_weights: list[Tensor]) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(FloatingPointError, match="loss is nan at step 5: lower learning_rate"):
        run(path, stop=6, spoil=float("nan"))
    assert int(storage.read_tensors(path)["step"]) == 4
    assert torch.equal(run(path).weight, path_of_weights[-1])


def test_seconds_of_all_runs_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(path, stop=6)
    storage.write_tensors(path, storage.read_tensors(path) | {"seconds": torch.tensor(1000.0)})
    model = nn.Linear(3, 1)
    schedule = Schedule(steps=STEPS, learning_rate=0.1)
    seconds = fit(model, lambda _: model(torch.ones(1, 3)).sum(), schedule, path, checkpoint_every=EVERY)
    assert 1000 < seconds < 1500


def test_only_matrices_decay(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    schedule = Schedule(steps=1, learning_rate=0.1, weight_decay=0.5)
    fit(model, lambda _: model(torch.ones(1, 2)).sum() * 0, schedule, tmp_path / "state.safetensors")
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)


@given(st.integers(1, 500), st.floats(1e-6, 10))
def test_rate_rises_to_the_peak_and_falls_to_a_twentieth(steps: int, peak: float) -> None:
    rates = [Schedule(steps=steps, learning_rate=peak).rate(step) for step in range(steps)]
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(peak)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= max(1, steps // 20)
    assert min(rates[top:]) >= peak / 20 * (1 - 1e-9)


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="validation loss is nan at step 2: lower learning_rate"):
        fit(
            model,
            lambda _: model(torch.ones(1)).sum(),
            Schedule(steps=4),
            tmp_path / "state.safetensors",
            checkpoint_every=2,
            validate=lambda: math.nan,
        )


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="holds a run with another configuration or data; give a new folder") as error:
        claim(tmp_path, {"seed": 1})
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("learning_rate", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
    ],
)
def test_bad_schedule(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}: expected"):
        Schedule(**{field: value})  # type: ignore[arg-type]


def test_bad_checkpoint_interval(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_every=0: expected a positive number of steps"):
        fit(nn.Linear(1, 1), lambda _: torch.zeros(()), Schedule(), tmp_path / "s", checkpoint_every=0)
