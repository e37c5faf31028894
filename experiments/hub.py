"""Publishing of finished runs on the Hugging Face Hub, and fetching them.

What is published is the agent (safetensors and JSON), the run's manifest, its evaluation where ``evaluation.json`` is
in the run, and a model card; no TensorBoard events and no path of the machine. What is fetched are those files and no
others, whatever else the repository holds: none of them can run code when it is opened.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml

from dsa_gym import storage
from dsa_gym.agents.base import Agent
from dsa_gym.experiments.evaluate import RUNGS
from dsa_gym.experiments.train import load_run, read_manifest

REQUIRED = ("agent.json", "agent.safetensors", "run.json")
FILES = (*REQUIRED, "evaluation.json", "README.md")


def push(run: Path, repo: str, *, private: bool = False, to: Path | None = None, license: str = "apache-2.0") -> str:
    """Publish a finished run.

    Args:
        run: Folder of the run.
        repo: ``USER/NAME`` on the Hub; made if it is missing.
        private: Whether a new repository is private.
        to: Write the files into this new folder, and publish nothing.
        license: Of the agent, as the Hub spells it.

    Returns:
        Where it is: an address, or the folder.

    Raises:
        ValueError: If the run or its evaluation does not fit, or the Hub refuses.
        ConnectionError: If the Hub is not reached.
    """
    _check_repo(repo)
    if to is not None:
        with _new_folder(to) as folder:
            stage(Path(run), folder, repo, license)
        return str(to)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary, _readable_errors(repo):
        stage(Path(run), Path(temporary), repo, license)
        api = HfApi(library_name="dsa-gym")
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        # an evaluation of what was published before is not this run's
        api.upload_folder(
            repo_id=repo, folder_path=temporary, commit_message="A run of dsa-gym", delete_patterns=list(FILES)
        )
    return str(address)


def stage(run: Path, folder: Path, repo: str, license: str = "apache-2.0") -> None:
    """Write what is published of a run into a folder.

    Raises:
        ValueError: If it is no finished run, its bundle has changed, or its evaluation is of other runs.
    """
    config, agent = load_run(run)
    manifest = read_manifest(run)
    evaluation = storage.read_json(run / "evaluation.json") if (run / "evaluation.json").is_file() else None
    if evaluation is not None:
        judged = [entry.get("seed") for entry in evaluation.get("runs", [])]
        if evaluation.get("config") != manifest["config"] or judged != [config.seed]:
            raise ValueError(
                f"{run / 'evaluation.json'}: of other runs than this one; "
                f"make it by 'dsa-gym evaluate {run} --json {run / 'evaluation.json'}'"
            )
        storage.write_json(folder / "evaluation.json", {**evaluation, "config": _public(evaluation["config"])})
    for name in ("agent.json", "agent.safetensors"):
        shutil.copyfile(run / name, folder / name)
    manifest = {**manifest, "config": _public(manifest["config"])}
    storage.write_json(folder / "run.json", manifest)
    storage.write_text(folder / "README.md", model_card(manifest, agent, evaluation, repo, license))


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the name of its bundle's folder in the place of the path."""
    bundle = config.get("bundle")
    return {**config, "bundle": None if bundle is None else Path(bundle).name}


def pull(repo: str, out: Path, *, revision: str | None = None, bundle: str | None = None) -> Path:
    """Fetch a published run and load it once, before it is put in place.

    Args:
        repo: ``USER/NAME`` on the Hub.
        out: Folder of the run; must not be there.
        revision: Branch, tag or commit; None for the main branch.
        bundle: Folder of the bundle that it was trained on; None for the shipped one.

    Returns:
        The folder.

    Raises:
        ValueError: If ``out`` is there, the repository is not found or holds no run, or the run does not load.
        ConnectionError: If the Hub is not reached.
    """
    from huggingface_hub import HfApi, hf_hub_download

    _check_repo(repo)
    with _new_folder(out) as folder:
        with _readable_errors(repo, revision), tempfile.TemporaryDirectory() as temporary:
            info = HfApi(library_name="dsa-gym").model_info(repo, revision=revision)
            there = {entry.rfilename for entry in info.siblings or ()}
            missing = [name for name in REQUIRED if name not in there]
            if missing:
                raise ValueError(f"repo={repo!r}: not a run of dsa-gym: it has no {missing[0]}")
            for name in sorted(there.intersection(FILES)):
                hf_hub_download(repo, name, revision=info.sha, local_dir=temporary, cache_dir=temporary)
                shutil.copyfile(Path(temporary) / name, folder / name)
        _check_pulled(folder, repo, {"repo": repo, "commit": info.sha}, bundle)
    return Path(out)


def _check_pulled(folder: Path, repo: str, source: Mapping[str, Any], bundle: str | None) -> None:
    """Load what was fetched, with the bundle that is here.

    Raises:
        ValueError: If it does not load.
    """
    agent, manifest = storage.read_json(folder / "agent.json"), read_manifest(folder)
    keys = {"agent", "seed", "gates", "config", "steps"}
    if not isinstance(agent, dict) or not keys <= agent.keys():
        raise ValueError(f"repo={repo!r}: agent.json is not an agent's; expected the keys {', '.join(sorted(keys))}")
    trained_on = manifest["config"].get("bundle")
    if trained_on is not None and bundle is None:
        raise ValueError(f"repo={repo!r}: was trained on the bundle {str(trained_on)!r}; give its folder as bundle")
    manifest["config"]["bundle"] = None if bundle is None else str(Path(bundle).resolve())
    storage.write_json(folder / "run.json", {**manifest, "source": dict(source)})
    try:
        load_run(folder)
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:  # well-formed files that hold something else
        raise ValueError(f"repo={repo!r}: its agent cannot be loaded ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"repo={repo!r}: {str(error).replace(str(folder), repo)}") from error


def _check_repo(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"repo={repo!r}: expected USER/NAME")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its place when the block ends well.

    Raises:
        ValueError: If there is something at ``path``.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already; give a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=storage.TEMPORARY_PREFIX) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        os.rename(folder, path)


@contextmanager
def _readable_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Say in our words what went wrong between here and the Hub."""
    from huggingface_hub import constants, errors

    # of the HTTP library, which is not the same in all versions
    transport = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        yield
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{constants.ENDPOINT} is not reached: offline, or HF_HUB_OFFLINE is set") from error
    except errors.RepositoryNotFoundError as error:
        hint = "not found, or private: log in by 'hf auth login' or set HF_TOKEN"
        raise ValueError(f"repo={repo!r}: {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"revision={revision!r}: {repo} has no such branch, tag or commit") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; log in by 'hf auth login' or set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise ValueError(f"repo={repo!r}: {constants.ENDPOINT} refuses with status {status}{hint}") from error
    except transport as error:
        raise ConnectionError(f"{constants.ENDPOINT} is not reached: {error}") from error


def model_card(
    manifest: Mapping[str, Any], agent: Agent, evaluation: Mapping[str, Any] | None, repo: str, license: str
) -> str:
    """The model card of a run, Markdown with the Hub's YAML in front.

    Args:
        manifest: The run's ``run.json``, as it is published.
        agent: The run's agent.
        evaluation: What ``dsa-gym evaluate`` says of this run; None if it was not evaluated.
        repo: ``USER/NAME``.
        license: As the Hub spells it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    config, scores = manifest["config"], manifest["scores"]
    split = "validation" if evaluation is None else evaluation["split"]
    score = scores["unseen/normalized_score"] if evaluation is None else evaluation["normalized_score"]["mean"]
    data = ModelCardData(
        library_name="dsa-gym",
        license=license,
        pipeline_tag="reinforcement-learning",
        tags=["reinforcement-learning", "dsa-gym", config["env"], agent.name],
        model_name=f"{agent.name} on {config['env']}",
        eval_results=[
            EvalResult(
                task_type="reinforcement-learning",
                task_name="reinforcement-learning",
                dataset_type=config["env"],
                dataset_name=f"{config['env']}, {split} users",
                metric_type="normalized_score",
                metric_name="normalised score",
                metric_value=round(float(score), 4),
            )
        ],
    )
    checksum = getattr(getattr(agent.scorer, "bundle", None), "checksum", None)
    bundle = "a planted instance, drawn from the settings below" if checksum is None else f"bundle `{checksum}`"
    asked = {name: value for name, value in config.items() if name != "settings" and value not in (None, {})}
    return f"""---
{data.to_yaml()}
---

# {agent.name} on {config["env"]}

A gating policy of dsa-gym: it sees an embedding of the user and the context of the input, and decides which of
{agent.gates} gates of a library of sparse adapters are on. Trained for {agent.steps:,} steps with seed {config["seed"]}
on {bundle}.

```python
from dsa_gym.experiments.hub import pull
from dsa_gym.experiments.train import load_run
config, agent = load_run(pull("{repo}", "runs/{repo.rsplit("/", 1)[1]}"{_bundle_argument(config)}))
```

`agent.masks(config.problem("test"))` are its decisions for users it has never seen; `dsa-gym evaluate` judges them. The
files are safetensors and JSON: loading them runs no code.

## Evaluation

{_evaluation(evaluation, scores)}

The normalised score is 0 for the best fixed mask and 1 for the reference gate.

## Settings

```yaml
{yaml.safe_dump({"run": asked, "agent": config["settings"]}, sort_keys=False).rstrip()}
```

## Versions

{", ".join(f"{name} {version}" for name, version in manifest["versions"].items())}

## Limitations

Trained for one bundle only: its gates, users' embeddings and contexts mean nothing elsewhere, and loading refuses
another bundle than the one above. Scores are of this bundle's users; they do not tell of other people.
"""


def _bundle_argument(config: Mapping[str, Any]) -> str:
    return "" if config["bundle"] is None else f', bundle="FOLDER/{config["bundle"]}"'


def _evaluation(evaluation: Mapping[str, Any] | None, scores: Mapping[str, float]) -> str:
    """The ladder with intervals, or the scores at the end of training where the run was not evaluated."""
    if evaluation is None:
        lines = [
            "At the end of training, without intervals, on validation users, which settings may have been chosen on:"
        ]
        lines += ["", "| | new inputs of training users | validation users |", "|---|---|---|"]
        for name in ("reward", "normalized_score", "density"):
            lines.append(f"| {name} | {scores[f'seen/{name}']:.4f} | {scores[f'unseen/{name}']:.4f} |")
        return "\n".join(lines)
    parts = [part for part in (evaluation, evaluation.get("seen")) if part is not None]
    heads = [f"{part['split']} ({part['users']} users, {part['inputs']} inputs)" for part in parts]
    lines = [
        "Mean reward with 95 % intervals over users.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(parts) + 1) + "|",
    ]
    for name, label in RUNGS.items():
        if name in evaluation["ladder"]:
            cells = [_cell(part["ladder"].get(name)) for part in parts]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    lines.append(f"| **normalised score** | {' | '.join(_cell(part['normalized_score']) for part in parts)} |")
    lines.append(f"| density | {' | '.join(format(part['density'], '.3f') for part in parts)} |")
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
