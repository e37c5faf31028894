"""Users' records: exact where they promise it, small, and never silently wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from dsa_gym import user_store
from dsa_gym.storage import TEMPORARY_PREFIX, write_json, write_tensors
from dsa_gym.user_store import UserAdapter, UserStore, file_name

EMBEDDING = 4
FLOAT32_MAX = float(torch.finfo(torch.float32).max)

# One folder serves all examples of a test: every example replaces the record.
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync protects from cannot be tested here, and it is most of the time of a write."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@st.composite
def adapters(draw: st.DrawFn, size: int, width: Literal[16, 32] = 32) -> UserAdapter:
    """Adapters with float32 (`width=32`) or float16-representable values (`width=16`), zeros among them."""
    indices = sorted(draw(st.sets(st.integers(0, size - 1), max_size=40)))
    floats = st.floats(width=width, allow_nan=False, allow_infinity=False)
    values = draw(st.lists(floats, min_size=len(indices), max_size=len(indices)))
    return UserAdapter(
        size,
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
        torch.arange(EMBEDDING, dtype=torch.float32),
    )


def random_adapter(size: int, count: int, seed: int = 0, embedding: int = EMBEDDING) -> UserAdapter:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.zeros(size)
    delta[torch.randperm(size, generator=generator)[:count]] = torch.randn(count, generator=generator) * 0.01
    return UserAdapter.from_dense(delta, torch.randn(embedding, generator=generator))


def make(folder: Path, size: int = 1000, **settings: object) -> UserStore:
    return UserStore.create(folder, size=size, embedding_dim=EMBEDDING, **settings)  # type: ignore[arg-type]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, and -0 is not 0."""
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


# Adapters


def test_from_dense_and_back() -> None:
    delta = torch.tensor([0.0, 1.5, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    adapter = UserAdapter.from_dense(delta, torch.ones(2, dtype=torch.float16))
    assert adapter.size == 4
    assert adapter.indices.tolist() == [1, 3]
    assert adapter.values.tolist() == [1.5, -2.0]
    assert adapter.embedding.dtype == torch.float32
    assert not adapter.values.requires_grad
    assert adapter.dense().tolist() == [0.0, 1.5, 0.0, -2.0]
    assert len(UserAdapter.from_dense(torch.zeros(3), torch.zeros(0)).indices) == 0


@pytest.mark.parametrize(
    ("size", "indices", "values", "message"),
    [
        (0, [], [], "size must be at least 1, got 0"),
        (5, [1, 1], [1.0, 1.0], "strictly increasing"),
        (5, [2, 1], [1.0, 1.0], "strictly increasing"),
        (5, [5], [1.0], r"must lie in \[0, 5\), got 5 to 5"),
        (5, [-1, 2], [1.0, 1.0], r"must lie in \[0, 5\), got -1 to 2"),
        (5, [1, 2], [1.0], "got 2 indices but 1 values"),
        (5, [[1]], [1.0], r"indices must be torch.int64 of shape \(n,\), got torch.int64 of shape \(1, 1\)"),
    ],
)
def test_adapters_check_themselves(size: int, indices: list, values: list, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        UserAdapter(size, torch.tensor(indices, dtype=torch.int64), torch.tensor(values), torch.zeros(1))


def test_adapters_check_dtypes_and_shapes() -> None:
    with pytest.raises(ValueError, match=r"values must be torch.float32 .*, got torch.float64"):
        UserAdapter(5, torch.tensor([1]), torch.tensor([1.0], dtype=torch.float64), torch.zeros(1))
    with pytest.raises(ValueError, match=r"delta must be flat, got shape \(2, 2\)"):
        UserAdapter.from_dense(torch.zeros(2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        UserAdapter.from_dense(torch.zeros(0), torch.zeros(1))


# Round trips


@pytest.mark.parametrize("size", [1, 7, 1000, 300_000])
@fast
@given(data=st.data())
def test_float16_is_exact_for_float16_numbers(tmp_path: Path, size: int, data: st.DataObject) -> None:
    store = UserStore(tmp_path) if (tmp_path / "store.json").exists() else make(tmp_path, size, values="float16")
    adapter = data.draw(adapters(size, width=16))
    store.write("u", adapter)
    read = store.read("u")
    assert same_bits(read.indices, adapter.indices)
    assert same_bits(read.values, adapter.values)
    assert same_bits(read.embedding, adapter.embedding)


@pytest.mark.parametrize("block", [1, 8, 256])
@fast
@given(data=st.data())
def test_int8_keeps_indices_bounds_the_error_and_is_idempotent(tmp_path: Path, block: int, data: st.DataObject) -> None:
    store = UserStore(tmp_path) if (tmp_path / "store.json").exists() else make(tmp_path, block=block)
    adapter = data.draw(adapters(1000))
    store.write("u", adapter)
    first = (tmp_path / "users" / file_name("u")).read_bytes()
    read = store.read("u")
    assert same_bits(read.indices, adapter.indices)
    for start in range(0, len(adapter.values), block):
        before, after = (
            adapter.values[start : start + block].double(),
            read.values[start : start + block].double(),
        )
        # Half a step, and what rounding the scale to 8 bits adds to it; 2**-127 is the floor of float32.
        assert float((before - after).abs().max()) <= float(before.abs().max()) / 254 * 1.004 + 2.0**-127
    store.write("u", read)
    assert (tmp_path / "users" / file_name("u")).read_bytes() == first


@pytest.mark.parametrize(
    "values", [[FLOAT32_MAX, -FLOAT32_MAX, 0.0], [1e-45, -1e-45, 0.0], [1e-38, 3e-39, 0.0], [0.0, 0.0, 0.0]]
)
def test_int8_at_the_ends_of_float32(tmp_path: Path, values: list[float]) -> None:
    store = make(tmp_path)
    adapter = UserAdapter(1000, torch.tensor([1, 5, 999]), torch.tensor(values), torch.zeros(EMBEDDING))
    store.write("u", adapter)
    first = (tmp_path / "users" / file_name("u")).read_bytes()
    read = store.read("u")
    assert bool(read.values.isfinite().all())
    assert torch.allclose(read.values, adapter.values, rtol=0.01, atol=2.0**-127)
    assert read.indices.tolist() == [1, 5, 999]
    store.write("u", read)
    assert (tmp_path / "users" / file_name("u")).read_bytes() == first


def test_int8_a_large_value_coarsens_only_its_own_block(tmp_path: Path) -> None:
    store = make(tmp_path, size=512, block=256)
    values = torch.full((512,), 0.01)
    values[0] = 1000.0
    store.write("u", UserAdapter(512, torch.arange(512), values, torch.zeros(EMBEDDING)))
    read = store.read("u")
    assert read.values[1:256].tolist() == [0.0] * 255
    assert torch.allclose(read.values[256:], values[256:], rtol=0.005)
    assert torch.equal(read.indices, torch.arange(512))


@fast
@given(indices=hnp.arrays(np.bool_, st.integers(1, 5000)))
@example(indices=np.zeros(1, dtype=bool))
@example(indices=np.ones(4097, dtype=bool))
def test_index_codings_are_lossless(indices: np.ndarray) -> None:
    flat = np.flatnonzero(indices)
    data, coding = user_store._encode_indices(flat, len(indices))
    assert np.array_equal(user_store._decode_indices(data, coding, len(flat), len(indices)), flat)
    assert len(data) <= -(-len(indices) // 8)


@fast
@given(st.lists(st.integers(0, 2**62), max_size=50))
def test_varints_are_lossless(numbers: list[int]) -> None:
    array = np.array(numbers, dtype=np.int64)
    assert np.array_equal(user_store._from_varints(np.frombuffer(user_store._varints(array), np.uint8)), array)


def test_the_coding_follows_the_indices() -> None:
    generator = np.random.default_rng(0)
    half = np.flatnonzero(generator.random(65536) < 0.5)
    tenth = np.flatnonzero(generator.random(65536) < 0.1)
    assert user_store._encode_indices(half, 65536)[1].startswith("bitmap")
    assert user_store._encode_indices(tenth, 65536)[1] == "gaps+deflate"
    clustered = np.concatenate([np.arange(s, s + 256) for s in range(0, 65536, 4096)])
    assert len(user_store._encode_indices(clustered, 65536)[0]) < 150


@pytest.mark.parametrize("values", ["int8", "float16"])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_empty_and_full_changes(tmp_path: Path, values: str, count: int) -> None:
    store = make(tmp_path, values=values)
    adapter = random_adapter(1000, count)
    assert store.write("u", adapter) == store.bytes("u")
    assert torch.equal(store.read("u").indices, adapter.indices)
    assert torch.allclose(store.read("u").dense(), adapter.dense(), atol=2e-4)


# Size


@pytest.mark.parametrize(("density", "limit"), [(0.01, 2_100), (0.05, 6_300), (0.1, 11_000), (0.2, 19_400)])
def test_size_on_disk(tmp_path: Path, density: float, limit: int) -> None:
    size = 65_536
    adapter = random_adapter(size, int(density * size), embedding=16)
    store = UserStore.create(tmp_path / "store", size=size, embedding_dim=16)
    written = store.write("author", adapter)
    path = tmp_path / "store" / "users" / file_name("author")
    assert written == store.bytes("author") == path.stat().st_size <= limit
    write_tensors(tmp_path / "dense.safetensors", {"delta": adapter.dense().half()})
    dense = (tmp_path / "dense.safetensors").stat().st_size
    assert dense > 131_072
    assert written < dense * (density + 0.01)


def test_the_headline_record_is_below_a_tenth_of_the_dense_one(tmp_path: Path) -> None:
    store = UserStore.create(tmp_path, size=65_536, embedding_dim=16)
    assert store.write("author", random_adapter(65_536, 6_553, embedding=16)) < 131_072 / 10


# Names


NAMES = [
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "/",
    "a\\b",
    "con",
    "nul.txt",
    "Ann",
    "ann",
    "%41nn",
    "u-ann",
    "h-ann",
    "a\0b",
    "line\nbreak",
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "e\N{COMBINING ACUTE ACCENT}",
    "用户",
    "\N{PILE OF POO}",
    '"quoted" \\"escaped\\"',
    "0" * 32,
    "x" * 5000,
    "X" * 5000,
    "ж" * 34,
    TEMPORARY_PREFIX + "x",
    "a.safetensors",
]


def test_users_may_be_called_anything(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    for number, name in enumerate(NAMES):
        store.write(name, random_adapter(1000, number))
    assert store.users() == sorted(NAMES)
    assert len(store) == len(NAMES)
    for number, name in enumerate(NAMES):
        assert name in store
        assert len(store.read(name).indices) == number
    assert {entry.name for entry in tmp_path.iterdir()} == {"store"}
    assert {entry.name for entry in (tmp_path / "store").iterdir()} == {"store.json", "users"}


def test_file_names_are_distinct_even_without_case_and_short() -> None:
    files = [file_name(name) for name in NAMES]
    assert len({name.lower() for name in files}) == len(NAMES)
    assert all(name.isascii() and len(name) <= 220 for name in files)


@fast
@given(st.text(max_size=300))
def test_any_text_is_a_name(tmp_path: Path, name: str) -> None:
    store = UserStore(tmp_path) if (tmp_path / "store.json").exists() else make(tmp_path)
    store.write(name, random_adapter(1000, 1))
    assert store.users() == [name]
    store.delete(name)


def test_names_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"user '\\ud800' is not valid Unicode"):
        file_name("\ud800")
    with pytest.raises(TypeError, match="user must be a string, got 3 of type int"):
        file_name(3)  # type: ignore[arg-type]


def test_listing_opens_no_records_of_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.write("a", random_adapter(1000, 3))
    store.write("é", random_adapter(1000, 3))

    def refuse(self: Path) -> bytes:
        raise AssertionError(f"opened {self}")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert store.users() == ["a", "é"]
    assert len(store) == 2
    assert "a" in store


# The folder


def test_reading_several_users(tmp_path: Path) -> None:
    store = make(tmp_path)
    for number, name in enumerate("abc"):
        store.write(name, random_adapter(1000, 50, seed=number))
    dense = store.read_dense(["c", "a", "c"])
    assert dense.shape == (3, 1000)
    assert dense.dtype == torch.float32
    assert torch.equal(dense[0], store.read("c").dense())
    assert torch.equal(dense[1], store.read("a").dense())
    assert torch.equal(dense[0], dense[2])
    embeddings = store.embeddings(["b", "a"])
    assert embeddings.shape == (2, EMBEDDING)
    assert torch.equal(embeddings[1], store.read("a").embedding)
    assert store.read_dense([]).shape == (0, 1000)
    assert store.embeddings([]).shape == (0, EMBEDDING)


def test_delete_and_missing_users(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write("a", random_adapter(1000, 1))
    store.delete("a")
    assert "a" not in store
    assert 3 not in store
    assert store.users() == []
    for call in (store.read, store.bytes, store.delete, lambda user: store.read_dense([user])):
        with pytest.raises(KeyError, match=r"no user 'a' in .* \(0 users\)"):
            call("a")


def test_opening_again_keeps_the_settings(tmp_path: Path) -> None:
    make(tmp_path, values="float16", block=7)
    store = UserStore(tmp_path)
    assert (store.size, store.embedding_dim, store.values, store.block) == (1000, EMBEDDING, "float16", 7)
    with pytest.raises(FileExistsError, match=r"is a user store already: open it with UserStore"):
        make(tmp_path)


def test_opening_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a user store, it has no store\.json"):
        UserStore(tmp_path)
    write_json(tmp_path / "store.json", {"a": 1})
    with pytest.raises(ValueError, match=r"store\.json does not describe a dsa-gym user store"):
        UserStore(tmp_path)
    write_json(tmp_path / "store.json", {"format": "dsa-gym user store", "version": 99})
    with pytest.raises(ValueError, match=r"store\.json has format version 99, this reads 1"):
        UserStore(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": 2.5}, r"size must be an integer of at least 1, got 2\.5"),
        ({"embedding_dim": -1}, "embedding_dim must be an integer of at least 0, got -1"),
        ({"block": 0}, "block must be an integer of at least 1, got 0"),
        ({"values": "int4"}, r"values must be one of \('float16', 'int8'\), got 'int4'"),
    ],
)
def test_create_checks_its_settings(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UserStore.create(tmp_path, **({"size": 5, "embedding_dim": 2} | settings))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# What cannot be stored


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("values", ["int8", "float16"])
def test_values_that_are_not_finite(tmp_path: Path, bad: float, values: str) -> None:
    store = make(tmp_path, values=values)
    with pytest.raises(ValueError, match=rf"user 'ann': values must be finite, got {bad}"):
        store.write("ann", UserAdapter(1000, torch.tensor([3]), torch.tensor([bad]), torch.zeros(EMBEDDING)))
    with pytest.raises(ValueError, match=rf"user 'ann': embedding must be finite, got {bad}"):
        store.write("ann", UserAdapter.from_dense(torch.zeros(1000), torch.full((EMBEDDING,), bad)))
    assert store.users() == []


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    store = make(tmp_path, values="float16")
    large = UserAdapter(1000, torch.tensor([3]), torch.tensor([70000.0]), torch.zeros(EMBEDDING))
    with pytest.raises(
        ValueError, match=r"user 'ann': values 70000 does not fit float16 .*use values='int8' or smaller"
    ):
        store.write("ann", large)
    embedding = UserAdapter.from_dense(torch.zeros(1000), torch.full((EMBEDDING,), -1e6))
    with pytest.raises(ValueError, match=r"user 'ann': embedding -1e\+06 does not fit float16 .*scale the embedding"):
        store.write("ann", embedding)


def test_adapters_of_another_shape(tmp_path: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(ValueError, match="user 'ann': the adapter has size 999, the store has 1000"):
        store.write("ann", random_adapter(999, 3))
    with pytest.raises(ValueError, match="user 'ann': the embedding has 5 numbers, the store has 4"):
        store.write("ann", random_adapter(1000, 3, embedding=5))


# Damage


def test_a_killed_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    store.write("a", random_adapter(1000, 10))
    before = store.read("a").dense()
    original = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        original(self, data[: len(data) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        for name in ("a", "b"):
            with pytest.raises(OSError, match="no space left"):
                store.write(name, random_adapter(1000, 500, seed=1))
    assert torch.equal(store.read("a").dense(), before)
    assert store.users() == ["a"]
    assert len(list((tmp_path / "users").iterdir())) == 1


def test_leftovers_of_a_killed_process_are_no_users(tmp_path: Path) -> None:
    store = make(tmp_path)
    (tmp_path / "users" / f"{TEMPORARY_PREFIX}0123.safetensors").write_bytes(b"half")
    assert store.users() == []
    assert len(store) == 0


@pytest.mark.parametrize("values", ["int8", "float16"])
def test_any_flipped_byte_is_found(tmp_path: Path, values: str) -> None:
    store = make(tmp_path, values=values)
    store.write("ann", random_adapter(1000, 60))
    path = tmp_path / "users" / file_name("ann")
    whole = path.read_bytes()
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"u-ann\.safetensors"):
            store.read("ann")
    path.write_bytes(whole)
    store.read("ann")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.write("ann", random_adapter(1000, 60))
    path = tmp_path / "users" / file_name("ann")
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:100], whole[:-1], whole + b"x", b"not a record"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"u-ann\.safetensors is damaged"):
            store.read("ann")
    write_tensors(path, {"x": torch.zeros(3)}, {"a": "b"})
    with pytest.raises(ValueError, match=r"u-ann\.safetensors is damaged or no user's record"):
        store.read("ann")


def test_records_in_the_wrong_place(tmp_path: Path) -> None:
    store = make(tmp_path / "a")
    store.write("ann", random_adapter(1000, 60))
    record = tmp_path / "a" / "users" / file_name("ann")
    shutil.copy(record, record.with_name(file_name("bob")))
    with pytest.raises(ValueError, match=r"u-bob\.safetensors should be the record of user 'bob' but is that of 'ann'"):
        store.read("bob")
    other = make(tmp_path / "b", size=2000)
    shutil.copy(record, tmp_path / "b" / "users" / record.name)
    with pytest.raises(ValueError, match="belongs to another store: its size is 1000, here 2000"):
        other.read("ann")
    narrow = UserStore.create(tmp_path / "c", size=1000, embedding_dim=2)
    shutil.copy(record, tmp_path / "c" / "users" / record.name)
    with pytest.raises(ValueError, match="belongs to another store: its embedding has 4 numbers, here 2"):
        narrow.read("ann")


def test_records_of_a_later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(user_store, "FORMAT_VERSION", 2)
        store.write("ann", random_adapter(1000, 60))
    with pytest.raises(ValueError, match=r"u-ann\.safetensors has format version 2, this reads 1"):
        store.read("ann")


def test_equal_records_are_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make(tmp_path / folder).write("ann", random_adapter(1000, 60))
    contents = {(tmp_path / folder / "users" / file_name("ann")).read_bytes() for folder in ("a", "b")}
    assert len(contents) == 1
