"""Configuration files: nested dataclasses, and errors that name file, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from dsa_gym.config import from_mapping, read_config
from dsa_gym.library_training import LibraryTrainingConfig
from dsa_gym.population import SplitConfig
from dsa_gym.pretrain.text import PretrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int = 1
    enabled: bool = False
    inner: Inner = field(default_factory=Inner)
    limit: float | None = 1.0
    layers: tuple[int, ...] | None = None
    counts: Mapping[str, int] | None = None
    free: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count}: expected a positive number")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nested_values(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name: été
        count: 3
        enabled: true
        inner: {rate: 2, mode: b}
        limit: null
        layers: [0, -1]
        counts: {train: 4}
        free: {x: [1, two], y: null}
        """,
    )
    config = read_config(path, Outer)
    assert config == Outer("été", 3, True, Inner(2.0, "b"), None, (0, -1), {"train": 4}, {"x": [1, "two"], "y": None})
    assert isinstance(config.inner.rate, float)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "inner: {mode: b}\nname: x"), Outer) == Outer("x", inner=Inner(mode="b"))
    assert read_config(write(tmp_path, ""), Inner) == Inner()
    assert read_config(write(tmp_path, "# nothing\n"), Inner) == Inner()


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5E2", 500.0), ("-2.5e+1", -25.0), ("1", 1.0)])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 reads `1e-3` as a string."""
    assert read_config(write(tmp_path, f"rate: {text}"), Inner).rate == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\ncuont: 3",
            r"run\.yaml: unknown setting 'cuont'; expected one of count, counts, enabled, free",
        ),
        ("name: x\ninner: {rat: 3}", r"run\.yaml: inner: unknown setting 'rat'; expected one of mode, rate"),
        ("name: x\n1: y\nz: 2", "unknown setting '?1"),
        ("count: 3", "setting 'name' is missing"),
        ("name: 7", "name=7: expected str"),
        ("name: x\ncount: 2.5", r"count=2\.5: expected int"),
        ("name: x\ncount: true", "count=True: expected int"),
        ("name: x\ncount: null", "count=None: expected int"),
        ("name: x\nenabled: 1", "enabled=1: expected bool"),
        ("name: x\ninner: {rate: fast}", r"run\.yaml: inner: rate='fast': expected float"),
        ("name: x\ninner: {rate: true}", "inner: rate=True: expected float"),
        ("name: x\ninner: {mode: c}", "inner: mode='c': expected .*Literal"),
        ("name: x\ninner: 3", "inner=3: expected Inner"),
        ("name: x\nlayers: 3", "layers=3: expected tuple"),
        ("name: x\nlayers: [0, top]", r"layers\[1\]='top': expected int"),
        ("name: x\ncounts: {train: many}", "counts: train='many': expected int"),
        ("name: x\ncount: -1", "count=-1: expected a positive number"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, text), Outer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2", "expected a mapping of settings, got list"),
        (b"hello", "expected a mapping of settings, got str"),
        (b"a: [1", "not readable as YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not readable as YAML"),
        (b"name: \xff\xfe\xfa", "not readable as YAML"),
    ],
)
def test_files_that_are_no_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_config(path, Outer)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(ValueError, match=r"config=.*: no such file"):
            read_config(path, Outer)


@pytest.mark.parametrize("kind", [LibraryTrainingConfig, SplitConfig, PretrainConfig])
def test_own_configurations_survive_a_round_trip(tmp_path: Path, kind: type) -> None:
    config = kind()
    path = write(tmp_path, yaml.safe_dump(asdict(config)))
    assert read_config(path, kind) == config


def test_own_configurations_name_wrong_values() -> None:
    with pytest.raises(ValueError, match="library: gate: active='2': expected int"):
        from_mapping(LibraryTrainingConfig, {"gate": {"active": "2"}}, where="library")
    with pytest.raises(ValueError, match="algorithm='MAML': expected"):
        from_mapping(LibraryTrainingConfig, {"algorithm": "MAML"})
    with pytest.raises(ValueError, match="inputs: train='x': expected int"):
        from_mapping(SplitConfig, {"inputs": {"train": "x"}})
