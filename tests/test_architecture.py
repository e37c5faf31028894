"""The import rules: `experiments -> agents, envs -> dsa_gym`, one way, and nothing stored with pickle.

The rules are read from the source with `ast`, so an import inside a function or under `TYPE_CHECKING`
counts too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("envs", "agents", "experiments")  # every other module of dsa_gym is the layer "dsa_gym"

FORBIDDEN = {
    "dsa_gym": (
        "dsa_gym.envs",
        "dsa_gym.agents",
        "dsa_gym.experiments",
        "gymnasium",
        "stable_baselines3",
        "sb3_contrib",
    ),
    "envs": ("dsa_gym.agents", "dsa_gym.experiments"),
    "agents": ("dsa_gym.envs", "dsa_gym.experiments"),
    "experiments": (),
}
# `import dsa_gym` registers the environments, so this one module may name them.
ALLOWED = {"dsa_gym": ("dsa_gym.envs", "gymnasium")}
# Names that only resolve in a checkout; the package calls them dsa_gym.envs and so on.
CHECKOUT_ONLY = (*LAYERS, "tests")

PICKLE_FREE_LAYERS = ("dsa_gym", "envs")
PICKLE_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
PICKLE_CALLS = (
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.serialization.save",
    "pandas.read_pickle",
)


def layer_of(module: str) -> str:
    """The layer of a module: `dsa_gym.envs.text` is in `envs`, `dsa_gym.masks` in `dsa_gym`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "dsa_gym"


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain, None for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else None
    return None


def is_import_call(node: ast.Call) -> bool:
    return (dotted(node.func) or "").split(".")[-1] in ("import_module", "__import__")


def imported_base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The absolute name of `from <this> import ...`, relative levels resolved."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    parents = package[: len(package) - (node.level - 1)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and possible absolute names of every import; `from a import b` may mean `a` or `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, (alias.name,)
        elif isinstance(node, ast.ImportFrom):
            base = imported_base(node, module, is_package)
            for alias in node.names:
                yield node.lineno, (base, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call):
            match node.args:
                case [ast.Constant(value=str(name)), *_] if is_import_call(node):
                    yield node.lineno, (name,)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the full name of what is called, import aliases resolved (`t.load` -> `torch.load`)."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            first, _, rest = name.partition(".")
            full = names.get(first, first)
            yield node, f"{full}.{rest}" if rest else full


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """All broken import rules of one module.

    Args:
        source: The module's text.
        module: Its name once installed, such as `dsa_gym.envs.text`.
        is_package: Whether the text is an `__init__.py`.

    Returns:
        One line per violation, empty if the module keeps the rules.
    """
    tree = ast.parse(source)
    layer = layer_of(module)
    found = []
    for line, names in imports(tree, module, is_package):
        for package in FORBIDDEN[layer]:
            if package not in ALLOWED.get(module, ()) and any(is_within(name, package) for name in names):
                found.append(f"{module}:{line}: {layer} imports {package}")
        for package in CHECKOUT_ONLY:
            if is_within(names[0], package):
                found.append(f"{module}:{line}: {package} is not importable once installed")
        for package in PICKLE_MODULES:
            if layer in PICKLE_FREE_LAYERS and is_within(names[0], package):
                found.append(f"{module}:{line}: {layer} imports {package}")
    for call, name in calls(tree):
        if layer not in PICKLE_FREE_LAYERS:
            break
        if name in PICKLE_CALLS or name.endswith(".to_pickle"):
            found.append(f"{module}:{call.lineno}: {layer} calls {name}")
        for keyword in call.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not is_false:
                found.append(f"{module}:{call.lineno}: {layer} calls {name} with allow_pickle")
    return found


def source_modules() -> dict[str, Path]:
    """Every module of the four folders, by the name it has once installed."""
    modules = {}
    for folder in ("dsa_gym", *LAYERS):
        prefix = ("dsa_gym",) if folder == "dsa_gym" else ("dsa_gym", folder)
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join((*prefix, *parts))] = path
    return modules


MODULES = source_modules()


def test_all_four_folders_are_looked_at() -> None:
    assert {"dsa_gym", "dsa_gym.envs", "dsa_gym.agents", "dsa_gym.experiments"} <= MODULES.keys()


def test_no_folder_shadows_a_layer() -> None:
    """`dsa_gym/envs/` in the checkout would collide with the installed `envs/`."""
    assert not [layer for layer in LAYERS if (ROOT / "dsa_gym" / layer).exists()]
    assert not [layer for layer in LAYERS if (ROOT / "dsa_gym" / f"{layer}.py").exists()]


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_the_import_rules(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


def test_importing_the_package_stays_light() -> None:
    """`import dsa_gym` registers environments; it loads neither agents nor the libraries they train with."""
    code = (
        "import sys, dsa_gym\n"
        "heavy = ('dsa_gym.agents', 'dsa_gym.experiments', 'stable_baselines3', 'transformers')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


PLANTED = [
    ("dsa_gym.masks", "import gymnasium as gym", "dsa_gym imports gymnasium"),
    ("dsa_gym.masks", "from gymnasium.spaces import Box", "dsa_gym imports gymnasium"),
    ("dsa_gym.masks", "import stable_baselines3.common", "dsa_gym imports stable_baselines3"),
    ("dsa_gym.masks", "from sb3_contrib import MaskablePPO", "dsa_gym imports sb3_contrib"),
    ("dsa_gym.masks", "from dsa_gym.envs.text import TextEnv", "dsa_gym imports dsa_gym.envs"),
    ("dsa_gym.masks", "from . import agents", "dsa_gym imports dsa_gym.agents"),
    ("dsa_gym.domains.text", "from ..experiments import cli", "dsa_gym imports dsa_gym.experiments"),
    ("dsa_gym.masks", "def f():\n    import dsa_gym.agents.ppo", "dsa_gym imports dsa_gym.agents"),
    (
        "dsa_gym.masks",
        "import importlib\nimportlib.import_module('dsa_gym.envs')",
        "dsa_gym imports dsa_gym.envs",
    ),
    ("dsa_gym.masks", "import pickle", "dsa_gym imports pickle"),
    ("dsa_gym.masks", "from pickle import loads", "dsa_gym imports pickle"),
    ("dsa_gym.masks", "import torch\ntorch.load('x')", "dsa_gym calls torch.load"),
    ("dsa_gym.masks", "import torch as t\nt.load('x', weights_only=True)", "dsa_gym calls torch.load"),
    ("dsa_gym.masks", "from torch import save\nsave(1, 'x')", "dsa_gym calls torch.save"),
    ("dsa_gym.masks", "import numpy as np\nnp.load('x', allow_pickle=True)", "with allow_pickle"),
    ("dsa_gym.masks", "import envs", "envs is not importable once installed"),
    ("dsa_gym.experiments.cli", "from agents.ppo import PPO", "agents is not importable once installed"),
    ("dsa_gym.experiments.cli", "from tests import conftest", "tests is not importable once installed"),
    ("dsa_gym.envs.text", "from dsa_gym.agents import ppo", "envs imports dsa_gym.agents"),
    ("dsa_gym.envs.text", "from dsa_gym import experiments", "envs imports dsa_gym.experiments"),
    ("dsa_gym.envs.text", "import cloudpickle", "envs imports cloudpickle"),
    ("dsa_gym.agents.ppo", "from dsa_gym.envs import registration", "agents imports dsa_gym.envs"),
    ("dsa_gym.agents.ppo", "from ..envs.text import TextEnv", "agents imports dsa_gym.envs"),
    ("dsa_gym.agents.ppo", "from dsa_gym.experiments.cli import main", "agents imports dsa_gym.experiments"),
]


@pytest.mark.parametrize(("module", "source", "message"), PLANTED)
def test_checker_finds_a_planted_violation(module: str, source: str, message: str) -> None:
    found = violations(source, module)
    assert found and message in found[0], found


@pytest.mark.parametrize("source", ["from .. import agents", "from ..experiments import cli"])
def test_checker_resolves_relative_imports_of_packages(source: str) -> None:
    assert violations(source, "dsa_gym.envs", is_package=True)


def test_root_module_may_register_but_not_train() -> None:
    assert violations("from dsa_gym.envs.registration import register", "dsa_gym", is_package=True) == []
    assert violations("import gymnasium", "dsa_gym", is_package=True) == []
    assert violations("from .agents import ppo", "dsa_gym", is_package=True)
    assert violations("import stable_baselines3", "dsa_gym", is_package=True)


ACCEPTED = [
    ("dsa_gym.masks", "from dsa_gym.pathways import PathwayLibrary\nimport torch\ntorch.zeros(1)"),
    ("dsa_gym.masks", "from . import pathways"),
    ("dsa_gym.masks", "entry_point = 'dsa_gym.envs.text:TextEnv'"),
    ("dsa_gym.masks", "import numpy as np\nnp.load('x', allow_pickle=False)"),
    ("dsa_gym.masks", "import json\njson.load(open('x'))"),
    ("dsa_gym.envs.text", "import gymnasium\nfrom stable_baselines3.common.vec_env import VecEnv"),
    ("dsa_gym.envs.text", "from dsa_gym.masks import expand\nfrom . import registration"),
    ("dsa_gym.agents.ppo", "import gymnasium, stable_baselines3\nfrom dsa_gym.masks import expand"),
    ("dsa_gym.experiments.cli", "from dsa_gym import agents, envs\nfrom dsa_gym.agents import ppo"),
]


@pytest.mark.parametrize(("module", "source"), ACCEPTED)
def test_checker_accepts_what_the_rules_allow(module: str, source: str) -> None:
    assert violations(source, module) == []
