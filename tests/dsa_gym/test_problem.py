"""The gating problem: losses, rewards, gradients, and what belongs to which split."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym.bundle import Bundle
from dsa_gym.domains import take
from dsa_gym.domains.text import TextDomain
from dsa_gym.masks import GRANULARITIES, MaskSpace
from dsa_gym.model import all_gates
from dsa_gym.population import SPLITS
from dsa_gym.problem import GatingProblem, mask_codes

Make = Callable[..., GatingProblem]


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder)


@pytest.fixture(scope="module")
def make(bundle: Bundle) -> Make:
    """Problems of the small bundle that share one loaded model."""
    model = bundle.model()

    def build(split: str = "test", **arguments: Any) -> GatingProblem:
        problem = GatingProblem(bundle, split, device="cpu", **arguments)
        problem.__dict__["model"] = model
        return problem

    return build


def some(problem: GatingProblem, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and masks, not in order and with repetitions."""
    generator = np.random.default_rng(seed)
    inputs = generator.integers(len(problem), size=rows)
    return inputs, (generator.random((rows, problem.gates)) < 0.5).astype(np.uint8)


def one_by_one(problem: GatingProblem, inputs: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """The slow reference: one row at a time, phi masked parameter by parameter, no mask in the model."""
    bundle, losses = problem.bundle, []
    element = MaskSpace(bundle.shape, "element")
    for row, bits in zip(problem.rows[inputs].tolist(), torch.from_numpy(gates).float(), strict=True):
        mask = problem.space.refine(bits[None], element)
        phi = bundle.phi[bundle.user[row]][None] * mask
        with torch.no_grad():
            losses.append(problem.model.losses(take(bundle.examples, torch.tensor([row])), phi))
    return torch.cat(losses).numpy()


@pytest.mark.parametrize("split", [*SPLITS, "support"])
def test_table_equals_the_model(make: Make, split: str) -> None:
    problem = make(split)
    assert problem.table is not None
    inputs, gates = some(problem, 24)
    served = problem.losses(inputs, gates)
    assert served.dtype == np.float32
    np.testing.assert_allclose(served, problem.compute_losses(inputs, gates), atol=1e-4)
    np.testing.assert_allclose(served[:6], one_by_one(problem, inputs[:6], gates[:6]), atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_computed_losses_equal_one_row_at_a_time(make: Make, granularity: str) -> None:
    problem = make(granularity=granularity)
    inputs, gates = some(problem, 6)
    np.testing.assert_allclose(problem.losses(inputs, gates), one_by_one(problem, inputs, gates), atol=1e-4)
    assert (problem.table is None) == (granularity != "pathway")


def test_batches_do_not_matter(make: Make) -> None:
    problem = make()
    inputs, gates = some(problem, 23)
    whole = problem.compute_losses(inputs, gates)
    np.testing.assert_allclose(problem.compute_losses(inputs, gates, batch_size=5), whole, atol=1e-5)


def test_one_user_is_computed_like_many(make: Make) -> None:
    problem = make()
    own = np.flatnonzero(problem.user.numpy() == int(problem.user[0]))
    other = np.flatnonzero(problem.user.numpy() != int(problem.user[0]))[:1]
    gates = some(problem, len(own) + 1)[1]
    mixed = problem.compute_losses(np.concatenate([own, other]), gates)
    np.testing.assert_allclose(problem.compute_losses(own, gates[:-1]), mixed[:-1], atol=1e-5)


def test_halves_of_the_table(make: Make) -> None:
    problem = make()
    assert problem.table is not None and problem.even_table is not None
    inputs, gates = some(problem, 8)
    examples = take(problem.bundle.examples, problem.rows[inputs])
    phi = problem.bundle.phi[problem.user[inputs]]
    mask = problem.space.expand(torch.from_numpy(gates).float())
    with torch.no_grad():
        parts = problem.model.losses(examples, phi, mask, parts=True).numpy()
    even = problem.even_table[inputs, mask_codes(gates)].astype(np.float32)
    np.testing.assert_allclose(even, parts[:, 0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(parts.sum(1), problem.losses(inputs, gates), atol=1e-4)


@pytest.mark.parametrize("l0_penalty", [0.0, 2e-5])
def test_rewards_are_the_formula(make: Make, l0_penalty: float) -> None:
    problem = make(l0_penalty=l0_penalty)
    inputs, gates = some(problem, 20)
    # a pathway of rank 2 at 8 sites of width 128, up and down
    active = gates.sum(1) * 2 * 2 * 128 * 8
    assert np.array_equal(problem.active_parameters(gates), active)
    expected = -problem.losses(inputs, gates).astype(np.float64) - l0_penalty * active
    np.testing.assert_allclose(problem.rewards(inputs, gates), expected, rtol=1e-12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_everything_on_is_the_whole_adapter(make: Make, granularity: str) -> None:
    problem = make(granularity=granularity)
    ends = np.stack([np.zeros(problem.gates), np.ones(problem.gates)]).astype(np.uint8)
    assert problem.active_parameters(ends).tolist() == [0, problem.bundle.shape.size]


def test_nothing_on_is_the_bare_backbone(make: Make) -> None:
    problem = make()
    inputs = np.arange(6)
    with torch.no_grad():
        bare = problem.model.losses(take(problem.bundle.examples, problem.rows[:6]), None).numpy()
    np.testing.assert_allclose(problem.losses(inputs, np.zeros((6, problem.gates), dtype=np.uint8)), bare, atol=1e-4)


def test_splits_are_disjoint(make: Make) -> None:
    problems = {split: make(split) for split in SPLITS}
    groups = {split: set(problem.user.tolist()) for split, problem in problems.items()}
    assert groups["train"] == groups["seen"]
    assert not groups["train"] & groups["validation"]
    assert not (groups["train"] | groups["validation"]) & groups["test"]
    rows = [row for problem in problems.values() for row in problem.rows.tolist()]
    rows += make("support").rows.tolist()
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("split", SPLITS)
def test_support_is_of_these_users_and_apart_from_the_split(make: Make, split: str) -> None:
    problem = make(split, l0_penalty=1e-5)
    support = problem.support()
    assert set(support.user.tolist()) == set(problem.user.tolist())
    assert not set(support.rows.tolist()) & set(problem.rows.tolist())
    assert (support.l0_penalty, support.space.granularity) == (1e-5, "pathway")
    # its part of the table belongs to its inputs
    support.__dict__["model"] = problem.model
    inputs, gates = some(support, 8)
    np.testing.assert_allclose(support.losses(inputs, gates), support.compute_losses(inputs, gates), atol=1e-4)


def test_some_inputs_only(make: Make) -> None:
    whole, chosen = make(), torch.tensor([7, 2, 20])
    part = make(inputs=chosen)
    assert len(part) == 3
    assert part.even_table is not None and part.even_table.shape == (3, 16)
    gates = some(whole, 3)[1]
    np.testing.assert_array_equal(part.losses(np.arange(3), gates), whole.losses(chosen.numpy(), gates))
    np.testing.assert_array_equal(part.observations["context"], whole.observations["context"][chosen])


def test_observations_are_those_of_user_and_input(make: Make, bundle: Bundle) -> None:
    problem = make("seen")
    observed = problem.observations
    for i in (0, 11, 39):
        np.testing.assert_array_equal(observed["user"][i], bundle.observations["user"][problem.user[i]])
        np.testing.assert_array_equal(observed["context"][i], bundle.observations["context"][problem.rows[i]])
    assert {value.dtype for value in observed.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("granularity", GRANULARITIES[1:])
def test_reference_gates_refine(make: Make, granularity: str) -> None:
    coarse, fine = make(), make(granularity=granularity)
    one, other = coarse.reference_gates(), fine.reference_gates()
    assert other.shape == (len(fine), fine.gates)
    assert np.array_equal(coarse.active_parameters(one), fine.active_parameters(other))
    inputs = np.arange(4)
    np.testing.assert_allclose(fine.losses(inputs, other[:4]), coarse.losses(inputs, one[:4]), atol=1e-4)


def test_reference_gates_cannot_be_coarser(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder, verify=False)
    bundle.manifest["granularity"] = "layer"
    with pytest.raises(ValueError, match="'pathway'"):
        GatingProblem(bundle, "test", granularity="pathway").reference_gates()


def test_relaxed_losses_at_binary_gates(make: Make) -> None:
    problem = make()
    inputs, gates = some(problem, 10)
    relaxed = problem.relaxed_losses(torch.from_numpy(inputs), torch.from_numpy(gates).float())
    np.testing.assert_allclose(relaxed.detach().numpy(), problem.losses(inputs, gates), atol=1e-4)


@pytest.mark.parametrize("granularity", ["pathway", "element"])
def test_gradient_of_relaxed_losses(make: Make, granularity: str) -> None:
    """Against central differences along random directions."""
    problem = make(granularity=granularity)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.tensor([0, 9, 17])
    gates = (0.2 + 0.6 * torch.rand(3, problem.gates, generator=generator)).requires_grad_()
    gradient = torch.autograd.grad(problem.relaxed_losses(inputs, gates).sum(), gates)[0]
    assert gradient.shape == gates.shape and (gradient != 0).any(1).all()
    for _ in range(3):
        along = torch.randn(gates.shape, generator=generator).sign()
        with torch.no_grad():
            up, down = (problem.relaxed_losses(inputs, gates + s * 5e-2 * along) for s in (1, -1))
        difference = (up - down) / 0.1
        np.testing.assert_allclose((gradient * along).sum(1), difference, rtol=0.1, atol=3e-3)


def test_equal_requests_are_computed_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(granularity="site")
    computed: list[int] = []
    compute = problem.compute_losses

    def counted(inputs: Any, gates: Any) -> Any:
        computed.append(len(inputs))
        return compute(inputs, gates)

    monkeypatch.setattr(problem, "compute_losses", counted)
    inputs, gates = some(problem, 4)
    inputs, gates = np.tile(inputs, 3), np.tile(gates, (3, 1))
    first = problem.losses(inputs, gates)
    assert computed == [4]
    np.testing.assert_array_equal(problem.losses(inputs, gates), first)
    assert computed == [4]
    gates[0, 0] ^= 1
    problem.losses(inputs, gates)
    assert computed == [4, 1]


def test_the_cache_is_bounded(make: Make) -> None:
    problem = make(granularity="site", cache_bytes=1000)
    inputs, gates = some(problem, 24)
    expected = problem.compute_losses(inputs, gates)
    for _ in range(2):
        np.testing.assert_allclose(problem.losses(inputs, gates), expected, atol=1e-4)
    assert 0 < len(problem._cache) <= 1000 // 120


def test_without_a_cache_nothing_is_looked_up(make: Make) -> None:
    problem = make(cache_bytes=0)
    inputs, gates = some(problem, 5)
    assert problem.table is None
    np.testing.assert_array_equal(problem.losses(inputs, gates), problem.compute_losses(inputs, gates))
    assert not problem._cache


def test_mask_codes_number_the_masks(make: Make) -> None:
    gates = all_gates(make().space).numpy()
    assert mask_codes(gates).tolist() == list(range(16))


def test_default_price_is_a_tenth_of_a_nat_for_everything() -> None:
    assert pytest.approx(0.1, rel=0.02) == TextDomain.l0_penalty * 65_536


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tset"}, "split='tset'"),
        ({"granularity": "layers"}, "granularity='layers'"),
        ({"l0_penalty": -1.0}, "l0_penalty=-1.0"),
        ({"l0_penalty": float("nan")}, "l0_penalty=nan"),
        ({"l0_penalty": float("inf")}, "l0_penalty=inf"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
        ({"device": "abacus"}, "device='abacus'"),
    ],
)
def test_bad_arguments(bundle: Bundle, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatingProblem(bundle, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="device='cuda': no CUDA device"):
        GatingProblem(bundle, device="cuda")


@pytest.mark.parametrize("shape", [(3, 5), (3, 3), (2, 4), (4,)])
def test_masks_that_do_not_fit(make: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gates: shape .*, expected \(3, 4\)"):
        make().losses(np.arange(3), np.zeros(shape, dtype=np.uint8))


def test_many_users_are_unpacked_into_files(
    make: Make, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the users do not fit into memory, losses are the same and the table of all is never made."""
    inputs = np.arange(len(make()))
    gates = np.random.default_rng(0).integers(0, 2, (len(inputs), make().gates)).astype(np.uint8)
    expected = make(cache_bytes=0).losses(inputs, gates)
    monkeypatch.setattr("dsa_gym.bundle.HELD_BYTES", 0)
    shutil.copytree(bundle_folder, tmp_path / "bundle")
    fresh = Bundle.open(tmp_path / "bundle")
    problem = GatingProblem(fresh, "test", device="cpu", cache_bytes=0)
    np.testing.assert_allclose(problem.losses(inputs, gates), expected, atol=1e-5)
    assert "phi" not in fresh.__dict__
    relaxed = problem.relaxed_losses(torch.from_numpy(inputs[:4]), torch.from_numpy(gates[:4]).float())
    np.testing.assert_allclose(relaxed.numpy(), expected[:4], atol=1e-5)
    Bundle.open(tmp_path / "bundle")  # still as it was made


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(make: Make, bundle: Bundle, dtype: str) -> None:
    inputs, gates = some(make(), 8)
    exact = make().losses(inputs, gates)
    half = GatingProblem(bundle, "test", device="cpu", dtype=dtype)
    assert half.table is None
    found = half.losses(inputs, gates)
    assert 0 < np.abs(found - exact).max() < 0.05


def test_hit_rate(make: Make) -> None:
    problem = make(granularity="site")
    assert problem.hit_rate == 0
    inputs, gates = np.arange(4), np.zeros((4, problem.gates), np.uint8)
    for _ in range(4):
        problem.losses(inputs, gates)
    assert problem.hit_rate == 0.75


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch itself
def test_compiled_losses_are_the_same(bundle: Bundle, make: Make) -> None:
    problem = GatingProblem(bundle, "test", device="cpu", cache_bytes=0, compile=True)
    for seed in range(2):
        inputs, gates = some(problem, 8, seed)
        np.testing.assert_allclose(problem.losses(inputs, gates), make(cache_bytes=0).losses(inputs, gates), atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_magnitude_of_a_gate_is_that_of_the_parameters_it_switches(granularity: str, make: Make) -> None:
    problem = make(granularity=granularity)
    magnitudes, library = problem.gate_magnitudes(), problem.bundle.phi_meta
    assert magnitudes.shape == (problem.gates,) and len(problem.gate_features) == problem.gates
    component = problem.bundle.shape.component_of()
    for gate in np.linspace(0, problem.gates - 1, 5).astype(int):
        mask = problem.space.expand(torch.eye(problem.gates)[[gate]])[0]
        switched = mask.bool() if granularity == "element" else mask.flatten()[component].bool()
        assert magnitudes[gate] == pytest.approx(library[switched].square().mean().sqrt().item(), rel=1e-5)
