"""Files are written whole or not at all, and errors name them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsa_gym import storage


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(storage.TEMPORARY_PREFIX))


def test_atomic_path_creates_parents_and_keeps_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    with storage.atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert leftovers(path.parent) == []


def test_atomic_path_keeps_the_old_file_on_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), storage.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_atomic_path_without_a_file_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"nothing was written for .*a\.txt"),
        storage.atomic_path(tmp_path / "a.txt"),
    ):
        pass


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_atomic_path_gives_ordinary_permissions(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", 1)
    (tmp_path / "b.json").write_text("1")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b.json")}
    assert len(modes) == 1


def test_json_round_trip(tmp_path: Path) -> None:
    obj = {"b": [1, 2.5, None, True], "a": "é\n", "nested": {"x": {}}}
    storage.write_json(tmp_path / "a.json", obj)
    assert storage.read_json(tmp_path / "a.json") == obj
    assert list(storage.read_json(tmp_path / "a.json")) == ["b", "a", "nested"]


def test_json_takes_numpy_scalars_and_paths(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", [np.float32(0.5), np.int64(3), np.bool_(True), Path("x") / "y"])
    assert storage.read_json(tmp_path / "a.json") == [0.5, 3, True, str(Path("x") / "y")]


@pytest.mark.parametrize("bad", [float("nan"), object(), {"a": torch.zeros(2)}, "\ud800"])
def test_json_refuses_what_json_cannot_say(tmp_path: Path, bad: object) -> None:
    storage.write_json(tmp_path / "a.json", "old")
    with pytest.raises(ValueError, match=r"cannot write .*a\.json as JSON"):
        storage.write_json(tmp_path / "a.json", bad)
    assert storage.read_json(tmp_path / "a.json") == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b"}', r"a\.json is not JSON: line 2, column 5"),
        (b"", r"a\.json is not JSON: line 1"),
        (b'"\xff"', r"a\.json is not UTF-8 \(byte 1\)"),
    ],
)
def test_json_errors_say_which_file_and_why(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        storage.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "read",
    [storage.read_json, storage.read_tensors, storage.read_metadata, storage.read_array, storage.sha256],
)
def test_missing_files_and_folders_are_named(tmp_path: Path, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.x"):
        read(tmp_path / "nothing.x")
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read(tmp_path)


def test_tensors_round_trip(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    tensors = {
        "transposed": base.T,
        "tied": base,
        "tied again": base,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3),
    }
    storage.write_tensors(tmp_path / "a.safetensors", tensors, {"what": "é"})
    read = storage.read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert storage.read_metadata(tmp_path / "a.safetensors") == {"what": "é"}


def test_tensors_without_metadata(tmp_path: Path) -> None:
    storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert storage.read_metadata(tmp_path / "a.safetensors") == {}


def test_tensors_survive_that_their_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, {"x": torch.zeros(1000)})
    old = storage.read_tensors(path)["x"]
    storage.write_tensors(path, {"x": torch.ones(1000)})
    assert float(old.sum()) == 0


def test_tensors_refuse_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'x' for .*a\.safetensors must be a tensor, got list"):
        storage.write_tensors(tmp_path / "a.safetensors", {"x": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must map strings to strings"):
        storage.write_tensors(tmp_path / "a.safetensors", {}, {"n": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"cannot write .*a\.safetensors as safetensors"):
        storage.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2).to_sparse()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100, json.dumps({"a": 1}).encode()])
def test_broken_tensors_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (storage.read_tensors, storage.read_metadata):
        with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors as safetensors"):
            read(path)


def test_truncated_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors as safetensors"):
        storage.read_tensors(path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int16).reshape(2, 3), np.array(["a", "bc"]), np.array(1.5)])
def test_array_round_trip(tmp_path: Path, mmap: bool, array: np.ndarray) -> None:
    storage.write_array(tmp_path / "a.npy", array)
    read = storage.read_array(tmp_path / "a.npy", mmap=mmap)
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)
    assert isinstance(read, np.memmap) == mmap
    assert read.flags.writeable != mmap


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*a\.npy: dtype object needs pickle"):
        storage.write_array(tmp_path / "a.npy", np.array([{}]))
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"cannot read .*a\.npy as NPY"):
            storage.read_array(tmp_path / "a.npy", mmap=mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_broken_arrays_are_named(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "a.npy"
    storage.write_array(path, np.arange(100))
    whole = path.read_bytes()
    np.savez(tmp_path / "archive.npz", np.arange(3))
    for content in (whole[:-1], whole[:5], b"", b"x" * 200, (tmp_path / "archive.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*a\.npy as NPY"):
            storage.read_array(path, mmap=mmap)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert storage.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_checksum_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    def checksum(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "data"
        for name, content in files.items():
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text(content)
        return storage.checksums([folder])["data"]

    same = checksum(ann="abc", bob="de")
    assert same == checksum(bob="de", ann="abc")
    assert len({same, checksum(ann="abc"), checksum(ann="ab", bob="cde"), checksum(ann="abc", rob="de")}) == 4


def test_versions_leave_out_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = storage.versions()
    assert found["python"].startswith("3.")
    assert {"torch", "numpy", "gymnasium"} <= found.keys()
    monkeypatch.setattr(storage, "_PACKAGES", ("torch", "no-such-package"))
    assert storage.versions().keys() == {"python", "torch"}


def test_a_locked_folder_is_refused_to_others_until_its_holder_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from dsa_gym import storage\n"
        "with storage.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "new")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is at work there"), storage.locked(tmp_path / "new"):
            pass
        holder.kill()
    with storage.locked(tmp_path / "new"):
        pass
    with pytest.raises(KeyError), storage.locked(tmp_path / "new"):
        raise KeyError
    with storage.locked(tmp_path / "new"):
        pass
