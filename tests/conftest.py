"""Settings and fixtures shared by all tests."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, distribution

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
