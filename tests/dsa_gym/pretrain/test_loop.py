"""The loop of all pre-trainings: the best weights are kept, also by a run that was interrupted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsa_gym.pretrain.loop import Schedule, claim, fit


def run(path: Path, steps: int = 12, stop: int | None = None, validate: bool = True) -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(0)
    model, seen, calls = nn.Linear(3, 1), [], 0

    def loss(generator: np.random.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        inputs = torch.from_numpy(generator.normal(size=(8, 3))).float()
        return (torch.nn.functional.dropout(model(inputs), 0.2) - inputs.sum(1, keepdim=True)).square().mean()

    def measure() -> float:
        # best in the middle: at the third of six measurements
        seen.append(float(model.weight.detach().sum()))
        return abs(len(seen) - 3) if stop is None else 0.0

    schedule = Schedule(steps=steps, learning_rate=0.1)
    fit(model, loss, schedule, path, checkpoint_every=2, validate=measure if validate else None)
    return model, seen


def test_best_weights_are_kept(tmp_path: Path) -> None:
    model, seen = run(tmp_path / "state.safetensors")
    assert len(seen) == 6 and len(set(seen)) == 6
    assert float(model.weight.detach().sum()) == pytest.approx(seen[2])


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole.safetensors", validate=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "state.safetensors", stop=6, validate=False)
    resumed, _ = run(tmp_path / "state.safetensors", validate=False)
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)


def test_folder_of_another_run(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 0})
    claim(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="holds a run with another configuration or data"):
        claim(tmp_path, {"seed": 1})


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("batch_size", -1), ("learning_rate", float("nan"))])
def test_bad_schedule(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        Schedule(**{field: value}).check_schedule()  # type: ignore[arg-type]
