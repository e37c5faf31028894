"""The built wheel: one top-level package, nothing missing, small, and usable far from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folder in the checkout -> folder in the wheel.
FOLDERS = {
    "dsa_gym": "dsa_gym",
    "envs": "dsa_gym/envs",
    "agents": "dsa_gym/agents",
    "experiments": "dsa_gym/experiments",
}
SHIPPED_SUFFIXES = {".py", ".safetensors", ".json", ".npy", ".parquet", ".md", ".yaml"}
MAX_WHEEL_BYTES = 30_000_000


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run this interpreter with the arguments, return its output; fail with the output if it fails."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: no old build/ gets in, no new one is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Paths of the files in the wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run(
        *("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"),
        *("--root-user-action", "ignore", "--target", str(target), str(wheel)),
        cwd=target,
    )
    return target


def test_one_top_level_package(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"dsa_gym"}


def test_holds_the_sources_and_their_data_and_nothing_else(names: set[str]) -> None:
    """A sub-package without its line in pyproject.toml, or data of an unknown kind, shows up here."""
    expected = {
        f"{packed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, packed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and (path.suffix in SHIPPED_SUFFIXES or path.name == "py.typed")
    }
    assert names == expected


@pytest.mark.parametrize("packed", ["dsa_gym/assets/", "dsa_gym/agents/zoo/"])
def test_shipped_assets_are_in(names: set[str], packed: str) -> None:
    assert any(name.startswith(packed) for name in names)


def test_is_typed_and_holds_the_licence(wheel: Path, names: set[str]) -> None:
    assert "dsa_gym/py.typed" in names
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_passes_check_wheel_contents(wheel: Path) -> None:
    assert "OK" in run("-m", "check_wheel_contents", "--no-config", str(wheel), cwd=wheel.parent)


def test_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        f"assert all(Path(entry).resolve() != Path({str(ROOT)!r}) for entry in sys.path), sys.path\n"
        "import gymnasium as gym, dsa_gym\n"
        "import dsa_gym.agents, dsa_gym.envs, dsa_gym.experiments\n"
        "for module in (dsa_gym, dsa_gym.agents, dsa_gym.envs, dsa_gym.experiments):\n"
        f"    assert Path(module.__file__).is_relative_to({str(installed)!r}), module.__file__\n"
        "env = gym.make('DSA-Text-v0')\n"
        "env.reset(seed=0)\n"
        "observation, reward, terminated, truncated, info = env.step(env.action_space.sample())\n"
        "env.close()\n"
        "print('reward', float(reward))\n"
    )
    assert "reward -" in run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))


def test_command_line_answers(installed: Path, tmp_path: Path) -> None:
    code = "import sys; from dsa_gym.experiments.cli import main; sys.argv = ['dsa-gym', '--help']; main()"
    assert "dsa-gym" in run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
