"""A small world for the tests: a random GPT-2 with its tokenizer, users who differ, an adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dsa_gym.backbone import Backbone
from dsa_gym.domains.text import TextDomain
from dsa_gym.model import AdaptedModel
from dsa_gym.observations import fit_projection
from dsa_gym.pathways import AdapterShape
from dsa_gym.population import Population, SplitConfig, encode_population
from dsa_gym.pretrain.text import train_tokenizer
from dsa_gym.problem import GatingProblem

WORDS = [
    "river",
    "stone",
    "cloud",
    "amber",
    "quiet",
    "garden",
    "seven",
    "lantern",
    "winter",
    "music",
    "paper",
    "window",
    "ocean",
    "candle",
    "forest",
]


def user_texts(user: int, count: int = 10, words: int = 12) -> list[str]:
    """Texts of a user who prefers some words to others."""
    draw = np.random.default_rng(user)
    weights = draw.dirichlet(np.full(len(WORDS), 0.3))
    return [" ".join(draw.choice(WORDS, size=words, p=weights)) for _ in range(count)]


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a GPT-2 of two layers of width 16 and a byte-level BPE tokenizer."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = train_tokenizer([" ".join(WORDS), *user_texts(0, 40)], 300)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=300,
                n_positions=24,
                n_embd=16,
                n_layer=2,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                # large enough that hidden states, and so adapters, move the logits
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def domain(backbone_folder: Path) -> TextDomain:
    return TextDomain.build(str(backbone_folder), max_tokens=16, prefix_tokens=5, min_target=4)


@pytest.fixture
def tiny(backbone_folder: Path, domain: TextDomain) -> AdaptedModel:
    """An adapted model with four sites, rank 4 in two pathways, and no dropout."""
    backbone = Backbone.load(backbone_folder)
    return AdaptedModel(backbone, domain, AdapterShape(backbone.sites, rank=4, pathways=2, dropout=0.0))


@pytest.fixture(scope="session")
def population(domain: TextDomain) -> Population:
    """Eight users of ten texts each: five train, one validates, two test."""
    raw = [(f"user{i}", user_texts(i)) for i in range(8)]
    config = SplitConfig(validation=0.15, test=0.25, min_examples=5)
    return encode_population(raw, domain, config)[0]


@pytest.fixture
def observed(tiny: AdaptedModel, population: Population) -> tuple[torch.Tensor, torch.Tensor]:
    """Whitened observations of all users (users, 3) and of all examples (N, 4)."""
    whole = tiny.features(population.examples, context=False)
    context = tiny.features(population.examples, context=True)
    of_user = torch.stack([whole[population.rows(u, "support")].mean(0) for u in range(len(population.users))])
    return fit_projection(of_user, 3)(of_user), fit_projection(context, 4)(context)


class TableProblem(GatingProblem):
    """A gating problem whose losses (n, 2^G) are given, or (n, 2^G, 2) as shares of even and odd elements.

    Every gate switches 100 parameters. It is its own support unless another problem is given.
    """

    reward_metric = None

    def __init__(
        self,
        losses: np.ndarray,
        user: np.ndarray,
        *,
        l0_penalty: float = 0.0,
        reference: np.ndarray | None = None,
        support: GatingProblem | None = None,
        hidden: bool = False,
    ) -> None:
        halves = losses.ndim == 3
        self._losses = losses.sum(-1) if halves else losses
        gates = self._losses.shape[1].bit_length() - 1
        self.table = None if hidden else self._losses
        self.even_table = losses[..., 0] if halves else None
        self.space: Any = SimpleNamespace(gates=gates, granularity="test")
        self.user, self.l0_penalty = torch.from_numpy(user), l0_penalty
        self.rows = torch.arange(len(user))
        self.sizes = np.full(gates, 100.0)
        self._reference, self._support = reference, support
        self.cache_bytes = 0

    def compute_losses(self, inputs: Any, gates: Any, *, batch_size: int = 256) -> Any:
        return self._losses[inputs, gates.astype(np.int64) @ (1 << np.arange(self.gates))]

    def reference_gates(self) -> Any:
        assert self._reference is not None
        return self._reference

    def support(self) -> GatingProblem:
        return self._support or self


@pytest.fixture(scope="session")
def table_problem() -> Callable[..., GatingProblem]:
    """Makes a gating problem from a table of losses, see :class:`TableProblem`."""
    return TableProblem
