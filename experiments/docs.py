"""Pages of the environments, written from their docstrings: spaces, a picture, and how much there is to gain."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from dsa_gym import storage
from dsa_gym.bundle import Bundle
from dsa_gym.envs import ENVIRONMENTS, Registration


def write_pages(out: Path, *, seed: int = 0) -> list[Path]:
    """Write one page for each kind of environment, with a picture, and an index.

    Args:
        out: Folder.
        seed: Seeds the episode that is drawn.

    Returns:
        The files.

    Raises:
        ValueError: If a page links to a file that is not there.
    """
    kinds: dict[str, list[str]] = {}
    for env_id, entry in ENVIRONMENTS.items():
        kinds.setdefault(entry.classes, []).append(env_id)
    written = []
    for classes, ids in kinds.items():
        name = classes.split(":")[0]
        storage.write_text(out / f"{name}.md", _page(classes, ids, out / f"{name}.png", seed))
        written += [out / f"{name}.md", out / f"{name}.png"]
    lines = ["# Environments", ""]
    for classes, ids in kinds.items():
        page = classes.split(":")[0]
        lines.append(f"- [{', '.join(ids)}]({page}.md): {_docstring(classes).splitlines()[0]}")
    storage.write_text(out / "README.md", "\n".join(lines) + "\n")
    written.append(out / "README.md")
    missing = [f"{page}: {link}" for page in written if page.suffix == ".md" for link in broken_links(page)]
    if missing:
        raise ValueError(f"links to what is not there: {'; '.join(missing)}")
    return written


def broken_links(page: Path) -> list[str]:
    """Relative links of a Markdown page to files that do not exist."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def _docstring(classes: str) -> str:
    module, prefix = classes.split(":")
    text = inspect.getdoc(getattr(import_module(f"dsa_gym.envs.{module}"), f"{prefix}Env"))
    assert text is not None, f"{prefix}Env has no page"
    return text


def _page(classes: str, ids: list[str], picture: Path, seed: int) -> str:
    title, _, body = _docstring(classes).partition("\n")
    env = gym.make(ids[0], render_mode="rgb_array")
    env.reset(seed=seed)
    env.action_space.seed(seed)
    ended = False
    while not ended:
        ended = bool(env.step(env.action_space.sample())[2])
    frame: Any = env.render()
    with storage.atomic_path(picture) as temporary:
        Image.fromarray(np.asarray(frame)).save(temporary, format="PNG")
    lines = [f"# {', '.join(ids)}", "", title, "", f"![One step]({picture.name})", ""]
    lines += [
        "| id | action space | observation space | headroom of the shipped bundle, unseen users |",
        "|---|---|---|---|",
    ]
    lines += [_row(env_id, ENVIRONMENTS[env_id]) for env_id in ids]
    return "\n".join(lines) + "\n" + body + "\n"


def _row(env_id: str, entry: Registration) -> str:
    env = gym.make(env_id)
    spaces = "; ".join(f"`{name}` {box.shape}" for name, box in env.observation_space.spaces.items())  # type: ignore[attr-defined]
    gain = "known exactly: see `regret`"
    if entry.domain is not None:
        record = Bundle.open(entry.domain, verify=False).manifest["headroom"]
        value = record["test"]["headroom"]
        gain = f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}] {record.get('unit', 'nats per token')}"
    return f"| `{env_id}` | `{env.action_space}` | {spaces} | {gain} |"
