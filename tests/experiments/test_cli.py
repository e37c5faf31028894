"""The command line: the whole way from nothing to a report, and bad input that ends in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsa_gym import __version__
from dsa_gym.experiments.cli import main

COMMANDS = (
    ["demo"],
    ["personas"],
    ["pretrain"],
    ["pretrain", "text"],
    ["prepare"],
    ["prepare", "text"],
    ["info"],
    ["train"],
    ["evaluate"],
    ["bench"],
)
PRETRAIN = "{vocabulary: 300, width: 16, layers: 1, heads: 2, window: 16, batch_size: 4, held_out: 0.1}"
PREPARE = """
domain: {max_tokens: 16, prefix_tokens: 5}
splits: {validation: 0.15, test: 0.3, min_examples: 10, support_inputs: 2,
         inputs: {train: 2, seen: 2, validation: 2, test: 2}}
adapter: {rank: 4, pathways: 4}
library: {steps: 2, users: 2, support: 2, query: 2, validate_every: 2}
adaptation: {steps: 1}
"""


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=lambda command: "-".join(command) or "dsa-gym")
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: dsa-gym " + " ".join(command))
    if not command:
        assert all(name in out for name in {name for name, *_ in COMMANDS})


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dsa-gym {__version__}\n"


def test_console_script() -> None:
    """As users call it, and fast: nothing heavy is imported to say how it is used."""
    script = Path(sys.executable).parent / "dsa-gym"
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: dsa-gym")


def test_from_nothing_to_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Personas, a backbone, a bundle, two seeds of an agent, a report and a benchmark."""
    data, backbone, bundle = tmp_path / "personas.jsonl", tmp_path / "backbone", tmp_path / "bundle"
    for name, text in (("pretrain", PRETRAIN), ("prepare", PREPARE)):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    said = run("personas", "--out", data, "--users", 8, "--min-texts", 14, "--max-texts", 16, "--seed", 3)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert f"{len(rows)} texts of 8 users" in said
    assert len({row["user"] for row in rows}) == 8

    config = tmp_path / "pretrain.yaml"
    said = run("pretrain", "text", "--corpus", data, "--out", backbone, "--config", config, "--steps", 2)
    assert "held-out perplexity" in said
    assert (backbone / "model.safetensors").is_file() and (backbone / "tokenizer.json").is_file()

    config = tmp_path / "prepare.yaml"
    prepare = ("prepare", "text", "--data", data, "--out", bundle, "--backbone", backbone, "--config", config)
    said = run(*prepare, "--seed", 5)
    assert "stored per user" in said

    plain = run("info", bundle)
    for text in ("5 train, 1 validation, 2 test", "headroom, test", "stored per user", "unseen users' loss"):
        assert text in " ".join(plain.split())
    manifest = json.loads(run("info", bundle, "--json"))
    assert manifest == json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    seeds = {manifest["config"][part]["seed"] for part in ("splits", "library", "adaptation")}
    assert seeds == {5}

    runs = []
    for seed in (0, 1):
        steps = ("--steps", 64, "--num-envs", 4, "--evaluate-every", 64, "--seed", seed)
        where = ("--bundle", bundle, "--logdir", tmp_path / "runs")
        said = run("train", *where, *steps, "--set", "epochs=1", "batch_size=32")
        runs.append(tmp_path / "runs" / f"DSA-Text-v0-ppo-seed{seed}")
        assert "next: dsa-gym evaluate" in said

    report = tmp_path / "report.json"
    said = run("evaluate", *runs, "--json", report)
    assert "agent" in said and (runs[0] / "ladder-test.png").is_file()
    result = json.loads(report.read_text(encoding="utf-8"))
    assert [entry["seed"] for entry in result["runs"]] == [0, 1]
    assert "steps per second" in run("bench", "--bundle", bundle, "--num-envs", 2, "--repetitions", 2)


def test_demo(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("dsa_gym.bundle").bundle.DEFAULTS, "text", bundle_folder)
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "4096"]) == 0
    for name in ("report.png", "report.json", "DSA-Text-v0-ppo-seed0/run.json"):
        assert (tmp_path / "demo" / name).is_file()


Fail = Callable[..., str]


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.count("\n") == 1, error
        assert error.startswith(f"dsa-gym {arguments[0]}: ")
        return error

    return run


GOOD = '{"user": "ann", "text": "good morning to you"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", (GOOD + GOOD + '{"user": "ann", "te\n').encode(), "data.jsonl, line 3: not JSON"),
        ("data.jsonl", (GOOD + "[1, 2]\n").encode(), "data.jsonl, line 2: expected one JSON object"),
        ("data.jsonl", b'{"user": "ann", "body": "hello"}\n', "has no column 'text'"),
        ("data.jsonl", (GOOD + '{"user": "ann"}\n').encode(), "line 2 has no column 'text'"),
        ("data.csv", b"name,text\nann,hello\n", "has no column 'user'; it has 'name', 'text'"),
        ("data.jsonl", b"", "data.jsonl is empty"),
        ("data.csv", b"user,text\n", "data.csv is empty"),
        ("data.jsonl", GOOD.encode() + '{"user": "zoë"}\n'.encode("latin-1"), "line 2, byte 13: not UTF-8"),
        ("data.jsonl", GOOD.encode("utf-16"), "line 1, byte 1: not UTF-8"),
        ("data.csv.gz", b"not gzip at all", "may be truncated or damaged"),
        ("data.parquet", b"PAR1 no", "is damaged or no Parquet file"),
        ("data.docx", b"PK", "unknown suffix"),
        (None, b"", "there is no file"),
        ("data.jsonl", GOOD.encode() * 3, "0 users are too few"),
    ],
)
def test_bad_data(fail: Fail, tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_bytes(content)
    assert message in fail("prepare", "text", "--data", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_users_with_too_few_texts_are_counted(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD * 3 + GOOD.replace("ann", "bob"), encoding="utf-8")
    error = fail("prepare", "text", "--data", path, "--out", tmp_path / "out")
    assert "of 2 users 2 have fewer than min_examples=20 usable examples" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptation: {share: 1.5}", "share=1.5: expected k as a share"),
        ("adaptation: {share: -0.1}", "share=-0.1"),
        ("adaptation: {method: magic}", "method='magic'"),
        ("adaptation: {shares: 0.1}", "unknown setting 'shares'"),
        ("libary: {steps: 4}", "unknown setting 'libary'"),
        ("library: {steps: many}", "steps='many'"),
        ("library: {gate: {active: 0}}", "active=0"),
        ("adapter: {pathways: 1}", "active=2: expected at most pathways=1"),
        ("values: int4", "values='int4'"),
        ("domain: {max_token: 16}", "max_token"),
        ("- a\n- b", "expected a mapping"),
        ("adapter: {rank: 4", "not readable as YAML"),
        (None, "no such file"),
    ],
)
def test_bad_configuration(fail: Fail, tmp_path: Path, persona_file: Path, text: str | None, message: str) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    error = fail("prepare", "text", "--data", persona_file, "--out", out, "--config", config)
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize("left", [None, [], ["config.json"], ["config.json", "model.safetensors"]])
def test_bad_backbone(fail: Fail, tmp_path: Path, persona_file: Path, left: list[str] | None) -> None:
    """No folder, an empty one, one without weights, one without a tokenizer."""
    from dsa_gym.backbone import SHIPPED

    folder = tmp_path / "backbone"
    if left is not None:
        folder.mkdir()
        for name in left:
            (folder / name).write_bytes((SHIPPED["dsa-text"] / name).read_bytes())
    out = tmp_path / "out"
    error = fail("prepare", "text", "--data", persona_file, "--out", out, "--backbone", folder)
    assert f"backbone='{folder}'" in error
    if left is not None and "model.safetensors" in left:
        assert "tokenizer" in error
    assert not out.exists()


def test_out_is_a_file(fail: Fail, tmp_path: Path, persona_file: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine", encoding="utf-8")
    assert f"out='{out}'" in fail("prepare", "text", "--data", persona_file, "--out", out)
    assert str(out) in fail("prepare", "text", "--data", persona_file, "--out", out / "deeper")
    assert str(out) in fail("personas", "--out", out / "texts.jsonl", "--users", 2)
    assert out.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nowhere"], "bundle='nowhere': no manifest.json there"),
        (["train", "--bundle", "nowhere"], "nowhere': no manifest.json there"),
        (["bench", "--bundle", "nowhere"], "nowhere': no manifest.json there"),
        (["train", "--agent", "pppo"], "agent='pppo'"),
        (["train", "--env", "DSA-Txt-v0"], "env='DSA-Txt-v0'"),
        (["train", "--env", "CartPole-v1"], "env='CartPole-v1'"),
        (["train", "--granularity", "pathways"], "granularity='pathways'"),
        (["train", "--l0-penalty", "-1"], "l0_penalty=-1.0"),
        (["train", "--l0-penalty", "nan"], "l0_penalty=nan"),
        (["train", "--steps", "0"], "steps=0"),
        (["train", "--num-envs", "-3"], "num_envs=-3"),
        (["train", "--seed", "-1"], "seed=-1"),
        (["train", "--set", "learning_rate"], "--set: 'learning_rate': expected NAME=VALUE"),
        (["train", "--set", "learning_rte=1"], "--set: unknown setting 'learning_rte'"),
        (["train", "--set", "learning_rate=fast"], "--set: learning_rate='fast': expected float"),
        (["train", "--set", "learning_rate=-1"], "learning_rate=-1"),
        (["train", "--set", "epochs=1.5"], "--set: epochs=1.5: expected int"),
        (["train", "--set", "hidden=[8"], "--set: 'hidden=[8': the value is not readable as YAML"),
        (["evaluate", "nowhere"], "run='nowhere': no run.json there"),
        (["evaluate", "nowhere", "--split", "tests"], "split='tests'"),
        (["bench", "--env", "DSA-Txt-v0"], "env='DSA-Txt-v0'"),
        (["bench", "--repetitions", "1"], "repetitions=1"),
        (["bench", "--num-envs", "0"], "num_envs=0"),
        (["personas", "--out", "p.jsonl", "--users", "0"], "users"),
        (["personas", "--out", "p.doc", "--users", "2"], "p.doc"),
        (["pretrain", "text", "--out", "b", "--corpus", "nowhere.txt"], "corpus='nowhere.txt': no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    fail: Fail,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle_folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("train", "bench") and "--bundle" not in arguments:
        arguments = [arguments[0], "--bundle", str(bundle_folder), *arguments[1:]]
    assert message in fail(*arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["teach"],
        ["train", "--steps", "many"],
        ["train", "--colour", "red"],
        ["personas"],
        ["prepare", "smells"],
    ],
)
def test_misspelt_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_verbose_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="no manifest"):
        main(["info", "nowhere", "--verbose"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle_folder: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsa_gym.bundle.Bundle.open", interrupt)
    assert main(["info", str(bundle_folder)]) == 130
    assert "the same command continues it" in capsys.readouterr().err
