"""Bundles that only the benchmark needs: the shipped one with other sites, or with as many users as one likes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.bundle import Bundle, shape_record
from dsa_gym.domains import take
from dsa_gym.pathways import AdapterShape
from dsa_gym.user_store import UserAdapter, UserStore


def make_bundle(folder: Path, *, users: int, numbers: int = 1000, first_layer: int = 0, seed: int = 0) -> Bundle:
    """Write the shipped text bundle with made-up users: one input each, drawn from the shipped ones, a random change.

    Args:
        folder: Where to.
        users: Number of users, all in ``train``.
        numbers: Non-zeros of each user's change.
        first_layer: Lowest block that has adapters.
        seed: Seeds inputs and changes.
    """
    shipped, generator = Bundle.open("text"), np.random.default_rng(seed)
    old = shipped.shape
    kept = [index for index, site in enumerate(old.sites) if site.layer >= first_layer]
    shape = AdapterShape(tuple(old.sites[index] for index in kept), old.rank, old.pathways, old.dropout)
    halves = zip(*(old.matrices(shipped.phi_meta[None], index) for index in kept), strict=True)
    phi = torch.cat([part.flatten() for half in halves for part in half])
    gate = {f"gate.{name}": value for name, value in shipped.reference_gate().state_dict().items()}
    storage.write_tensors(folder / "library.safetensors", gate | {"phi": phi})

    store = UserStore.create(folder / "store", size=shape.size, embedding_dim=1)
    names = [f"made-{user:07d}" for user in range(users)]
    for name in tqdm(names, desc="made-up users", unit="user"):
        places = np.sort(generator.choice(shape.size, numbers, replace=False))
        values = generator.normal(0, 0.01, numbers).astype(np.float32)
        store.write(name, UserAdapter(shape.size, torch.from_numpy(places), torch.from_numpy(values), torch.zeros(1)))

    drawn = torch.from_numpy(generator.integers(0, len(shipped.user), users))
    rows = torch.arange(users, dtype=torch.int32)
    tensors = {f"examples.{name}": value for name, value in take(shipped.examples, drawn).items()}
    tensors |= {f"rows.{split}": rows for split in ("train", "seen", "validation", "test", "support")}
    storage.write_tensors(folder / "examples.safetensors", tensors | {"user": rows})
    observed = shipped.observations
    observations = {"user": observed["user"][shipped.user[drawn]], "context": observed["context"][drawn]}
    for name in ("user", "context"):
        projection = shipped.projection(name)
        observations |= {f"{name}.mean": projection.mean, f"{name}.directions": projection.directions}
    storage.write_tensors(folder / "observations.safetensors", observations)

    manifest = copy.deepcopy(shipped.manifest)
    manifest |= {"adapter": shape_record(shape), "users": names, "groups": ["train"] * users}
    manifest["backbone"]["layers"] = list(shape.layers)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest["files"] = {path.relative_to(folder).as_posix(): storage.sha256(path) for path in files}
    storage.write_json(folder / "manifest.json", manifest)
    return Bundle.open(folder)
