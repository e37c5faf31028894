"""Changes that are unpacked once are those of the store, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsa_gym.unpacked import UnpackedChanges
from dsa_gym.user_store import UserAdapter, UserStore

SIZE = 50


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> UserStore:
    """Users with 0, 1, ... changes."""
    store = UserStore.create(tmp_path_factory.mktemp("store"), size=SIZE, embedding_dim=2)
    generator = torch.Generator().manual_seed(0)
    for user in range(8):
        delta = torch.zeros(SIZE)
        delta[torch.randperm(SIZE, generator=generator)[:user]] = torch.randn(user, generator=generator)
        store.write(str(user), UserAdapter.from_dense(delta, torch.zeros(2)))
    return store


NAMES = [str(user) for user in range(8)]


@pytest.fixture(scope="module")
def unpacked(store: UserStore, tmp_path_factory: pytest.TempPathFactory) -> UnpackedChanges:
    return UnpackedChanges.open(tmp_path_factory.mktemp("unpacked"), store, NAMES, "a" * 64)


@given(users=st.lists(st.integers(0, 7), min_size=1, max_size=20))
def test_any_users(store: UserStore, unpacked: UnpackedChanges, users: list[int]) -> None:
    phi = torch.linspace(-1, 1, SIZE)
    expected = phi + store.read_dense([NAMES[user] for user in users])
    assert torch.equal(unpacked.add_to(phi, torch.tensor(users)), expected)
    assert torch.equal(phi, torch.linspace(-1, 1, SIZE))


def test_nothing_is_changed(store: UserStore, tmp_path: Path) -> None:
    only = UnpackedChanges.open(tmp_path, store, ["0"], "a" * 64)
    assert torch.equal(only.add_to(torch.ones(SIZE), torch.tensor([0, 0])), torch.ones(2, SIZE))


def test_is_written_once_for_each_bundle(store: UserStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = UserStore.read, []
    monkeypatch.setattr(UserStore, "read", lambda self, user: names.append(user) or read(self, user))
    for checksum in ("a" * 64, "a" * 64, "b" * 64):
        UnpackedChanges.open(tmp_path, store, NAMES, checksum)
    assert names == NAMES * 2


def test_begins_again_where_it_was_killed(store: UserStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = UserStore.read

    def dies(self: UserStore, user: str) -> UserAdapter:
        if user == "5":
            raise KeyboardInterrupt
        return read(self, user)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UserStore, "read", dies)
        UnpackedChanges.open(tmp_path, store, NAMES, "a" * 64)
    assert not list(tmp_path.iterdir())
    phi = torch.zeros(SIZE)
    found = UnpackedChanges.open(tmp_path, store, NAMES, "a" * 64).add_to(phi, torch.arange(8))
    assert torch.equal(found, store.read_dense(NAMES))
