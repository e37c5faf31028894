"""A bundle: the folder that an environment loads.

```
manifest.json             versions, seeds, checksums, sizes, settings, headroom, timings
backbone/                 weights and tokenizer, unless the backbone is a shipped one or a Hub id
library.safetensors       phi_meta and the reference gate
examples.safetensors      encoded examples, their users, the rows of each split
observations.safetensors  user embeddings, contexts, and the projections that made them
store/                    the user store: one sparse change per user
unpacked/                 changes of very many users, decoded when they are first needed; may be deleted
losses/                   measured losses under all 2^G masks, NPY, where they can be enumerated
```

Nothing in it is code: safetensors, JSON and NPY only. Every file's SHA-256 is in the manifest.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_gym import storage
from dsa_gym.backbone import ASSETS, Backbone
from dsa_gym.domains import Examples, domain_class, make_domain
from dsa_gym.gating import GateConfig, GatingNetwork
from dsa_gym.masks import MaskSpace
from dsa_gym.model import AdaptedModel
from dsa_gym.observations import Projection
from dsa_gym.pathways import AdapterShape, Site
from dsa_gym.population import SPLITS
from dsa_gym.unpacked import UnpackedChanges
from dsa_gym.user_store import UserStore

FORMAT = 1
HELD_BYTES = 2 * 2**30
"""Users' parameters that are held in memory, at most."""

DEFAULTS = {name: ASSETS / f"bundle-{name}" for name in ("text", "recommendation", "image")}


_ENTRIES = ("domain", "backbone", "adapter", "granularity", "gate", "users", "groups", "config", "data", "files")
"""What every manifest has."""


class BundleError(ValueError):
    """A bundle that is missing, incomplete, changed or of another format."""


class Bundle:
    """A prepared gating problem on disk, opened lazily.

    Attributes:
        folder: Where it is.
        manifest: The record of how it was made.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Wrap an opened folder; use :meth:`open`."""
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True) -> Bundle:
        """Open a bundle.

        Args:
            folder: The folder, or a domain's name for its shipped bundle.
            verify: Compare every file with its checksum.

        Raises:
            BundleError: If it is not a finished bundle of this format, or a file is missing or changed.
        """
        path = DEFAULTS.get(str(folder), Path(folder))
        if not (path / "manifest.json").is_file():
            raise BundleError(
                f"bundle={str(folder)!r}: no manifest.json there; expected a folder written by 'dsa-gym prepare'"
                + (
                    " (its preparation has not finished: run the same command again)"
                    if (path / "work").is_dir()
                    else ""
                )
            )
        try:
            manifest = storage.read_json(path / "manifest.json")
        except ValueError as error:
            raise BundleError(f"bundle={str(folder)!r}: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise BundleError(f"bundle={str(folder)!r}: format {found}, this version reads format {FORMAT}")
        lacking = sorted(set(_ENTRIES) - set(manifest))
        if lacking:
            raise BundleError(f"{path / 'manifest.json'}: has no {lacking[0]!r}; prepare or copy the bundle again")
        bundle = cls(path, manifest)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            BundleError: Naming the file that is missing or changed.
        """
        for name, digest in self.manifest["files"].items():
            file = self.folder / name
            if not file.is_file():
                raise BundleError(f"{file}: missing from the bundle; prepare or copy it again")
            if storage.sha256(file) != digest:
                raise BundleError(f"{file}: checksum mismatch, the file has changed since the bundle was made")

    @property
    def domain(self) -> str:
        """Name of the domain."""
        return str(self.manifest["domain"]["name"])

    @property
    def l0_penalty(self) -> float:
        """Default price of one active parameter, in the unit of the loss."""
        return domain_class(self.domain).l0_penalty

    @property
    def users(self) -> list[str]:
        """Names of all users."""
        users: list[str] = self.manifest["users"]
        return users

    @cached_property
    def shape(self) -> AdapterShape:
        """Geometry of the adapters."""
        record = dict(self.manifest["adapter"])
        sites = tuple(Site(**site) for site in record.pop("sites"))
        return AdapterShape(sites=sites, **record)

    @cached_property
    def space(self) -> MaskSpace:
        """The gates that the library was trained under."""
        return MaskSpace(self.shape, self.manifest["granularity"])

    @cached_property
    def _examples(self) -> dict[str, Tensor]:
        return storage.read_tensors(self.folder / "examples.safetensors")

    @cached_property
    def _observations(self) -> dict[str, Tensor]:
        return storage.read_tensors(self.folder / "observations.safetensors")

    @cached_property
    def _library(self) -> dict[str, Tensor]:
        return storage.read_tensors(self.folder / "library.safetensors")

    @cached_property
    def examples(self) -> Examples:
        """Encoded examples, first axis (N,)."""
        return {name[9:]: value for name, value in self._examples.items() if name.startswith("examples.")}

    @cached_property
    def user(self) -> Tensor:
        """Index of each example's user, int64 (N,)."""
        return self._examples["user"].long()

    def rows(self, split: str) -> Tensor:
        """Rows of a split, or ``"support"``, int64.

        Raises:
            ValueError: If the split is unknown.
        """
        if split not in (*SPLITS, "support"):
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        return self._examples[f"rows.{split}"].long()

    @cached_property
    def observations(self) -> dict[str, Tensor]:
        """``user`` (users, user_dim) and ``context`` (N, context_dim), float32, whitened and bounded."""
        return {name: self._observations[name] for name in ("user", "context")}

    def projection(self, name: str) -> Projection:
        """The projection that made the ``user`` or ``context`` observations, for new users and inputs."""
        return Projection(self._observations[f"{name}.mean"], self._observations[f"{name}.directions"])

    @cached_property
    def phi_meta(self) -> Tensor:
        """The library's flat parameters (P,)."""
        return self._library["phi"]

    @cached_property
    def store(self) -> UserStore:
        """The users' sparse changes."""
        return UserStore(self.folder / "store")

    @cached_property
    def phi(self) -> Tensor:
        """``phi_u = phi_meta + delta_u`` of all users, (users, P) float32."""
        return self.phi_meta + self.store.read_dense(self.users)

    def parameters(self, users: Tensor) -> tuple[Tensor, Tensor | None]:
        """phi_u of some users, int64 (n,): a table and its rows, or, of many users in all, just theirs.

        Returns:
            ``phi`` of all users (users, P) and ``users``, while that is at most 2 GiB; else ``phi`` (n, P) and None,
            from changes that are unpacked into the bundle's folder once and memory-mapped.
        """
        if len(self.users) * self.shape.size * 4 <= HELD_BYTES:
            return self.phi, users
        return self._unpacked.add_to(self.phi_meta, users), None

    @cached_property
    def _unpacked(self) -> UnpackedChanges:
        return UnpackedChanges.open(self.folder / "unpacked", self.store, self.users, self.checksum)

    def reference_gate(self) -> GatingNetwork:
        """The gate that was trained together with the library, in eval mode."""
        config = GateConfig(**self.manifest["gate"])
        user, context = self.observations["user"], self.observations["context"]
        gate = GatingNetwork(user.shape[1], context.shape[1], self.space.gates, self.shape.pathways, config)
        tensors = self._library.items()
        gate.load_state_dict({name[5:]: value for name, value in tensors if name.startswith("gate.")})
        return gate.eval()

    def model(self, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> AdaptedModel:
        """Load the backbone with the domain and the adapter geometry.

        Raises:
            BundleError: If the backbone's sites are not those that the bundle was made with.
        """
        record = self.manifest["backbone"]
        source = str(self.folder / "backbone") if record["copied"] else record["source"]
        backbone = Backbone.load(
            source,
            layers=record["layers"],
            kinds=tuple(record["kinds"]),
            site_names=tuple(record["site_names"]) if record["site_names"] else None,
            device=device,
            dtype=dtype,
        )
        if backbone.sites != self.shape.sites:
            raise BundleError(f"backbone={source!r}: its sites are not those that the bundle was made with")
        return AdaptedModel(backbone, self.make_domain(), self.shape)

    def make_domain(self) -> Any:
        """The domain that encoded the examples."""
        record = self.manifest["backbone"]
        source = str(self.folder / "backbone") if record["copied"] else record["source"]
        return make_domain(self.domain, self.manifest["domain"]["settings"], backbone_source=source)

    @property
    def checksum(self) -> str:
        """SHA-256 of the manifest, which has those of all other files."""
        return storage.sha256(self.folder / "manifest.json")

    def table(self, split: str, *, even: bool = False) -> np.ndarray | None:
        """Measured losses of a split's inputs under all masks, (inputs, 2^G) memory-mapped, or None.

        With ``even`` the share that even scored elements have in them (float16, evaluation splits only).
        """
        path = self.folder / "losses" / f"{split}{'_even' if even else ''}.npy"
        return storage.read_array(path, mmap=True) if path.is_file() else None


def shape_record(shape: AdapterShape) -> dict[str, Any]:
    """The geometry as JSON, see :attr:`Bundle.shape`."""
    return asdict(shape)
