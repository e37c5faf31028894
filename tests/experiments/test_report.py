"""The report: one page that needs nothing else, the same as Markdown, and what it must say."""

from __future__ import annotations

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dsa_gym import storage
from dsa_gym.experiments.cli import main
from dsa_gym.experiments.document import Fold, Page, Table, cell
from dsa_gym.experiments.report import report
from dsa_gym.experiments.rows import read_row, read_users, write_rows, write_table


class Balanced(HTMLParser):
    """Notes links and pictures, and that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small comparison as two environments, with a failed cell, and its report."""
    out = Path(shutil.copytree(comparison, tmp_path_factory.mktemp("report") / "comparison"))
    grid = storage.read_json(out / "grid.json")
    first = "DSA-TextTable-v0"
    grid["envs"]["DSA-Text-v0"] = grid["envs"][first]
    storage.write_json(out / "grid.json", grid)
    shutil.copytree(out / "cells" / first, out / "cells" / "DSA-Text-v0")
    for path in out.glob("cells/DSA-Text-v0/*/*/row.json"):
        storage.write_json(path, {**storage.read_json(path), "env": "DSA-Text-v0"})
    broken = out / "cells" / first / "rloo" / "seed1"
    (broken / "row.json").unlink()
    storage.write_text(broken / "error.txt", "Traceback\nFloatingPointError: <weights> & more\n")
    write_rows(out, sorted(path.parent for path in out.glob("cells/*/*/*/row.json")))
    assert report(out) == out / "report.html"
    return out


def test_the_page_needs_nothing_else(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text.removeprefix("<!doctype html>"))
    assert parser.open == []
    assert len(parser.sources) > 6
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in parser.sources)
    assert not re.search(r"https?://|@import|<script", text)
    for source in parser.sources:
        if source.startswith("data:"):
            assert base64.b64decode(source.split(",")[1])[:4] == b"\x89PNG"
        else:
            assert f'id="{source[1:]}"' in text


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_what_it_says(written: Path, name: str) -> None:
    text = (written / name).read_text(encoding="utf-8")
    for said in (
        "Agents: 2. Environments: 2. Seeds: 2. Cells: 8, of which finished 7, failed 1.",
        "All environments together",
        "can't be concluded" if name.endswith("md") else "can&#x27;t be concluded",
        "fewer than 3 seeds",
        "--retry-failed",
        "DSA-TextTable-v0/rloo/seed1",
        "FloatingPointError",
        f"numpy {storage.versions()['numpy']}",
        "dsa-gym train --env DSA-TextTable-v0 --agent static --seed 0",
        "probability of improvement",
    ):
        assert said in text
    row = read_row(written / "cells/DSA-TextTable-v0/rloo/seed0")
    assert row["fingerprint"][:12] in text
    assert f"{row['unseen']['reward']:.4f}" in text  # the one seed that is left is the mean


def test_markdown_pictures(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    names = re.findall(r"\]\((.+\.png)\)", text)
    assert len(names) == 8
    for name in names:
        with Image.open(written / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10  # type: ignore[arg-type]


def test_agents_are_sorted(written: Path) -> None:
    users = pd.read_parquet(written / "users.parquet")
    own = users[(users["env"] == "DSA-Text-v0") & (users["part"] == "unseen")]
    means = own.assign(total=own["reward"] * own["inputs"]).groupby("agent")[["total", "inputs"]].sum()
    order = (means["total"] / means["inputs"]).sort_values(ascending=False).index.tolist()
    text = (written / "report.md").read_text(encoding="utf-8")
    section = text.split("### DSA-Text-v0: users never seen")[1]
    assert re.findall(r"^\| (rloo|static) \|", section, re.MULTILINE)[:2] == order


def test_command(comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(comparison, tmp_path / "comparison"))
    assert main(["report", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out.replace("\n", "")
    assert main(["report", str(tmp_path)]) == 2
    assert "no grid.json there" in capsys.readouterr().err
    shutil.rmtree(out / "cells")
    assert main(["report", str(out)]) == 2
    assert "no cell is finished" in capsys.readouterr().err


def test_one_agent_and_no_headroom(comparison: Path, tmp_path: Path) -> None:
    """Nothing to compare with, and a reference gate that is below the best static mask: rewards stand for scores."""
    out = Path(shutil.copytree(comparison, tmp_path / "comparison"))
    shutil.rmtree(out / "cells" / "DSA-TextTable-v0" / "static")
    storage.write_json(out / "grid.json", storage.read_json(out / "grid.json") | {"agents": {"rloo": {}}})
    runs = sorted(path.parent for path in out.glob("cells/*/*/*/row.json"))
    for run in runs:
        users = read_users(run)
        write_table(run / "users.parquet", users.assign(reference=users["static"] - 0.1))
    write_rows(out, runs)
    report(out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "The reference gate is not above the best static mask" in text
    assert "mean gain" in text
    assert "the best agent against the others" not in text


def test_a_document() -> None:
    page = Page("A & B")
    page.section(2, "Part <1>").extend(
        ["x < y", ["one", "two"], Table(["name", "n"], [["a|b", "1"]]), Fold("more", "z")]
    )
    assert page.markdown() == (
        "# A & B\n\n## Part <1>\n\nx < y\n\n- one\n- two\n\n| name | n |\n| --- | ---: |\n| a\\|b | 1 |\n\n"
        "**more**\n\n    z\n"
    )
    text = page.html()
    assert "<h1>A &amp; B</h1>" in text
    assert '<h2 id="s0">Part &lt;1&gt;</h2>' in text
    assert "<td>a|b</td><td>1</td>" in text
    assert cell({"mean": 1, "low": 0.5, "high": 2}, 1) == "1.0 [0.5, 2.0]"
