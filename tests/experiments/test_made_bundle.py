"""Bundles that the benchmark makes are bundles."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from dsa_gym.bundle import Bundle
from dsa_gym.experiments.made_bundle import make_bundle


@pytest.mark.parametrize("first_layer", [0, 2])
def test_sites_users_and_changes(tmp_path: Path, first_layer: int) -> None:
    bundle = make_bundle(tmp_path, users=7, numbers=30, first_layer=first_layer)
    shipped = Bundle.open("text")
    assert bundle.shape.layers == tuple(range(first_layer, 4)) and len(bundle.users) == 7
    assert [len(bundle.store.read(user).indices) for user in bundle.users] == [30] * 7
    for index, site in enumerate(bundle.shape.sites):
        there = shipped.shape.matrices(shipped.phi_meta[None], shipped.shape.sites.index(site))
        here = bundle.shape.matrices(bundle.phi_meta[None], index)
        assert all(torch.equal(*pair) for pair in zip(here, there, strict=True))
    envs = gym.make_vec("DSA-Text-v0", num_envs=5, bundle=str(tmp_path), cache_bytes=0)
    envs.reset(seed=0)
    rewards = [envs.step(np.full((5, 8), bit, np.int8))[1] for bit in (0, 1)]
    assert np.isfinite(rewards).all() and (rewards[0] != rewards[1]).all()
