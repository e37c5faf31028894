"""Preparation of a bundle: what it records, that it survives SIGKILL at any stage, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym import storage
from dsa_gym.adaptation import AdaptationConfig
from dsa_gym.backbone import SHIPPED
from dsa_gym.bundle import Bundle
from dsa_gym.config import read_config
from dsa_gym.data import DataError, read_texts
from dsa_gym.domains.text import TextDomain
from dsa_gym.experiments.cli import main
from dsa_gym.prepare import AdapterConfig, PrepareConfig, prepare
from dsa_gym.problem import GatingProblem

# Small enough for seconds on the random backbone, and every stage has several steps to be killed between.
YAML = """
domain: {max_tokens: 16, prefix_tokens: 5}
splits: {validation: 0.15, test: 0.3, min_examples: 10, support_inputs: 3,
         inputs: {train: 3, seen: 2, validation: 2, test: 3}}
adapter: {rank: 8, pathways: 4}
library: {steps: 8, users: 3, support: 2, query: 2, validate_every: 2, seed: 3}
adaptation: {steps: 2}
adapt_users: 3
"""

Start = Callable[..., ForkServerProcess]
KillWhen = Callable[..., bool]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, persona_file: Path) -> Path:
    """Twelve users of 14 texts, and two with too few."""
    path = tmp_path_factory.mktemp("prepare") / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i, entry in enumerate(read_texts([persona_file])[:14]):
            for text in entry.texts[: 14 if i < 12 else 4]:
                file.write(json.dumps({"user": entry.user, "text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def config_file(data: Path) -> Path:
    path = data.with_name("config.yaml")
    path.write_text(YAML, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def command(data: Path, config_file: Path, backbone_folder: Path) -> list[object]:
    """All but ``--out``."""
    return ["prepare", "text", "--data", data, "--config", config_file, "--backbone", backbone_folder]


@pytest.fixture(scope="module")
def unbroken(command: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was made in one go."""
    out = tmp_path_factory.mktemp("unbroken") / "bundle"
    assert main([*map(str, command), "--out", str(out)]) == 0
    return out


def files_of(folder: Path) -> dict[str, str]:
    files: dict[str, str] = storage.read_json(folder / "manifest.json")["files"]
    return files


def has(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


STAGES = (
    "work/key.json",
    "work/observations.safetensors",
    "work/library.safetensors",
    "store/store.json",
    "store/users/u-*",
    "examples.safetensors",
    "backbone",
    "work/losses/train/*.npy",
    "losses/seen_even.npy",
    "losses/support.npy",
    "work/measure-users.json",
)
"""What appears in the course of a preparation, in this order."""


def test_killed_at_every_stage_and_continued(
    command: list[object], unbroken: Path, start_command: Start, kill_when: KillWhen, tmp_path: Path
) -> None:
    """SIGKILL as soon as each product appears, or a moment later; it ends with the files of an unbroken run."""
    out, generator = tmp_path / "bundle", np.random.default_rng(0)
    killed = 0
    for stage in STAGES:
        if (out / "manifest.json").exists():
            break
        process = start_command(*command, "--out", out)
        killed += kill_when(process, has(out, stage), delay=generator.choice([0.0, 0.01]))
        assert process.exitcode in (0, -9)
    assert killed >= 5
    assert main([*map(str, command), "--out", str(out)]) == 0
    assert files_of(out) == files_of(unbroken)
    assert not (out / "work").exists()
    manifests = [storage.read_json(folder / "manifest.json") for folder in (out, unbroken)]
    for manifest in manifests:
        del manifest["timings_seconds"]
    assert manifests[0] == manifests[1]


def test_leftovers_of_killed_writes_do_not_stay(
    command: list[object], unbroken: Path, start_command: Start, kill_when: KillWhen, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    (out / "work").mkdir(parents=True)
    (out / "work" / ".tmp-0123456789abcdef.json").write_text('{"doma', encoding="utf-8")
    (out / "losses").mkdir()
    for name in (".tmp-1.safetensors", "losses/.tmp-2.npy"):
        (out / name).write_bytes(b"half of")
    assert main([*map(str, command), "--out", str(out)]) == 0
    assert files_of(out) == files_of(unbroken)
    assert not list(out.rglob(".tmp-*"))


def test_a_finished_bundle_is_not_made_again(
    command: list[object], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(unbroken, tmp_path / "bundle"))
    # killed between the manifest and the removal of the intermediate products
    (out / "work").mkdir()
    (out / "work" / "timings.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("dsa_gym.prepare.encode_population", lambda *_: pytest.fail("it is made again"))
    assert main([*map(str, command), "--out", str(out)]) == 0
    assert not (out / "work").exists()
    assert files_of(out) == files_of(unbroken)


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", ["data", "config", "seed", "backbone"])
def test_another_preparation_in_the_same_folder_is_refused(
    command: list[object],
    unbroken: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    finished: bool,
    other: str,
) -> None:
    out = tmp_path / "bundle"
    if finished:
        shutil.copytree(unbroken, out)
    else:
        manifest = storage.read_json(unbroken / "manifest.json")
        key = {
            "domain": "text",
            "backbone": manifest["backbone"]["source"],
            "config": manifest["config"],
            "data": manifest["data"],
        }
        storage.write_json(out / "work" / "key.json", key)
    changed = list(command)
    if other == "data":
        (tmp_path / "texts.jsonl").write_text('{"user": "a", "text": "b"}\n', encoding="utf-8")
        changed[3] = tmp_path / "texts.jsonl"
    elif other == "config":
        (tmp_path / "config.yaml").write_text(YAML.replace("rank: 8", "rank: 4"), encoding="utf-8")
        changed[5] = tmp_path / "config.yaml"
    elif other == "seed":
        changed += ["--seed", "1"]
    else:
        changed[7] = "dsa-text"
    before = snapshot(out)
    assert main([*map(str, changed), "--out", str(out)]) == 2
    assert "holds a preparation with other data or settings" in capsys.readouterr().err
    assert snapshot(out) == before


def test_a_foreign_folder_is_refused_and_untouched(
    command: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("ten years", encoding="utf-8")
    before = snapshot(tmp_path)
    for out in (tmp_path, tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        assert main([*map(str, command), "--out", str(out)]) == 2
        assert f"out='{out}': not empty" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_without_files_the_data_are_still_told_apart(
    data: Path, config_file: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    raw = [(entry.user, entry.texts) for entry in read_texts([data])]
    config = read_config(config_file, PrepareConfig)

    def again(texts: Any) -> Bundle:
        return prepare("text", texts, tmp_path / "out", config, backbone=str(backbone_folder))

    first = again(raw)
    assert again(raw).manifest == first.manifest
    with pytest.raises(ValueError, match="other data"):
        again(raw[:-1])


def test_same_seed_same_files_another_seed_another_split(command: list[object], unbroken: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in "ab"]
    for out, seed in zip(outs, "34", strict=True):
        assert main([*map(str, command), "--seed", seed, "--out", str(out)]) == 0
    same, other = (storage.read_json(out / "manifest.json") for out in outs)
    assert same["config"]["splits"]["seed"] == same["config"]["library"]["seed"] == 3
    assert same["config"]["adaptation"]["seed"] == 3
    assert same["groups"] != other["groups"]
    assert same["files"]["library.safetensors"] != other["files"]["library.safetensors"]
    # the unbroken one has seed 3 for the library only
    first = storage.read_json(unbroken / "manifest.json")
    assert first["config"]["splits"]["seed"] == 0
    assert first["groups"] != same["groups"]


def test_manifest(unbroken: Path, data: Path, backbone_folder: Path) -> None:
    manifest = storage.read_json(unbroken / "manifest.json")
    assert manifest["format"] == 1
    assert {"python", "torch", "transformers", "gymnasium", "numpy", "dsa-gym"} <= set(manifest["versions"])
    assert manifest["data"] == {"texts.jsonl": storage.sha256(data)}
    assert manifest["domain"] == {
        "name": "text",
        "settings": {"max_tokens": 16, "prefix_tokens": 5, "min_target": 4},
    }
    assert manifest["backbone"]["source"] == str(backbone_folder)
    assert manifest["backbone"]["copied"] is True
    config = manifest["config"]
    assert config["library"]["seed"] == 3 and config["splits"]["seed"] == 0 == config["adaptation"]["seed"]
    for name, digest in manifest["files"].items():
        assert storage.sha256(unbroken / name) == digest
    # two users were too short
    assert manifest["encoding"] == {
        "users": 12,
        "users_dropped": 2,
        "examples": manifest["encoding"]["examples"],
        "examples_read": 12 * 14 + 2 * 4,
        "examples_unusable": manifest["encoding"]["examples_unusable"],
        "min_examples": 10,
        "users_of_the_backbone": 0,
    }
    assert len(manifest["users"]) == len(manifest["groups"]) == 12
    assert [manifest["groups"].count(group) for group in ("train", "validation", "test")] == [6, 2, 4]
    assert [entry["step"] for entry in manifest["library_training"]] == [2, 4, 6, 8]
    assert set(manifest["timings_seconds"]) == {
        "encode",
        "embed",
        "meta-train",
        "adapt",
        "measure losses",
        "measure users",
        "headroom",
    }
    assert all(seconds >= 0 for seconds in manifest["timings_seconds"].values())


def test_stored_sizes_are_measured(unbroken: Path) -> None:
    bundle = Bundle.open(unbroken)
    stored, size = bundle.manifest["stored"], bundle.shape.size
    sizes = [path.stat().st_size for path in (unbroken / "store" / "users").iterdir()]
    assert stored["bytes_most"] == max(sizes)
    assert stored["bytes_per_user"] == pytest.approx(np.mean(sizes))
    assert stored["dense_fp16_bytes"] == 2 * size
    # changes that fell to zero are not stored
    assert 0.8 * round(0.1 * size) <= stored["numbers_per_user"] <= round(0.1 * size)


def test_headroom_is_the_ladder_without_an_agent(unbroken: Path) -> None:
    headroom = Bundle.open(unbroken).manifest["headroom"]
    assert headroom["l0_penalty"] == TextDomain.l0_penalty
    rungs = {"none", "all", "random", "static", "user_static", "reference", "oracle", "oracle_crossfit"}
    for split, users, inputs in (("seen", 6, 12), ("validation", 2, 4), ("test", 4, 12)):
        part = headroom[split]
        assert set(part["ladder"]) == rungs
        assert (part["users"], part["inputs"]) == (users, inputs)
        ladder = part["ladder"]
        expected = ladder["reference"]["mean"] - ladder["static"]["mean"]
        assert part["headroom"]["mean"] == pytest.approx(expected)
        assert ladder["oracle"]["mean"] >= max(ladder[rung]["mean"] for rung in rungs)


def test_personalisation(unbroken: Path) -> None:
    """The block by hand: means over test users of the losses under the reference gate."""
    bundle = Bundle.open(unbroken)
    block = bundle.manifest["personalisation"]
    assert block["users"] == 4
    for name in ("dense", "shared", "wrong_user", "random_initialisation"):
        paired = block[f"{name}_minus_sparse"]
        assert paired["mean"] == pytest.approx(block[name] - block["sparse"], abs=1e-6)
        assert paired["low"] <= paired["mean"] <= paired["high"]
    assert block["wrong_user"] != block["sparse"] != block["shared"]
    problem = GatingProblem(bundle, "test", device="cpu")
    # all of a user's unseen inputs are measured there, the split holds some of them: close, not equal
    sparse = problem.losses(np.arange(len(problem)), problem.reference_gates()).mean()
    assert block["sparse"] == pytest.approx(sparse, abs=1.0)
    bare = problem.losses(np.arange(len(problem)), np.zeros((len(problem), 4), dtype=np.uint8)).mean()
    assert block["no_adapter"] == pytest.approx(bare, abs=1.0)


def test_one_test_user_still_has_a_wrong_user(
    data: Path, config_file: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    raw = [(entry.user, entry.texts) for entry in read_texts([data])][:5]
    config = read_config(config_file, PrepareConfig)
    small = prepare("text", raw, tmp_path / "out", config, backbone=str(backbone_folder)).manifest
    assert small["personalisation"]["users"] == 2
    config = replace(config, splits=replace(config.splits, test=0.2), adaptation=AdaptationConfig(steps=2))
    small = prepare("text", raw, tmp_path / "one", config, backbone=str(backbone_folder)).manifest
    assert small["personalisation"]["users"] == 1
    assert small["personalisation"]["wrong_user"] != small["personalisation"]["sparse"]


def test_prepared_on_the_shipped_backbone(bundle_folder: Path, persona_file: Path) -> None:
    """The weights stay in the package, unchanged."""
    manifest = Bundle.open(bundle_folder).manifest
    assert manifest["backbone"]["source"] == "dsa-text"
    assert manifest["backbone"]["copied"] is False
    assert not (bundle_folder / "backbone").exists()
    assert manifest["data"] == {persona_file.name: storage.sha256(persona_file)}


def test_frozen_weights_do_not_change(
    data: Path, config_file: Path, tmp_path: Path, backbone_folder: Path, unbroken: Path
) -> None:
    # the copy in the bundle was made at the end of a preparation with the folder's weights
    weights = "model.safetensors"
    assert storage.sha256(unbroken / "backbone" / weights) == storage.sha256(backbone_folder / weights)
    before = snapshot(SHIPPED["dsa-text"])
    raw = [(entry.user, entry.texts) for entry in read_texts([data])][:6]
    made = prepare("text", raw, tmp_path / "out", read_config(config_file, PrepareConfig))
    assert snapshot(SHIPPED["dsa-text"]) == before
    # and in memory: the bare backbone still gives what was measured with everything off
    problem = GatingProblem(made, "test", device="cpu")
    off = np.zeros((len(problem), problem.gates), dtype=np.uint8)
    computed = problem.compute_losses(np.arange(len(problem)), off)
    np.testing.assert_allclose(problem.losses(np.arange(len(problem)), off), computed, atol=1e-4)


def test_too_few_users(data: Path, config_file: Path, backbone_folder: Path, tmp_path: Path) -> None:
    raw = [(entry.user, entry.texts) for entry in read_texts([data])]
    config = read_config(config_file, PrepareConfig)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 users are too few.* of 5 users 2 have fewer than min_examples=10"):
        prepare("text", [*raw[:3], *raw[-2:]], out, config, backbone=str(backbone_folder))
    greedy = replace(config, splits=replace(config.splits, test=0.6))
    with pytest.raises(DataError, match="4 users are too few: one is left to train on"):
        prepare("text", raw[:4], out, greedy, backbone=str(backbone_folder))
    # nothing was claimed: the corrected command may use the folder
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_dim": 0}, "user_dim=0"),
        ({"adapt_batch": 0}, "adapt_batch=0"),
        ({"adapter": AdapterConfig(pathways=1)}, "active=2: expected at most pathways=1"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**change)


def test_bad_granularity() -> None:
    with pytest.raises(ValueError, match="granularity='element'"):
        AdapterConfig(granularity="element")


@pytest.mark.parametrize("settings", [{"max_token": 16}, {"max_tokens": "many"}, {"max_tokens": 3}])
def test_bad_domain_settings(
    data: Path, config_file: Path, backbone_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = replace(read_config(config_file, PrepareConfig), domain=settings)
    with pytest.raises(ValueError, match="max_token"):
        prepare("text", [], tmp_path / "out", config, backbone=str(backbone_folder))
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(config_file: Path, backbone_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(backbone_folder, tmp_path / "source"))
    weights = storage.read_tensors(source / "model.safetensors")
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors there"):
        prepare("text", [], tmp_path / "out", read_config(config_file, PrepareConfig), backbone=str(source))


def test_more_gates_than_can_be_enumerated(
    data: Path, config_file: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    """A library trained under 16 gates has no tables; its oracle is a labelled lower bound."""
    config = read_config(config_file, PrepareConfig)
    config = replace(config, adapter=replace(config.adapter, granularity="site"))
    raw = [(entry.user, entry.texts) for entry in read_texts([data])][:5]
    made = prepare("text", raw, tmp_path / "out", config, backbone=str(backbone_folder))
    assert made.space.gates == 16
    assert made.table("test") is None
    test = made.manifest["headroom"]["test"]
    assert test["oracle_kind"] == "greedy lower bound"
    assert "oracle_crossfit" not in test["ladder"]
