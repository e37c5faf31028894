"""The text domain: what is encoded, what is scored, and what a gate may know before it decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dsa_gym.backbone import Backbone
from dsa_gym.domains import Examples, make_domain, rows_of, take, to_device
from dsa_gym.domains.text import TextDomain
from dsa_gym.model import AdaptedModel

TEXTS = [
    "river stone cloud amber quiet garden seven lantern winter music paper window ocean candle",
    "short",
    "too short",
    "",
    "été 用户 \N{PILE OF POO} unseen letters",
]


@pytest.fixture
def examples(domain: TextDomain) -> Examples:
    return domain.encode(TEXTS)[0]


def test_encode(domain: TextDomain) -> None:
    examples, kept = domain.encode(TEXTS)
    ids = [[0, *domain.tokenizer(text)["input_ids"]][:16] for text in TEXTS]
    long_enough = [i for i, row in enumerate(ids) if len(row) >= 9]
    assert kept.tolist() == long_enough
    assert 0 in long_enough
    assert 1 not in long_enough
    assert 3 not in long_enough
    assert kept.dtype == torch.int64
    assert examples["tokens"].shape == (len(kept), 16)
    assert examples["tokens"].dtype == examples["length"].dtype == torch.int32
    for row, index in enumerate(long_enough):
        length = int(examples["length"][row])
        assert examples["tokens"][row, :length].tolist() == ids[index]
        assert not examples["tokens"][row, length:].any()
    assert min(examples["length"]) < 16 == max(examples["length"])


def test_shortest_text_that_is_kept(domain: TextDomain) -> None:
    ids = domain.tokenizer(TEXTS[0])["input_ids"]
    for count, kept in ((7, 0), (8, 1)):
        text = domain.tokenizer.decode(ids[:count])
        assert domain.tokenizer(text)["input_ids"] == ids[:count]
        assert len(domain.encode([text])[1]) == kept


@pytest.mark.parametrize("texts", [[], ["a"], ["", " "]])
def test_nothing_to_encode(domain: TextDomain, texts: list[str]) -> None:
    examples, kept = domain.encode(texts)
    assert examples["tokens"].shape == (0, 16)
    assert examples["length"].shape == kept.shape == (0,)


def models() -> list[torch.nn.Module]:
    llama = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
    )
    gpt2 = GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [LlamaForCausalLM(llama).eval(), GPT2LMHeadModel(gpt2).eval()]


@torch.no_grad()
def test_loss_is_that_of_hugging_face(domain: TextDomain, examples: Examples) -> None:
    """Mean cross-entropy with labels of -100 on the prefix and behind the end."""
    for model in models():
        losses = domain.losses(model, examples)
        for row in range(rows_of(examples)):
            tokens = examples["tokens"][row : row + 1].long()
            labels = tokens.clone()
            labels[:, : domain.prefix_tokens] = -100
            labels[:, int(examples["length"][row]) :] = -100
            wanted = model(input_ids=tokens, labels=labels).loss
            torch.testing.assert_close(losses[row], wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_parts_are_even_and_odd_scored_tokens(domain: TextDomain, examples: Examples) -> None:
    model = models()[0]
    parts = domain.losses(model, examples, parts=True)
    torch.testing.assert_close(parts.sum(1), domain.losses(model, examples))
    for row in range(rows_of(examples)):
        tokens, length = examples["tokens"][row : row + 1].long(), int(examples["length"][row])
        logp = model(input_ids=tokens).logits[0].log_softmax(-1)
        scored = [-float(logp[t - 1, tokens[0, t]]) for t in range(domain.prefix_tokens, length)]
        wanted = torch.tensor([sum(scored[0::2]), sum(scored[1::2])]) / len(scored)
        torch.testing.assert_close(parts[row], wanted, rtol=0, atol=1e-5)


def test_padding_is_not_scored(domain: TextDomain, examples: Examples) -> None:
    model = models()[0]
    changed = {name: value.clone() for name, value in examples.items()}
    for row in range(rows_of(examples)):
        changed["tokens"][row, int(examples["length"][row]) :] = 77
    with torch.no_grad():
        assert torch.equal(domain.losses(model, examples), domain.losses(model, changed))
        torch.testing.assert_close(
            domain.features(model, examples, context=False), domain.features(model, changed, context=False)
        )


def test_context_does_not_know_the_continuation(tiny: AdaptedModel, examples: Examples) -> None:
    changed = {name: value.clone() for name, value in examples.items()}
    changed["tokens"][:, 5:] = (changed["tokens"][:, 5:] + 100) % 300
    changed["length"] = 9 + torch.arange(rows_of(examples), dtype=torch.int32) % 8
    context = tiny.features(examples, context=True)
    assert torch.equal(tiny.features(changed, context=True), context)
    assert not torch.equal(tiny.features(changed, context=False), tiny.features(examples, context=False))
    # while the prefix is seen to its last token
    changed["tokens"][:, 4] = (changed["tokens"][:, 4] + 1) % 300
    assert (tiny.features(changed, context=True) != context).any(1).all()


def test_features_are_means_of_hidden_states(tiny: AdaptedModel, examples: Examples) -> None:
    with torch.no_grad():
        row = take(examples, torch.tensor([1]))
        tokens, length = row["tokens"].long(), int(row["length"])
        states = tiny.backbone.model(input_ids=tokens, output_hidden_states=True).hidden_states
    middle, last = states[1][0], states[2][0]
    whole = torch.cat([middle[1:length].mean(0), last[1:length].mean(0)])
    torch.testing.assert_close(tiny.features(row, context=False)[0], whole, rtol=1e-4, atol=1e-5)
    prefix = torch.cat([middle[1:5].mean(0), last[1:5].mean(0), last[4]])
    torch.testing.assert_close(tiny.features(row, context=True)[0], prefix, rtol=1e-4, atol=1e-5)


def test_describe(domain: TextDomain, examples: Examples) -> None:
    for row, text in ((0, TEXTS[0]), (1, TEXTS[2])):
        parts = domain.describe(examples, row)
        assert list(parts) == ["prompt", "continuation"]
        assert parts["prompt"]
        whole = parts["prompt"] + parts["continuation"]
        assert text.startswith(whole)
        assert len(whole) < len(text) or int(examples["length"][row]) < 16


def test_settings_make_the_same_domain(domain: TextDomain, backbone_folder: Path) -> None:
    again = make_domain("text", domain.settings(), backbone_source=str(backbone_folder))
    assert isinstance(again, TextDomain)
    assert again.settings() == domain.settings() == {"max_tokens": 16, "prefix_tokens": 5, "min_target": 4}
    assert torch.equal(again.encode(TEXTS)[0]["tokens"], domain.encode(TEXTS)[0]["tokens"])


def test_unknown_domain(backbone_folder: Path) -> None:
    with pytest.raises(ValueError, match="domain='smell': expected one of image, recommendation, text"):
        make_domain("smell", {}, backbone_source=str(backbone_folder))


def test_no_causal_language_model(domain: TextDomain) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    with pytest.raises(ValueError, match="backbone='b': BertForMaskedLM is no causal language model"):
        domain.check(Backbone(bert, source="b"))


def test_window(domain: TextDomain, examples: Examples) -> None:
    """A window that is accepted serves losses and features; one token less is refused."""
    for window, fits in ((16, True), (15, False)):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=window, n_embd=16, n_layer=1, n_head=2))
        backbone = Backbone(model)
        if not fits:
            with pytest.raises(ValueError, match="max_tokens=16: the backbone's window has 15 positions"):
                domain.check(backbone)
            continue
        domain.check(backbone)
        assert domain.losses(backbone.model, examples).shape == (rows_of(examples),)
        assert len(domain.features(backbone.model, examples, context=False)) == rows_of(examples)


@pytest.mark.parametrize(
    "lengths",
    [
        {"prefix_tokens": 1},
        {"min_target": 0},
        {"max_tokens": 12, "prefix_tokens": 10, "min_target": 4},
    ],
)
def test_lengths_that_do_not_fit(domain: TextDomain, lengths: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_tokens=\d+, prefix_tokens=\d+, min_target=\d+: expected"):
        TextDomain(domain.tokenizer, **lengths)


def test_tokenizer_without_a_begin(domain: TextDomain, backbone_folder: Path) -> None:
    bare = TextDomain.build(str(backbone_folder))
    bare.tokenizer.bos_token = None
    assert bare.encode(TEXTS)[0]["tokens"][0, 0] == 0
    bare.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: has neither a begin-of-text nor an end-of-text token"):
        bare.encode(TEXTS)


def test_to_device(examples: Examples) -> None:
    moved = to_device(examples, "cpu")
    assert moved.keys() == examples.keys()
    assert torch.equal(moved["tokens"], examples["tokens"])


@pytest.mark.parametrize("keeps", [True, False], ids=["keys and values kept", "none kept"])
def test_continuations_are_greedy(domain: TextDomain, examples: Examples, backbone_folder: Path, keeps: bool) -> None:
    gpt2 = Backbone.load(backbone_folder).model

    def model(past_key_values: object, use_cache: bool, **inputs: object) -> object:
        return gpt2(past_key_values=past_key_values, use_cache=keeps, **inputs)  # type: ignore[operator]

    written = domain._continuations(model, examples)  # type: ignore[arg-type]
    for row, text in enumerate(written):
        tokens = examples["tokens"][row, : domain.prefix_tokens].long()[None]
        while tokens.shape[1] < int(examples["length"][row]):
            logits = gpt2(input_ids=tokens).logits[:, -1]  # type: ignore[operator]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        assert text == domain.tokenizer.decode(tokens[0, domain.prefix_tokens :], skip_special_tokens=True)
