"""The headroom of a bundle: the ladder that prepare measured, at other prices and granularities."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from dsa_gym.bundle import Bundle
from dsa_gym.experiments.headroom import headroom, plot, show


def test_rows(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    result = headroom(bundle, prices=[0.0, 1.0, 8.0])
    assert [row["l0_penalty"] for row in result["rows"]] == [0.0, bundle.l0_penalty, 8 * bundle.l0_penalty]
    measured = bundle.manifest["headroom"]["test"]
    for rung in ("none", "all", "static", "reference", "oracle"):
        assert result["rows"][1]["ladder"][rung]["mean"] == pytest.approx(measured["ladder"][rung]["mean"])
    assert result["rows"][1]["headroom"] == pytest.approx(measured["headroom"])
    # what is on costs more the higher the price, what is off costs nothing
    none, everything = ([row["ladder"][rung]["mean"] for row in result["rows"]] for rung in ("none", "all"))
    assert none[0] == none[2] and everything[0] > everything[1] > everything[2]
    shown = Console(file=io.StringIO(), width=160)
    show(result, shown)
    assert "lambda" in shown.file.getvalue() and "exhaustive" in shown.file.getvalue()  # type: ignore[attr-defined]
    plot(result, tmp_path / "headroom.png")
    with Image.open(tmp_path / "headroom.png") as picture:
        assert picture.size[0] > 300


def test_finer_gates_are_searched(bundle_folder: Path) -> None:
    result = headroom(Bundle.open(bundle_folder), "validation", prices=[1.0], granularities=["pathway", "layer"])
    coarse, fine = result["rows"]
    assert (coarse["oracle_kind"], fine["oracle_kind"]) == ("exhaustive", "greedy lower bound")
    # the same gates of the reference, and a static mask that has more to choose from
    assert fine["ladder"]["reference"]["mean"] == pytest.approx(coarse["ladder"]["reference"]["mean"], abs=1e-3)


def test_bad_arguments(bundle_folder: Path) -> None:
    bundle = Bundle.open(bundle_folder)
    for prices in ([], [-1.0], [float("nan")]):
        with pytest.raises(ValueError, match="prices="):
            headroom(bundle, prices=prices)
    with pytest.raises(ValueError, match="granularities: 'atom', expected some of pathway, layer"):
        headroom(bundle, granularities=["atom"])
