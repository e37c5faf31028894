"""Text metrics: BLEU and ROUGE of generated text against references, and perplexity.

BLEU is sacrebleu's and ROUGE is rouge-score's, so that numbers compare with published ones; both libraries come with
``pip install "dsa-gym[metrics]"``. References are aligned with the hypotheses: one text, or several, for each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["BleuResult", "Smoothing", "bleu", "perplexity", "rouge", "sentence_bleu"]

Smoothing = Literal["exp", "floor", "add-k", "none"]
"""How n-gram precisions of 0 are smoothed; sacrebleu's names for the methods of Chen and Cherry (2014)."""

_ROUGE_KINDS = re.compile(r"rouge([1-9]|L|Lsum)")


@dataclass(frozen=True)
class BleuResult:
    """A corpus BLEU.

    Attributes:
        value: The score, 0 to 100.
        signature: sacrebleu's signature, without which a BLEU cannot be compared (Post, 2018).
    """

    value: float
    signature: str

    def __str__(self) -> str:
        return f"BLEU|{self.signature} = {self.value:.2f}"


def bleu(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> BleuResult:
    """Corpus BLEU (Papineni et al., 2002): n-gram counts are summed over all examples before they are divided.

    Args:
        hypotheses: Generated texts, not tokenized (rows,). An empty one has no n-grams and shortens the output.
        references: For each hypothesis its reference, or a list of at least one (rows,). An empty reference matches
            nothing.

    Returns:
        The score, 0 to 100, with its signature.

    Raises:
        ValueError: If the lengths differ, there is no example, or something is not text.
        ImportError: If sacrebleu is missing.
    """
    aligned = _aligned(hypotheses, references)
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise ImportError('bleu needs sacrebleu: pip install "dsa-gym[metrics]"') from error
    metric = BLEU()
    # sacrebleu wants one list per n-th reference; None where an example has fewer
    score = metric.corpus_score(list(hypotheses), [list(nth) for nth in zip_longest(*aligned)])
    return BleuResult(float(score.score), str(metric.get_signature()))


def sentence_bleu(
    hypotheses: Sequence[str], references: Sequence[str | Sequence[str]], *, smoothing: Smoothing = "exp"
) -> np.ndarray:
    """BLEU of each example by itself, smoothed.

    n-gram orders that the hypothesis is too short for are left out, so that a short text can reach 100. The mean over
    examples is not the corpus BLEU and should not be reported as one.

    Args:
        hypotheses: Generated texts (rows,). An empty one scores 0.
        references: See :func:`bleu`.
        smoothing: sacrebleu's method; ``"exp"`` halves the stand-in for every further order without a match,
            ``"floor"`` counts 0.1 matches.

    Returns:
        float64 (rows,), 0 to 100.

    Raises:
        ValueError: As :func:`bleu`, or if the smoothing is unknown.
        ImportError: If sacrebleu is missing.
    """
    if smoothing not in get_args(Smoothing):
        raise ValueError(f"smoothing={smoothing!r}: expected one of {', '.join(get_args(Smoothing))}")
    aligned = _aligned(hypotheses, references)
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise ImportError('sentence_bleu needs sacrebleu: pip install "dsa-gym[metrics]"') from error
    metric = BLEU(smooth_method=smoothing, effective_order=True)
    return np.array([metric.sentence_score(text, own).score for text, own in zip(hypotheses, aligned, strict=True)])


def rouge(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    kind: str = "rougeL",
    *,
    use_stemmer: bool = False,
) -> np.ndarray:
    """ROUGE F-measure of each example (Lin, 2004).

    As in the original Perl script, text is lower-cased and everything but the letters a to z and digits separates
    words: text in another script scores 0.

    Args:
        hypotheses: Generated texts (rows,). An empty one scores 0.
        references: See :func:`bleu`; of several, the one with the highest F-measure counts.
        kind: ``"rouge1"`` to ``"rouge9"`` for n-grams, ``"rougeL"`` for the longest common subsequence, ``"rougeLsum"``
            for the same with a sentence on each line.
        use_stemmer: Strip suffixes of words longer than three letters (Porter's algorithm) before comparing them.

    Returns:
        float64 (rows,) in [0, 1].

    Raises:
        ValueError: As :func:`bleu`, or if the kind is unknown.
        ImportError: If rouge-score is missing.
    """
    if not _ROUGE_KINDS.fullmatch(kind):
        raise ValueError(f"kind={kind!r}: expected rouge1 to rouge9, rougeL or rougeLsum")
    aligned = _aligned(hypotheses, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('rouge needs rouge-score: pip install "dsa-gym[metrics]"') from error
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    scores = (scorer.score_multi(own, text)[kind] for text, own in zip(hypotheses, aligned, strict=True))
    return np.array([score.fmeasure for score in scores], dtype=np.float64)


def perplexity(mean_nll: Tensor, tokens: Tensor) -> float:
    """Perplexity of a corpus: exp of the mean negative log-likelihood over all its tokens.

    Weighting by tokens makes it the same however the corpus is cut into examples.

    Args:
        mean_nll: Mean negative log-likelihood per token of each example, in nats, finite (rows,).
        tokens: Number of tokens that each mean is over, at least 1 (rows,).

    Returns:
        The perplexity, 1 or more; infinity if it is beyond a float.

    Raises:
        ValueError: If the shapes differ or are empty, or a value is out of range.
    """
    if mean_nll.dim() != 1 or not len(mean_nll) or tokens.shape != mean_nll.shape:
        raise ValueError(
            "mean_nll, tokens: expected two tensors of one shape (rows,) with at least one row, got "
            f"{tuple(mean_nll.shape)} and {tuple(tokens.shape)}"
        )
    nll, weights = mean_nll.double(), tokens.double()
    if not torch.isfinite(nll).all():
        raise ValueError(f"mean_nll: expected finite numbers, got {nll[~torch.isfinite(nll)][0].item()}")
    if not ((weights >= 1) & torch.isfinite(weights)).all():
        raise ValueError(f"tokens: expected numbers of tokens from 1, got {weights.min().item():g}")
    return float(((nll * weights).sum() / weights.sum()).exp())


def _aligned(hypotheses: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The references of each hypothesis as a list, after checking both."""
    for name, texts in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(texts, str):
            raise ValueError(f"{name}: expected a list of texts, got the single text {texts[:40]!r}")
    if not len(hypotheses) or len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses, references: expected as many of one as of the other, at least 1, got {len(hypotheses)} and "
            f"{len(references)}"
        )
    aligned = [[own] if isinstance(own, str) else list(own) for own in references]
    for row, (text, own) in enumerate(zip(hypotheses, aligned, strict=True)):
        if not isinstance(text, str):
            raise ValueError(f"hypotheses: expected text in row {row}, got {type(text).__name__}")
        if not own or not all(isinstance(reference, str) for reference in own):
            raise ValueError(f"references: expected a text or a list of at least one in row {row}, got {own!r}")
    return aligned
