"""Settings and fixtures shared by all tests."""

import importlib.util
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# Set before anything reads them: no network, no display, no forks that tokenizers would warn about.
# Subprocesses inherit all four; PYTHONSAFEPATH keeps them from importing the checkout's `dsa_gym/` in place
# of the installed package.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONSAFEPATH"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

from dsa_gym.adaptation import AdaptationConfig
from dsa_gym.data import read_images, read_interactions, read_texts
from dsa_gym.domains.image import ImageExample
from dsa_gym.domains.recommendation import RecommendationDomain
from dsa_gym.envs import ENVIRONMENTS
from dsa_gym.experiments.cli import main
from dsa_gym.generators.hands import HandConfig, write_hands
from dsa_gym.generators.personas import PersonaConfig, write_personas
from dsa_gym.generators.tastes import TasteConfig, write_tastes
from dsa_gym.library_training import LibraryTrainingConfig
from dsa_gym.population import SplitConfig
from dsa_gym.prepare import AdapterConfig, PrepareConfig, prepare
from dsa_gym.pretrain.image import ImagePretrainConfig, pretrain_image
from dsa_gym.pretrain.recommendation import RecommendationPretrainConfig, pretrain_recommendation

# The same examples in every run; a slow machine is not a failure.
hypothesis.settings.register_profile("dsa-gym", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("dsa-gym")


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("dsa_gym")
    return f"dsa_gym: {spec.origin if spec else 'not importable'}"


def pytest_collection() -> None:
    """Stop with a hint where the checkout's `dsa_gym/` hides the installed package (`python -m pytest`)."""
    try:
        distribution("dsa-gym")
    except PackageNotFoundError:
        return
    if importlib.util.find_spec("dsa_gym.envs") is None:
        raise pytest.UsageError(
            "dsa-gym is installed, but `dsa_gym` was imported from a folder without envs, agents and "
            "experiments. Run `make test`, or call `pytest` itself instead of `python -m pytest`."
        )


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with a fixed seed, new for every test."""
    return np.random.default_rng(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch CPU generator with a fixed seed, new for every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def persona_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Persona text of 16 users with 30 to 40 texts each."""
    path = tmp_path_factory.mktemp("data") / "personas.jsonl"
    write_personas(PersonaConfig(users=16, min_texts=30, max_texts=40, seed=5), path)
    return path


SMALL = PrepareConfig(
    splits=SplitConfig(validation=0.15, test=0.25, inputs={"train": 6, "seen": 4, "validation": 4, "test": 6}),
    adapter=AdapterConfig(rank=8, pathways=4),
    library=LibraryTrainingConfig(steps=12, users=4, support=2, query=4, validate_every=6),
    adaptation=AdaptationConfig(steps=3),
)
"""A preparation that takes seconds: shows that the machinery works, not that it pays."""


@pytest.fixture(scope="session")
def bundle_folder(persona_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle over the shipped backbone: 16 users, 4 pathways, losses under all 16 masks."""
    folder = tmp_path_factory.mktemp("bundle") / "small"
    raw = [(entry.user, entry.texts) for entry in read_texts([persona_file])]
    prepare("text", raw, folder, SMALL, data_files=[persona_file])
    return folder


@pytest.fixture(scope="session")
def recommendation_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of generated tastes over a tiny backbone, pre-trained for a few steps on other people."""
    folder = tmp_path_factory.mktemp("recommendation")
    files = {name: folder / f"{name}.csv" for name in ("others", "users")}
    for seed, (name, people) in enumerate({"others": 20, "users": 12}.items()):
        config = TasteConfig(users=people, items=60, genres=4, min_interactions=40, max_interactions=40, seed=seed)
        write_tastes(config, files[name])
    read = {name: read_interactions([file], user_core=1, item_core=1)[0] for name, file in files.items()}
    settings = RecommendationPretrainConfig(steps=4, width=16, window=16)
    pretrain_recommendation(read["others"], folder / "backbone", settings)
    domain = RecommendationDomain.build(str(folder / "backbone"), history=8, targets=2)
    raw = [(entry.user, domain.windows(entry.items, entry.times)) for entry in read["users"]]
    config = replace(SMALL, domain=domain.settings(), splits=replace(SMALL.splits, min_examples=5))
    backbone = str(folder / "backbone")
    prepare("recommendation", raw, folder / "small", config, backbone=backbone, data_files=[files["users"]])
    return folder / "small"


@pytest.fixture(scope="session")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of generated handwriting over a tiny backbone, pre-trained for a few steps on other hands."""
    folder = tmp_path_factory.mktemp("image")
    files = {name: folder / f"{name}.npz" for name in ("others", "users")}
    for seed, (name, people) in enumerate({"others": 12, "users": 12}.items()):
        write_hands(HandConfig(users=people, characters=12, per_user=12, size=16, seed=seed), files[name])
    read = {name: read_images(file, size=16)[0] for name, file in files.items()}
    settings = ImagePretrainConfig(steps=4, width=16, layers=2, heads=2, timesteps=100)
    pretrain_image(read["others"], folder / "backbone", settings)
    raw = [
        (entry.user, [ImageExample(*pair) for pair in zip(entry.images, entry.conditions, strict=True)])
        for entry in read["users"]
    ]
    config = replace(SMALL, splits=replace(SMALL.splits, min_examples=5))
    backbone = str(folder / "backbone")
    prepare("image", raw, folder / "small", config, backbone=backbone, data_files=[files["users"]])
    return folder / "small"


@pytest.fixture
def bundle_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The small bundle of the domain of an environment id, made when it is first asked for."""
    fixtures = {"text": "bundle_folder", "recommendation": "recommendation_bundle", "image": "image_bundle"}
    return lambda env_id: request.getfixturevalue(fixtures[ENVIRONMENTS[env_id].domain or ""])


@pytest.fixture(scope="session")
def start_command() -> Callable[..., ForkServerProcess]:
    """Starts ``dsa-gym ARGUMENTS`` in a process of its own, to be killed; the imports are paid for once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "dsa_gym.prepare",
            "dsa_gym.experiments.cli",
            "dsa_gym.experiments.train",
            "transformers.models.gpt2.modeling_gpt2",
        ]
    )

    def start(*arguments: object) -> ForkServerProcess:
        process = context.Process(target=main, args=([str(argument) for argument in arguments],), daemon=True)
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def kill_when() -> Callable[..., bool]:
    """Kills a process (SIGKILL) as soon as a condition holds; False if it ended before that."""

    def kill(process: ForkServerProcess, condition: Callable[[], bool], *, delay: float = 0.0) -> bool:
        until = time.monotonic() + 300
        while process.is_alive() and not condition():
            assert time.monotonic() < until, "the condition was not met in five minutes"
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    return kill
