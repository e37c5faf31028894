import math
import sys
from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from dsa_gym.metrics import bleu, perplexity, rouge, sentence_bleu

# the examples of sacrebleu's documentation, here with the references beside their hypothesis
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]
FOX = "The quick brown fox jumps over the lazy dog"
LOG = "The quick brown dog jumps on the log."

WORDS = st.lists(st.sampled_from(["a", "big", "cat", "sat", "on", "mat"]), min_size=1, max_size=12).map(" ".join)
Metric = Callable[[Sequence[str], Sequence[str | Sequence[str]]], object]


def test_bleu_of_the_documented_example() -> None:
    result = bleu(SYSTEM, REFERENCES)
    assert result.value == pytest.approx(48.53, abs=0.005)
    assert result.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert str(result) == f"BLEU|{result.signature} = 48.53"


@pytest.mark.parametrize("first", [["The dog had bit the man."], "The dog had bit the man."])
def test_bleu_of_the_documented_example_with_a_varying_number_of_references(first: str | list[str]) -> None:
    result = bleu(SYSTEM, [first, *REFERENCES[1:]])
    assert result.value == pytest.approx(29.44, abs=0.005)
    assert result.signature.startswith("nrefs:var|")


def test_sentence_bleu_of_worked_values() -> None:
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples, one word short of the reference
    score = 100 * math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert sentence_bleu(["the cat sat on a mat"], ["the cat sat on the mat the"]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("smoothing", "stand_ins"),
    # precisions of orders 2 to 4, whose totals are 3, 2 and 1, without a match
    [("exp", (1 / 6, 1 / 8, 1 / 8)), ("floor", (0.1 / 3, 0.1 / 2, 0.1)), ("add-k", (1 / 4, 1 / 3, 1 / 2))],
)
def test_sentence_bleu_smooths_orders_without_a_match(smoothing: str, stand_ins: tuple[float, ...]) -> None:
    score = sentence_bleu(["a x b y"], ["a b c d"], smoothing=smoothing)
    assert score == pytest.approx(100 * (1 / 2 * math.prod(stand_ins)) ** (1 / 4))


@pytest.mark.parametrize(
    ("kind", "expected"),
    # 6 of the 8 and 9 words are shared and 5 in order; of the 7 and 8 pairs, "the quick" and "quick brown" are
    [("rouge1", 12 / 17), ("rouge2", 4 / 15), ("rougeL", 10 / 17), ("rougeLsum", 10 / 17)],
)
def test_rouge_of_the_documented_example(kind: str, expected: float) -> None:
    assert rouge([LOG], [FOX], kind, use_stemmer=True) == pytest.approx(expected)


def test_rouge_stems_only_when_asked() -> None:
    assert rouge(["jumping foxes"], ["jumps foxes"], "rouge1") == pytest.approx(0.5)
    assert rouge(["jumping foxes"], ["jumps foxes"], "rouge1", use_stemmer=True) == pytest.approx(1)


def test_the_best_of_several_references_counts() -> None:
    assert rouge(["a cat", "a dog"], [["a dog", "a cat"], "a cat"]).tolist() == pytest.approx([1, 0.5])
    assert sentence_bleu(["a cat"], [["a dog", "a cat"]]) == pytest.approx(100)


@given(text=WORDS, other=WORDS)
def test_identical_texts_score_highest(text: str, other: str) -> None:
    assert sentence_bleu([text, text], [text, other])[0] == pytest.approx(100)
    assert rouge([text], [text]) == pytest.approx(1)
    assert 0 <= sentence_bleu([text], [other])[0] <= 100 + 1e-9
    assert 0 <= rouge([text], [other])[0] <= 1
    assert bleu([f"{text} and four more words"], [f"{text} and four more words"]).value == pytest.approx(100)


@pytest.mark.parametrize(("hypothesis", "reference"), [("", "some words"), ("some words", ""), ("", ""), ("a", "b")])
def test_nothing_in_common_scores_zero(hypothesis: str, reference: str) -> None:
    assert bleu([hypothesis], [reference]).value == 0
    assert sentence_bleu([hypothesis], [reference]).tolist() == [0]
    for kind in ("rouge1", "rougeL", "rougeLsum"):
        assert rouge([hypothesis], [reference], kind).tolist() == [0]


def test_scores_are_one_float_per_example() -> None:
    for scores in (sentence_bleu(SYSTEM, REFERENCES), rouge(SYSTEM, REFERENCES)):
        assert scores.shape == (3,)
        assert scores.dtype == np.float64
        assert scores[0] > scores[1]


@pytest.mark.parametrize("metric", [bleu, sentence_bleu, rouge])
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "at least 1, got 0 and 0"),
        (["a"], ["a", "b"], "got 1 and 2"),
        ("a", ["a"], "hypotheses: expected a list of texts, got the single text 'a'"),
        (["a"], "a", "references: expected a list of texts, got the single text 'a'"),
        (["a", None], ["a", "b"], "hypotheses: expected text in row 1, got NoneType"),
        (["a", "b"], ["a", []], r"references: .* in row 1, got \[\]"),
        (["a"], [["a", 3]], r"references: .* in row 0, got \['a', 3\]"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    metric: Metric, hypotheses: Sequence[str], references: Sequence[str | Sequence[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="smoothing='more': expected one of exp, floor, add-k, none"):
        sentence_bleu(["a"], ["a"], smoothing="more")
    with pytest.raises(ValueError, match="kind='rouge': expected rouge1 to rouge9, rougeL or rougeLsum"):
        rouge(["a"], ["a"], "rouge")


@pytest.mark.parametrize(
    ("metric", "module", "library"),
    [
        (bleu, "sacrebleu", "sacrebleu"),
        (sentence_bleu, "sacrebleu", "sacrebleu"),
        (rouge, "rouge_score.rouge_scorer", "rouge-score"),
    ],
)
def test_a_missing_library_is_named(metric: Metric, module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{metric.__name__} needs {library}: pip install "dsa-gym\[metrics\]"'):
        metric(["a"], ["a"])


def test_perplexity_weighs_examples_by_their_tokens() -> None:
    assert perplexity(torch.tensor([math.log(2), math.log(8)]), torch.tensor([3, 1])) == pytest.approx(2**1.5)
    assert perplexity(torch.tensor([math.log(50)] * 4), torch.tensor([1, 2, 3, 4])) == pytest.approx(50)
    assert perplexity(torch.tensor([1e4]), torch.tensor([1])) == math.inf


@given(
    nll=st.lists(st.floats(0, 10), min_size=2, max_size=20),
    cut=st.integers(1, 19),
)
def test_perplexity_does_not_depend_on_how_a_corpus_is_cut(nll: list[float], cut: int) -> None:
    each = torch.tensor(nll, dtype=torch.float64)
    cut = min(cut, len(nll) - 1)
    parts = torch.stack([each[:cut].mean(), each[cut:].mean()])
    whole = perplexity(each, torch.ones(len(nll)))
    assert perplexity(parts, torch.tensor([cut, len(nll) - cut])) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("nll", "tokens", "message"),
    [
        ([], [], r"got \(0,\) and \(0,\)"),
        ([1.0], [1, 2], r"got \(1,\) and \(2,\)"),
        ([[1.0]], [[1]], r"got \(1, 1\)"),
        ([math.nan, 1.0], [1, 1], "mean_nll: expected finite numbers, got nan"),
        ([1.0, 1.0], [1, 0], "tokens: expected numbers of tokens from 1, got 0"),
        ([1.0], [math.inf], "tokens: .*got inf"),
    ],
)
def test_perplexity_refuses(nll: list[float], tokens: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(torch.tensor(nll), torch.tensor(tokens))
