"""Bundles on disk: whole, checked, free of code, and able to move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym import storage
from dsa_gym.bundle import Bundle, BundleError
from dsa_gym.data import read_texts
from dsa_gym.library_training import LibraryTrainingConfig
from dsa_gym.population import SPLITS, SplitConfig
from dsa_gym.prepare import AdapterConfig, PrepareConfig, prepare
from dsa_gym.problem import GatingProblem

KINDS = (
    "examples.safetensors",
    "library.safetensors",
    "observations.safetensors",
    "losses/test.npy",
    "losses/test_even.npy",
    "store/store.json",
    "store/users/*.safetensors",
)


@pytest.fixture
def copied(bundle_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copied"))


def a_file(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def test_opens(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    assert bundle.domain == "text"
    assert bundle.space.gates == 4
    assert len(bundle.users) == 16
    rows = {split: bundle.rows(split) for split in (*SPLITS, "support")}
    sizes = {split: len(index) for split, index in rows.items()}
    # 2 of 16 users validate, 4 test; 6, 4, 4, 6 inputs each, 8 of support
    assert sizes == {"train": 60, "seen": 40, "validation": 8, "test": 24, "support": 128}
    together = torch.cat(list(rows.values()))
    assert len(together.unique()) == len(together) == len(bundle.user)
    for name, tensor in bundle.examples.items():
        assert len(tensor) == len(bundle.user), name
    assert bundle.observations["user"].shape == (16, 16)
    assert bundle.observations["context"].shape == (len(bundle.user), 16)


def test_every_file_is_in_the_manifest(bundle_folder: Path) -> None:
    manifest = Bundle.open(bundle_folder).manifest
    files = [path for path in bundle_folder.rglob("*") if path.is_file()]
    there = {path.relative_to(bundle_folder).as_posix() for path in files}
    assert there - {"manifest.json"} == set(manifest["files"])
    for pattern in KINDS:
        assert a_file(bundle_folder, pattern).is_file()


def test_nothing_in_it_is_code(bundle_folder: Path) -> None:
    for path in bundle_folder.rglob("*"):
        if path.is_dir():
            continue
        assert path.suffix in (".json", ".safetensors", ".npy"), path
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".npy":
            assert np.load(path, allow_pickle=False).dtype.kind == "f"
        else:
            storage.read_tensors(path)


@pytest.mark.parametrize("pattern", KINDS)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_byte_is_found(copied: Path, pattern: str, where: str) -> None:
    file = a_file(copied, pattern)
    data = bytearray(file.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="checksum mismatch") as error:
        Bundle.open(copied)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("pattern", KINDS)
def test_a_missing_file_is_found(copied: Path, pattern: str) -> None:
    file = a_file(copied, pattern)
    file.unlink()
    with pytest.raises(BundleError, match="missing from the bundle") as error:
        Bundle.open(copied)
    assert str(file) in str(error.value)


def test_a_truncated_file_is_found(copied: Path) -> None:
    file = copied / "losses" / "train.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(BundleError, match=r"train\.npy: checksum mismatch"):
        Bundle.open(copied)


def test_without_checking_it_opens_all_the_same(copied: Path) -> None:
    (copied / "losses" / "train.npy").unlink()
    assert Bundle.open(copied, verify=False).table("train") is None


@pytest.mark.parametrize("name", ["", "missing"])
def test_no_bundle_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match=r"bundle=.*no manifest\.json there") as error:
        Bundle.open(tmp_path / name)
    assert "not finished" not in str(error.value)


def test_an_unfinished_preparation_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(BundleError, match="has not finished: run the same command again"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format": 99}', "format 99, this version reads format 1"),
        ("{}", "format None"),
        ("[1, 2]", "format None"),
        ('{"format": 1}', r"manifest\.json: has no '"),
        ('{"format": 1', r"manifest\.json is not JSON: line 1"),
        ('{"format": "\ud800"}', r"manifest\.json is not UTF-8"),
    ],
)
def test_bad_manifests(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path)


def test_unknown_split(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="split='tset': expected one of train, seen, validation, test"):
        Bundle.open(bundle_folder).rows("tset")


def test_phi_is_the_library_plus_the_stored_change(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    size = bundle.shape.size
    assert bundle.phi.shape == (16, size)
    for index, user in enumerate(bundle.users):
        record = bundle.store.read(user)
        assert 0 < len(record.indices) <= round(0.1 * size)
        expected = bundle.phi_meta.clone()
        expected[record.indices] += record.values
        torch.testing.assert_close(bundle.phi[index], expected)
        # the record carries the embedding that is observed, at half precision
        torch.testing.assert_close(record.embedding, bundle.observations["user"][index], atol=4e-3, rtol=1e-3)


def test_reference_gate_decides_as_it_did_in_preparation(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    first, again = (GatingProblem(bundle, "test").reference_gates() for _ in range(2))
    assert np.array_equal(first, again)
    assert (first.sum(1) == 2).all()  # two pathways of four
    for split in ("seen", "validation", "test"):
        problem = GatingProblem(bundle, split, device="cpu")
        rewards = problem.rewards(np.arange(len(problem)), problem.reference_gates())
        measured = bundle.manifest["headroom"][split]["ladder"]["reference"]["mean"]
        assert rewards.mean() == pytest.approx(measured, abs=1e-9)
    assert not bundle.reference_gate().training


def test_another_backbone_is_refused(copied: Path) -> None:
    bundle = Bundle.open(copied, verify=False)
    bundle.manifest["backbone"]["layers"] = [0, 1]
    with pytest.raises(BundleError, match="sites are not those"):
        bundle.model()


def test_unknown_domain(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder, verify=False)
    bundle.manifest["domain"]["name"] = "smells"
    with pytest.raises(ValueError, match="domain='smells': expected one of"):
        bundle.make_domain()


def test_table_is_read_only_and_optional(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    table: Any = bundle.table("test")
    even: Any = bundle.table("test", even=True)
    assert table.shape == even.shape == (24, 16)
    assert (table.dtype, even.dtype) == (np.float32, np.float16)
    assert (even.astype(np.float32) < table).all()
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 0
    assert bundle.table("train", even=True) is None


def test_a_local_backbone_goes_with_the_bundle(backbone_folder: Path, persona_file: Path, tmp_path: Path) -> None:
    """It works after the folder that the backbone came from is gone and the bundle was moved."""
    source = Path(shutil.copytree(backbone_folder, tmp_path / "source"))
    (source / "secrets.env").write_text("not for others", encoding="utf-8")
    raw = [(entry.user, entry.texts[:10]) for entry in read_texts([persona_file])[:8]]
    config = PrepareConfig(
        domain={"max_tokens": 16, "prefix_tokens": 5},
        splits=SplitConfig(validation=0.15, test=0.25, min_examples=5),
        adapter=AdapterConfig(rank=4, pathways=2),
        library=LibraryTrainingConfig(steps=2, users=2, support=2, query=2, validate_every=2),
    )
    made = prepare("text", raw, tmp_path / "bundle", config, backbone=str(source), data_files=[persona_file])
    assert made.manifest["backbone"]["copied"]
    shutil.rmtree(source)
    moved = Bundle.open(shutil.move(tmp_path / "bundle", tmp_path / "elsewhere"))
    assert not (moved.folder / "backbone" / "secrets.env").exists()
    problem = GatingProblem(moved, "test", device="cpu")
    inputs = np.arange(len(problem))
    gates = (np.random.default_rng(0).random((len(inputs), problem.gates)) < 0.5).astype(np.uint8)
    computed = problem.compute_losses(inputs, gates)
    np.testing.assert_allclose(problem.losses(inputs, gates), computed, atol=1e-4)
    assert moved.make_domain().describe(moved.examples, 0)["prompt"]
    weights = moved.folder / "backbone" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors: checksum mismatch"):
        Bundle.open(moved.folder)
