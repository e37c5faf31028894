"""Publishing and fetching runs, over a local server that speaks the Hub's routes."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from dsa_gym import storage
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.train import load_run

REPO = "someone/gates"
PUBLISHED = {"agent.json", "agent.safetensors", "run.json", "README.md"}
PICKLES = {"policy.zip": b"PK", "pytorch_model.bin": pickle.dumps(0), "agent.pt": b"x", "evil.pkl": b"x"}


@dataclass
class Hub:
    """Repositories of a local server: name to files, and what was asked of it."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    down: bool = False

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.split("?")[0].split("/")[1:]
            if hub.down:
                return self.answer(500, {"error": "down"})
            if path[:2] == ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != "Bearer right":
                return self.answer(403, {"error": "no right to write"})
            if path[:3] == ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                known = repo in hub.repos
                hub.repos.setdefault(repo, {})
                hub.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
                return self.answer(409 if known else 200, {"url": f"{hub.url}/{repo}", "id": repo})
            files = hub.repos["/".join(path[2:4])]
            if path[4] == "preupload":
                names = [entry["path"] for entry in json.loads(body)["files"]]
                rows = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                return self.answer(200, {"files": rows})
            assert path[4] == "commit"
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            repo = "/".join(path[2:4])
            address = f"{hub.url}/{repo}/commit/{hub.sha(repo)}"
            return self.answer(200, {"commitUrl": address, "commitOid": hub.sha(repo), "success": True})

        def do_GET(self) -> None:
            path = self.path.split("?")[0].split("/")[1:]
            if hub.down:
                return self.answer(500, {"error": "down"})
            repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
            if repo not in hub.repos:
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            files, sha = hub.repos[repo], hub.sha(repo)
            if path[0] == "api":
                if path[4:5] == ["revision"] and path[5] not in ("main", sha):
                    return self.answer(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
                if path[4:5] == ["tree"]:
                    rows = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]
                    return self.answer(200, rows)
                return self.answer(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
            name = path[4]
            hub.fetched.append(name)
            etag = hashlib.sha1(files[name]).hexdigest()
            return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)

        do_HEAD = do_GET  # noqa: N815

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The only Hub that is reached, with a token that may write."""
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    found.url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "right")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(runs[0], tmp_path / "mine" / runs[0].name))


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(matter))


def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything fail that could unpickle."""
    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something is unpickled"))


def test_pushed_and_pulled_the_agent_decides_the_same(
    hub: Hub, run: Path, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["push", str(run), "--repo", REPO, "--private"]) == 0
    assert hub.private[REPO]
    assert hub.repos[REPO].keys() == PUBLISHED
    assert str(bundle_folder).encode() not in b"".join(hub.repos[REPO].values()), "a path of the machine"
    hub.repos[REPO] |= PICKLES
    out = tmp_path / "theirs" / "run"
    with monkeypatch.context() as patch:
        no_pickle(patch)
        assert main(["pull", REPO, "--out", str(out), "--bundle", str(bundle_folder)]) == 0
        config, agent = load_run(out)
    assert set(hub.fetched) == PUBLISHED
    assert {path.name for path in out.iterdir()} == PUBLISHED
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    original_config, original = load_run(run)
    assert config == original_config
    problem = config.problem("test")
    np.testing.assert_array_equal(agent.masks(problem), original.masks(problem))
    record = storage.read_json(out / "run.json")
    assert record.pop("source") == {"repo": REPO, "commit": hub.sha(REPO)}
    assert record == storage.read_json(run / "run.json")
    assert main(["evaluate", str(out)]) == 0


def test_the_card_of_an_evaluated_run(hub: Hub, run: Path, bundle_folder: Path) -> None:
    assert main(["evaluate", str(run), "--json", str(run / "evaluation.json")]) == 0
    result = storage.read_json(run / "evaluation.json")
    assert main(["push", str(run), "--repo", REPO, "--license", "mit"]) == 0
    assert not hub.private[REPO]
    assert hub.repos[REPO].keys() == PUBLISHED | {"evaluation.json"}
    card = hub.repos[REPO]["README.md"].decode()
    matter = front_matter(card)
    assert matter["library_name"] == "dsa-gym" and matter["license"] == "mit"
    assert {"reinforcement-learning", "DSA-Text-v0", "ppo"} <= set(matter["tags"])
    (entry,) = matter["model-index"][0]["results"]
    assert entry["dataset"]["type"] == "DSA-Text-v0"
    (metric,) = entry["metrics"]
    assert metric["type"] == "normalized_score"
    assert metric["value"] == pytest.approx(result["normalized_score"]["mean"], abs=1e-4)
    assert f"{result['normalized_score']['low']:.4f}" in card
    assert "learning_rate: 0.01" in card and "torch " in card and REPO in card
    loaded = load_run(run)[1]
    assert loaded.scorer.bundle.checksum in card
    # the next run is not judged by the last one's evaluation
    (run / "evaluation.json").unlink()
    assert main(["push", str(run), "--repo", REPO]) == 0
    assert hub.repos[REPO].keys() == PUBLISHED
    assert "without intervals" in hub.repos[REPO]["README.md"].decode()


def test_the_code_on_the_card_runs(hub: Hub, run: Path, bundle_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert main(["push", str(run), "--repo", REPO]) == 0
    card = hub.repos[REPO]["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(bundle_folder.parent))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["agent"].masks(names["config"].problem("test")).shape[1] == 4


def test_into_a_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "out" / "published"
    assert main(["push", str(run), "--repo", REPO, "--to", str(to)]) == 0
    assert {path.name for path in to.iterdir()} == PUBLISHED
    assert front_matter((to / "README.md").read_text())["library_name"] == "dsa-gym"
    assert main(["push", str(run), "--repo", REPO, "--to", str(to)]) == 2
    assert "is there already" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_is_not_pushed(
    hub: Hub, run: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected USER/NAME" in refused(capsys, "push", run, "--repo", "gates")
    assert "no run.json" in refused(capsys, "push", tmp_path, "--repo", REPO)
    assert main(["evaluate", str(runs[1]), "--json", str(run / "evaluation.json"), "--plot", str(tmp_path / "p")]) == 0
    assert "of other runs than this one" in refused(capsys, "push", run, "--repo", REPO)
    record = storage.read_json(run / "run.json")
    storage.write_json(run / "run.json", {name: value for name, value in record.items() if name != "scores"})
    assert "not finished" in refused(capsys, "push", run, "--repo", REPO)
    assert hub.repos == {}


def test_no_right_to_write(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    message = refused(capsys, "push", run, "--repo", REPO)
    assert "refuses with status 403" in message and "hf auth login" in message


def test_what_is_not_pulled(
    hub: Hub, run: Path, bundle_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "theirs" / "run"
    bundle = ("--bundle", bundle_folder)
    assert "expected USER/NAME" in refused(capsys, "pull", "gates", "--out", out)
    assert "not found, or private" in refused(capsys, "pull", REPO, "--out", out)
    hub.repos[REPO] = dict(PICKLES)
    assert "not a run of dsa-gym: it has no agent.json" in refused(capsys, "pull", REPO, "--out", out)
    assert main(["push", str(run), "--repo", REPO]) == 0
    capsys.readouterr()
    assert "no such branch, tag or commit" in refused(capsys, "pull", REPO, "--out", out, "--revision", "v9")
    assert "was trained on the bundle 'small'" in refused(capsys, "pull", REPO, "--out", out)
    assert "is there already; give a new folder" in refused(capsys, "pull", REPO, "--out", tmp_path)
    good = dict(hub.repos[REPO])
    hub.repos[REPO]["agent.json"] = b"[]"
    assert "agent.json is not an agent's" in refused(capsys, "pull", REPO, "--out", out, *bundle)
    hub.repos[REPO] = {**good, "agent.safetensors": b"\x80\x04K\x00."}
    assert "cannot read" in refused(capsys, "pull", REPO, "--out", out, *bundle)
    tensors = storage.read_tensors(run / "agent.safetensors")
    storage.write_tensors(tmp_path / "t.safetensors", {name: value for name, value in list(tensors.items())[:3]})
    hub.repos[REPO] = {**good, "agent.safetensors": (tmp_path / "t.safetensors").read_bytes()}
    assert "its agent cannot be loaded" in refused(capsys, "pull", REPO, "--out", out, *bundle)
    strange = json.loads(good["run.json"])
    strange["config"]["command"] = "rm"
    hub.repos[REPO] = {**good, "run.json": json.dumps(strange).encode()}
    assert REPO in refused(capsys, "pull", REPO, "--out", out, *bundle)
    hub.down = True
    assert "refuses with status 500" in refused(capsys, "pull", REPO, "--out", out, *bundle)
    assert list(out.parent.iterdir()) == [], "nothing is put in place that was not loaded"


def test_another_bundle_than_it_was_trained_on(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "--repo", REPO]) == 0
    capsys.readouterr()
    assert REPO in refused(capsys, "pull", REPO, "--out", tmp_path / "x", "--bundle", "text")
    assert not (tmp_path / "x").exists()


def test_without_a_network(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "is not reached" in refused(capsys, "pull", REPO, "--out", tmp_path / "x")
    assert "is not reached" in refused(capsys, "push", run, "--repo", REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE is set" in refused(capsys, "pull", REPO, "--out", tmp_path / "x")


@pytest.mark.parametrize("name", ["evaluate", "load_run"])
def test_loading_a_run_never_unpickles(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (run / "agent.zip").write_bytes(b"PK")
    no_pickle(monkeypatch)
    if name == "load_run":
        load_run(run)
    else:
        assert main(["evaluate", str(run)]) == 0
