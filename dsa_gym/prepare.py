"""Preparation of a bundle: encode, embed, meta-train, adapt, measure.

Every stage leaves its product in ``OUT/work`` and is skipped when it is there, so a killed run continues; the
manifest is written last and makes the folder a bundle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsa_gym import storage
from dsa_gym.adaptation import AdaptationConfig, SupportLoss, adapt_users
from dsa_gym.backbone import KINDS, SHIPPED, Backbone, resolve_source
from dsa_gym.bundle import FORMAT, Bundle, shape_record
from dsa_gym.config import from_mapping, merge, read_mapping
from dsa_gym.domains import Domain, domain_class, make_domain, take
from dsa_gym.ladder import build_ladder, interval, summarise
from dsa_gym.library_training import LibraryTraining, LibraryTrainingConfig
from dsa_gym.masks import MaskSpace
from dsa_gym.model import AdaptedModel, all_gates
from dsa_gym.observations import fit_projection
from dsa_gym.pathways import AdapterShape, PathwayLibrary
from dsa_gym.population import PARTS, SPLITS, Population, SplitConfig, encode_population
from dsa_gym.problem import GatingProblem
from dsa_gym.search import EXHAUSTIVE_GATES
from dsa_gym.user_store import UserAdapter, UserStore, Values

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters' geometry and where they sit.

    Attributes:
        rank: Components per site.
        pathways: Pathways.
        dropout: Dropout rate in training.
        layers: Blocks that get sites; None for all.
        kinds: ``attention``, ``feed_forward`` or both.
        site_names: For an architecture that is not known, see :class:`Backbone`.
        granularity: Granularity that the library is trained under: ``pathway``, ``layer`` or ``site``.
    """

    rank: int = 32
    pathways: int = 8
    dropout: float = 0.1
    layers: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = KINDS
    site_names: tuple[str, ...] | None = None
    granularity: str = "pathway"

    def __post_init__(self) -> None:
        """Check the granularity.

        Raises:
            ValueError: If a library cannot be trained under it.
        """
        if self.granularity not in ("pathway", "layer", "site"):
            raise ValueError(f"granularity={self.granularity!r}: a library is trained under pathway, layer or site")


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that a preparation depends on, besides its data.

    Attributes:
        domain: Settings of the domain, see its class.
        splits: Users and examples.
        adapter: Geometry.
        user_dim: Size of the user embedding.
        context_dim: Size of the context.
        library: Meta-training.
        adaptation: The users' sparse changes.
        adapt_batch: Support examples per user and adaptation step.
        adapt_users: Users that are adapted in one batch.
        values: How the store keeps the values of a change: ``int8`` or ``float16``.
    """

    domain: dict[str, Any] = field(default_factory=dict)
    splits: SplitConfig = field(default_factory=SplitConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    user_dim: int = 16
    context_dim: int = 16
    library: LibraryTrainingConfig = field(default_factory=LibraryTrainingConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    adapt_batch: int = 8
    adapt_users: int = 64
    values: Values = "int8"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        for name in ("user_dim", "context_dim", "adapt_batch", "adapt_users"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        gate = self.library.gate
        if gate.relaxation == "topk" and gate.active > self.adapter.pathways:
            raise ValueError(f"active={gate.active}: expected at most pathways={self.adapter.pathways}")


def prepare_config(domain_name: str, path: Path | None = None) -> PrepareConfig:
    """The domain's default settings, with those of a YAML file over them.

    Raises:
        ValueError: If the domain is unknown, or the file is not readable or holds something else.
    """
    given = read_mapping(path) if path is not None else {}
    values = merge(domain_class(domain_name).defaults, given)
    return from_mapping(PrepareConfig, values, where=str(path or domain_name))


def prepare(
    domain_name: str,
    raw: Sequence[tuple[str, Sequence[Any]]],
    out: Path,
    config: PrepareConfig,
    *,
    backbone: str = "dsa-text",
    data_files: Sequence[Path] = (),
    reading: Mapping[str, Any] | None = None,
) -> Bundle:
    """Make a bundle.

    Args:
        domain_name: A registered domain.
        raw: ``(user, examples in time order)``.
        out: The folder; a folder of a killed run with the same arguments is continued.
        config: Settings.
        backbone: Shipped name, folder or Hub id.
        data_files: Where ``raw`` came from, for the manifest.
        reading: What reading them dropped or replaced, for the manifest.

    Returns:
        The bundle, opened; one that is finished already is not made again.

    Raises:
        ValueError: For data or settings that cannot be used, or a folder that holds something else.
    """
    data = storage.checksums(data_files)
    data = data or {"raw": hashlib.sha256(repr(raw).encode("utf-8", "surrogatepass")).hexdigest()}
    preparation = _Preparation(domain_name, out, config, backbone, data, dict(reading or {}))
    if preparation.finished:
        shutil.rmtree(preparation.work, ignore_errors=True)
        return Bundle.open(preparation.out)
    return preparation.run(raw)


class _Preparation:
    """One run of :func:`prepare`: the stages, their products and their timings."""

    def __init__(
        self,
        domain_name: str,
        out: Path,
        config: PrepareConfig,
        backbone: str,
        data: dict[str, str],
        reading: dict[str, Any],
    ) -> None:
        self.out, self.work, self.config = Path(out), Path(out) / "work", config
        self.source, self.reading = backbone, reading
        self.key = {
            "domain": domain_name,
            "backbone": backbone,
            "config": json.loads(json.dumps(asdict(config))),
            "data": data,
        }
        self._refuse_others()
        folder = Path(backbone)
        if backbone not in SHIPPED and folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(f"backbone={backbone!r}: no *.safetensors there; a bundle takes no other weights with it")
        self.domain: Domain = make_domain(domain_name, config.domain, backbone_source=backbone)
        adapter = config.adapter
        self.backbone = Backbone.load(
            backbone,
            layers=adapter.layers,
            kinds=adapter.kinds,
            site_names=(adapter.site_names[0], adapter.site_names[1]) if adapter.site_names else None,
        )
        self.shape = AdapterShape(self.backbone.sites, adapter.rank, adapter.pathways, adapter.dropout)
        self.space = MaskSpace(self.shape, adapter.granularity)
        self.model = AdaptedModel(self.backbone, self.domain, self.shape)
        self.timings: dict[str, float] = {}

    @property
    def finished(self) -> bool:
        """Whether the manifest, which is written last, is there."""
        return (self.out / "manifest.json").is_file()

    def _refuse_others(self) -> None:
        """Refuse a folder that holds another preparation or something else; nothing is written yet."""
        key = self.work / "key.json"
        there = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"out={str(self.out)!r}: not empty, {there} is a file; give a new folder")
        if self.finished:
            manifest = Bundle.open(self.out, verify=False).manifest
            found = {
                "domain": manifest["domain"]["name"],
                "backbone": manifest["backbone"]["source"],
                **{name: manifest[name] for name in ("config", "data")},
            }
        elif key.is_file():
            found = storage.read_json(key)
        elif any(path.is_file() and not storage.is_temporary(path.name) for path in self.out.rglob("*")):
            raise ValueError(f"out={str(self.out)!r}: not empty and not an unfinished preparation; give a new folder")
        else:
            return
        if found != self.key:
            raise ValueError(
                f"out={str(self.out)!r}: holds a preparation with other data or settings; give a new folder"
            )

    def run(self, raw: Sequence[tuple[str, Sequence[Any]]]) -> Bundle:
        population, report = self._stage("encode", lambda: self._encode(raw))
        observations = self._stage("embed", lambda: self._embed(population))
        training = self._stage("meta-train", lambda: self._train(population, observations))
        gates = self._gates(training, population)
        store = self._stage("adapt", lambda: self._adapt(population, training, gates, observations))
        rows = self._write_examples(population, observations)
        self._write_library(training)
        manifest = self._manifest(population, report, training, store)
        self._stage("measure losses", lambda: self._measure(manifest, rows))
        manifest["personalisation"] = self._recorded(
            "measure users", lambda: self._personalisation(population, training, gates, store)
        )
        manifest["headroom"] = self._recorded("headroom", lambda: self._headroom(manifest))
        return self._finish(manifest)

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage and add its seconds to those of earlier runs that came this far; a killed attempt's are lost."""
        began = time.monotonic()
        result = work()
        record = self.work / "timings.json"
        timings = storage.read_json(record) if record.is_file() else {}
        timings[name] = round(timings.get(name, 0.0) + time.monotonic() - began, 2)
        storage.write_json(record, timings)
        self.timings = timings
        log.info("%s: %.1f s", name, timings[name])
        return result

    def _recorded(self, name: str, work: Callable[[], dict[str, Any]]) -> Any:
        """A stage whose product is a record."""
        path = self.work / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            storage.write_json(path, self._stage(name, work))
        return storage.read_json(path)

    def _encode(self, raw: Sequence[tuple[str, Sequence[Any]]]) -> tuple[Population, dict[str, Any]]:
        trained = trained_users(self.source, self.key["data"])
        population, report = encode_population(raw, self.domain, self.config.splits, trained)
        sizes = ", ".join(f"{len(population.members(group))} {group}" for group in ("train", "validation", "test"))
        log.info(
            "%d users (%s), %d examples; dropped %d users with fewer than %d usable examples and %d unusable examples",
            report["users"], sizes, report["examples"], report["users_dropped"], report["min_examples"],
            report["examples_unusable"],
        )  # fmt: skip
        # only now: data and settings that cannot be used leave nothing behind that would refuse the corrected command
        storage.write_json(self.work / "key.json", self.key)
        return population, report

    def _embed(self, population: Population) -> dict[str, Tensor]:
        """Whitened user embeddings (users, user_dim) and contexts (N, context_dim), and their projections."""
        path = self.work / "observations.safetensors"
        if path.is_file():
            return storage.read_tensors(path)
        context = self.model.features(population.examples, context=True)
        support = [population.rows(user, "support") for user in range(len(population.users))]
        user = torch.stack(
            [self.model.features(take(population.examples, rows), context=False).mean(0) for rows in support]
        )
        train = torch.tensor(population.members("train"))
        seen_in_training = torch.isin(population.user, train) & (population.part != PARTS.index("unseen"))
        of_user = fit_projection(user[train], self.config.user_dim)
        of_context = fit_projection(context[seen_in_training], self.config.context_dim)
        result = {
            "user": of_user(user),
            "context": of_context(context),
            "user.mean": of_user.mean,
            "user.directions": of_user.directions,
            "context.mean": of_context.mean,
            "context.directions": of_context.directions,
        }
        storage.write_tensors(path, result)
        return result

    def _train(self, population: Population, observations: dict[str, Tensor]) -> LibraryTraining:
        training = LibraryTraining(
            self.model, self.space, population, observations["user"], observations["context"], self.config.library
        )
        training.run(self.work / "library.safetensors")
        return training

    def _gates(self, training: LibraryTraining, population: Population) -> Tensor:
        """The reference gate's decisions for all examples, (N, G)."""
        training.gate.eval()
        with torch.no_grad():
            logits = training.gate(training.user_embedding[population.user], training.context)
            return training.gate.decide(logits)

    def _support_loss(self, population: Population, users: list[int], gates: Tensor) -> SupportLoss:
        """Support loss of some users under the reference gate, on ``adapt_batch`` drawn examples each."""
        pools = [population.rows(user, "support") for user in users]
        size = self.config.adapt_batch

        def loss(phi: Tensor, generator: torch.Generator) -> Tensor:
            rows = torch.cat([pool[torch.randint(len(pool), (size,), generator=generator)] for pool in pools])
            mask = self.space.expand(gates[rows])
            losses = self.model.losses(take(population.examples, rows), phi, mask)
            return losses.view(len(users), size).mean(1)

        return loss

    def _fit(
        self, population: Population, users: list[int], gates: Tensor, phi: Tensor, config: AdaptationConfig
    ) -> Tensor:
        """Delta (users, P) of some users, in batches of ``adapt_users``."""
        pieces = []
        for start in range(0, len(users), self.config.adapt_users):
            batch = users[start : start + self.config.adapt_users]
            pieces.append(adapt_users(phi, len(batch), self._support_loss(population, batch, gates), config))
        return torch.cat(pieces)

    def _adapt(
        self, population: Population, training: LibraryTraining, gates: Tensor, observations: dict[str, Tensor]
    ) -> UserStore:
        folder = self.out / "store"
        if (folder / "store.json").is_file():
            store = UserStore(folder)
        else:
            store = UserStore.create(
                folder, size=self.shape.size, embedding_dim=self.config.user_dim, values=self.config.values
            )
        phi = training.library.phi.detach()
        size = self.config.adapt_users
        users = list(range(len(population.users)))
        batches = [users[start : start + size] for start in range(0, len(users), size)]
        for batch in tqdm(batches, desc="adapt", unit="batch"):
            if all(population.users[user] in store for user in batch):
                continue
            delta = self._fit(population, batch, gates, phi, self.config.adaptation)
            for user, change in zip(batch, delta, strict=True):
                store.write(population.users[user], UserAdapter.from_dense(change, observations["user"][user]))
        return store

    def _write_examples(self, population: Population, observations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the examples that the environment needs; returns the rows of each split in what is kept."""
        splits = {split: population.split_rows(split, self.config.splits) for split in SPLITS}
        splits["support"] = population.support_rows(self.config.splits.support_inputs)
        kept = torch.cat(list(splits.values())).unique()
        place = torch.full((len(population.user),), -1, dtype=torch.int64)
        place[kept] = torch.arange(len(kept))
        rows = {split: place[index] for split, index in splits.items()}
        tensors = {f"examples.{name}": value for name, value in take(population.examples, kept).items()}
        tensors |= {f"rows.{split}": index.int() for split, index in rows.items()}
        storage.write_tensors(self.out / "examples.safetensors", tensors | {"user": population.user[kept].int()})
        storage.write_tensors(
            self.out / "observations.safetensors", observations | {"context": observations["context"][kept]}
        )
        return rows

    def _write_library(self, training: LibraryTraining) -> None:
        tensors = {f"gate.{name}": value for name, value in training.gate.state_dict().items()}
        storage.write_tensors(self.out / "library.safetensors", tensors | {"phi": training.library.phi.detach()})

    def _manifest(
        self, population: Population, report: dict[str, Any], training: LibraryTraining, store: UserStore
    ) -> dict[str, Any]:
        adapter = self.config.adapter
        shipped_or_hub = self.source in SHIPPED or not Path(self.source).is_dir()
        if not shipped_or_hub and not (self.out / "backbone").is_dir():
            _copy_backbone(Path(self.source), self.out / "backbone")
        stored = [store.bytes(user) for user in population.users]
        return {
            "format": FORMAT,
            "domain": {"name": self.domain.name, "settings": self.domain.settings()},
            "backbone": {
                "source": self.source,
                "copied": not shipped_or_hub,
                "layers": adapter.layers,
                "kinds": adapter.kinds,
                "site_names": adapter.site_names,
            },
            "adapter": shape_record(self.shape),
            "granularity": self.space.granularity,
            "gate": asdict(self.config.library.gate),
            "users": population.users,
            "groups": population.groups,
            "reading": self.reading,
            "encoding": report,
            "library_training": training.history,
            "stored": {
                "bytes_per_user": float(np.mean(stored)),
                "bytes_most": int(max(stored)),
                "dense_fp16_bytes": 2 * self.shape.size,
                "numbers_per_user": round(float(np.mean([len(store.read(u).indices) for u in population.users]))),
            },
            **{name: self.key[name] for name in ("config", "data")},
            "versions": storage.versions(),
        }

    def _measure(self, manifest: dict[str, Any], rows: dict[str, Tensor]) -> None:
        """Losses of every input of every split under all masks, where there are at most 2^8 of them."""
        if self.space.gates > EXHAUSTIVE_GATES:
            return
        bundle = Bundle(self.out, manifest)
        masks = self.space.expand(all_gates(self.space).float())
        total = sum(len(index) for index in rows.values())
        bar = tqdm(total=total, desc="measure losses", unit="input")
        for split, index in rows.items():
            final = self.out / "losses" / f"{split}.npy"
            if not final.is_file():
                pieces = [
                    self._measure_user(bundle, split, user, index, masks, bar) for user in _users_of(bundle, index)
                ]
                both = np.concatenate(pieces)
                if split not in ("train", "support"):
                    even = both[..., 0].astype(np.float16)
                    storage.write_array(self.out / "losses" / f"{split}_even.npy", even)
                storage.write_array(final, both.sum(-1, dtype=np.float32))
            else:
                bar.update(len(index))
        bar.close()

    def _measure_user(
        self, bundle: Bundle, split: str, user: int, index: Tensor, masks: Tensor, bar: tqdm[Any]
    ) -> np.ndarray:
        """Shares of even and odd scored elements of one user's inputs of a split, (inputs, 2^G, 2)."""
        path = self.work / "losses" / split / f"{user}.npy"
        rows = index[bundle.user[index] == user]
        bar.update(len(rows))
        if path.is_file():
            return storage.read_array(path)
        losses = self.model.all_mask_losses(take(bundle.examples, rows), bundle.phi[user : user + 1], masks).numpy()
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"losses of user {bundle.users[user]!r} are not finite: lower the learning rates")
        storage.write_array(path, losses)
        return losses

    def _personalisation(
        self, population: Population, training: LibraryTraining, gates: Tensor, store: UserStore
    ) -> dict[str, Any]:
        """What a user's sparse change is worth on unseen test users, under the reference gate: losses in nats.

        ``shared``: nothing stored but the embedding. ``sparse``: the record as stored. ``dense``: no budget, after as
        many steps as ``sparse`` took in all. ``wrong_user``: another user's record. ``random_initialisation``: dense
        adaptation from a random library after the same steps.
        """
        users = population.members("test")
        phi = training.library.phi.detach()
        adaptation = self.config.adaptation
        steps = adaptation.steps * (2 if adaptation.method == "topk" else 1)
        dense = replace(adaptation, method="dense", steps=steps)
        fresh = PathwayLibrary(self.shape, torch.Generator().manual_seed(self.config.library.seed + 1)).phi.detach()
        names = [population.users[user] for user in users]
        sparse = store.read_dense(names)
        others = names[-1:] + names[:-1] if len(names) > 1 else [population.users[population.members("train")[0]]]
        changes = {
            "shared": torch.zeros_like(sparse) + phi,
            "sparse": sparse + phi,
            "dense": self._fit(population, users, gates, phi, dense) + phi,
            "wrong_user": store.read_dense(others) + phi,
            "random_initialisation": self._fit(population, users, gates, fresh, dense) + fresh,
        }
        rows = [population.rows(user, "unseen")[:100] for user in users]
        losses = {
            name: torch.stack(
                [self._query_loss(population, r, p[None], gates) for r, p in zip(rows, table, strict=True)]
            )
            for name, table in changes.items()
        }
        bare = torch.stack([self._query_loss(population, r, None, gates) for r in rows])
        result: dict[str, Any] = {name: float(value.mean()) for name, value in losses.items()}
        result["no_adapter"] = float(bare.mean())
        for name in ("dense", "shared", "wrong_user", "random_initialisation"):
            result[f"{name}_minus_sparse"] = _paired(losses[name] - losses["sparse"])
        result["shared_minus_wrong_user"] = _paired(losses["shared"] - losses["wrong_user"])
        result["random_minus_meta_dense"] = _paired(losses["random_initialisation"] - losses["dense"])
        return result | {"users": len(users), "inputs": sum(len(r) for r in rows)}

    @torch.inference_mode()
    def _query_loss(self, population: Population, rows: Tensor, phi: Tensor | None, gates: Tensor) -> Tensor:
        """Mean loss of one user's rows under the reference gate, scalar."""
        mask = None if phi is None else self.space.expand(gates[rows])
        return self.model.losses(take(population.examples, rows), phi, mask).mean()

    def _headroom(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The ladder without an agent on seen and unseen users, in nats of reward."""
        bundle = Bundle(self.out, manifest)
        train = GatingProblem(bundle, "train", device="cpu")
        result: dict[str, Any] = {"l0_penalty": bundle.l0_penalty, "unit": self.domain.unit}
        for split in ("seen", "validation", "test"):
            problem = GatingProblem(bundle, split, device="cpu")
            density = float(problem.reference_gates().mean())
            summary = summarise(build_ladder(problem, train, density=density))
            result[split] = summary
        headroom = result["test"]["headroom"]
        if headroom["low"] <= 0:
            log.warning(
                "the reference gate is within noise of the best static mask on unseen users (%.4f, 95 %% interval "
                "%.4f to %.4f): this bundle gives a gate nothing to learn; train the library longer or on more users",
                headroom["mean"], headroom["low"], headroom["high"],
            )  # fmt: skip
        return result

    def _finish(self, manifest: dict[str, Any]) -> Bundle:
        files = sorted(
            path
            for path in self.out.rglob("*")
            if path.is_file() and self.work not in path.parents and path.name != "manifest.json"
        )
        for path in files:
            if storage.is_temporary(path.name):
                path.unlink()
        files = [path for path in files if path.exists()]
        manifest["timings_seconds"] = self.timings
        manifest["files"] = {path.relative_to(self.out).as_posix(): storage.sha256(path) for path in files}
        storage.write_json(self.out / "manifest.json", manifest)
        shutil.rmtree(self.work)
        return Bundle.open(self.out)


def trained_users(backbone: str, data: Mapping[str, str]) -> list[str]:
    """Users that a backbone was trained on, if that was on one of the files ``data`` (name to SHA-256), else none."""
    record = Path(resolve_source(backbone)) / "pretrain.json"
    if not record.is_file():
        return []
    made = storage.read_json(record)
    same = set(made.get("data", {}).values()) & set(data.values())
    return list(made["trained_users"]) if same and "trained_users" in made else []


def _users_of(bundle: Bundle, rows: Tensor) -> list[int]:
    """Users of rows, in order of first appearance."""
    return list(dict.fromkeys(bundle.user[rows].tolist()))


def _paired(differences: Tensor) -> dict[str, float]:
    """Mean of per-user differences with its 95 % bootstrap interval."""
    values = differences.double().numpy()
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    return interval(float(values.mean()), values[draws].mean(1))


def _copy_backbone(source: Path, target: Path) -> None:
    """Copy what loads a model: configuration, weights and tokenizer."""
    partial = target.with_name(".tmp-backbone")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in ("*.json", "*.safetensors", "*.txt", "*.model"):  # weights, tokenizer, catalogue, conditions
        for file in source.glob(pattern):
            shutil.copy2(file, partial / file.name)
    partial.rename(target)
