"""Text generation: an example is a short text, its beginning is the context and its continuation is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsa_gym.backbone import Backbone, load_tokenizer
from dsa_gym.domains import Examples, cross_entropy
from dsa_gym.metrics.text import rouge, sentence_bleu


class TextDomain:
    """Next-token prediction of a text's continuation.

    Attributes:
        name: ``"text"``.
        max_tokens: Tokens kept of a text, the begin-of-text token included.
        prefix_tokens: Tokens, the begin-of-text token included, that are context and not scored.
    """

    name = "text"
    unit = "nats per token"
    l0_penalty = 1.5e-6  # everything of 65,536 parameters costs about 0.1 nats
    metrics = written_metrics = ("rougeL", "bleu")
    defaults: dict[str, Any] = {}

    def __init__(self, tokenizer: Any, *, max_tokens: int = 32, prefix_tokens: int = 10, min_target: int = 4) -> None:
        """Set the lengths.

        Args:
            tokenizer: A Hugging Face tokenizer.
            max_tokens: See the class.
            prefix_tokens: See the class.
            min_target: Texts with fewer scored tokens than this are not used.

        Raises:
            ValueError: If the lengths do not fit each other.
        """
        if prefix_tokens < 2 or min_target < 1 or max_tokens < prefix_tokens + min_target:
            raise ValueError(
                f"max_tokens={max_tokens}, prefix_tokens={prefix_tokens}, min_target={min_target}: expected "
                "prefix_tokens >= 2, min_target >= 1 and max_tokens >= prefix_tokens + min_target"
            )
        self.tokenizer = tokenizer
        self.max_tokens, self.prefix_tokens, self.min_target = max_tokens, prefix_tokens, min_target

    @classmethod
    def build(cls, backbone_source: str, **settings: Any) -> TextDomain:
        """Make the domain with the tokenizer that belongs to a backbone."""
        return cls(load_tokenizer(backbone_source), **settings)

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, without the tokenizer."""
        return {
            "max_tokens": self.max_tokens,
            "prefix_tokens": self.prefix_tokens,
            "min_target": self.min_target,
        }

    def check(self, backbone: Backbone) -> None:
        """Refuse backbones that are not causal language models or whose window is too short.

        Raises:
            ValueError: With the reason.
        """
        if not getattr(backbone.model, "can_generate", lambda: False)():
            raise ValueError(
                f"backbone={backbone.source!r}: {type(backbone.model).__name__} is no causal language model, which the "
                "text domain needs (GPT-2, Llama, ...)"
            )
        # the loss does not read the last token, but the features of a whole text do
        window = getattr(backbone.config, "max_position_embeddings", self.max_tokens)
        if window < self.max_tokens:
            raise ValueError(f"max_tokens={self.max_tokens}: the backbone's window has {window} positions")

    def encode(self, raw: Sequence[str]) -> tuple[Examples, Tensor]:
        """Encode texts as int32 ``tokens`` (rows, max_tokens) and ``length`` (rows,); too short ones are left out."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            begin = self.tokenizer.eos_token_id
        if begin is None:
            raise ValueError("tokenizer: has neither a begin-of-text nor an end-of-text token")
        ids = self.tokenizer(list(raw), add_special_tokens=False, verbose=False)["input_ids"] if len(raw) else []
        ids = [[begin, *row][: self.max_tokens] for row in ids]
        kept = [i for i, row in enumerate(ids) if len(row) >= self.prefix_tokens + self.min_target]
        tokens = torch.full((len(kept), self.max_tokens), int(begin), dtype=torch.int32)
        for row, index in enumerate(kept):
            tokens[row, : len(ids[index])] = torch.tensor(ids[index], dtype=torch.int32)
        length = torch.tensor([len(ids[i]) for i in kept], dtype=torch.int32)
        return {"tokens": tokens, "length": length}, torch.tensor(kept, dtype=torch.int64)

    def losses(self, model: nn.Module, examples: Examples, *, parts: bool = False) -> Tensor:
        """Mean cross-entropy per scored token, in nats; logits are computed at scored positions only."""
        tokens = examples["tokens"].long()
        targets = tokens[:, self.prefix_tokens :]  # (rows, T)
        positions = torch.arange(self.prefix_tokens - 1, tokens.shape[1] - 1, device=tokens.device)
        logits = model(input_ids=tokens[:, :-1], logits_to_keep=positions, use_cache=False).logits
        scored = positions + 1 < examples["length"][:, None]  # (rows, T)
        weighted = cross_entropy(logits, targets) * scored / scored.sum(1, keepdim=True)
        if parts:
            return torch.stack([weighted[:, 0::2].sum(1), weighted[:, 1::2].sum(1)], dim=1)
        return weighted.sum(1)

    def features(self, model: nn.Module, examples: Examples, *, context: bool) -> Tensor:
        """Hidden states of the model's middle and last layer: means over the text, or means and end of the prefix."""
        tokens = examples["tokens"].long()
        length = examples["length"][:, None]
        if context:
            tokens, length = tokens[:, : self.prefix_tokens], length.clamp(max=self.prefix_tokens)
        states = model(input_ids=tokens, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
        inside = (torch.arange(tokens.shape[1], device=tokens.device) < length)[..., None]
        inside = inside & (torch.arange(tokens.shape[1], device=tokens.device) > 0)[:, None]
        chosen = [states[len(states) // 2].float(), states[-1].float()]
        means = [(state * inside).sum(1) / inside.sum(1) for state in chosen]
        return torch.cat([*means, chosen[-1][:, -1]] if context else means, dim=1)

    def known_state(self, states: Tensor, examples: Examples) -> Tensor:
        """Mean state over the prefix (rows, d): a causal model's states there know nothing of what follows."""
        return states[:, 1 : self.prefix_tokens].float().mean(1)

    def describe(self, examples: Examples, row: int) -> dict[str, str]:
        """Prompt and continuation of one example as text."""
        ids = examples["tokens"][row, : int(examples["length"][row])].tolist()
        split = self.prefix_tokens
        return {
            "prompt": self.tokenizer.decode(ids[1:split], skip_special_tokens=True),
            "continuation": self.tokenizer.decode(ids[split:], skip_special_tokens=True),
        }

    @torch.no_grad()
    def metric(self, model: nn.Module, name: str, examples: Examples) -> Tensor:
        """Score of the greedy continuation against the true one (rows,).

        ``rougeL``: F-measure of ROUGE-L in [0, 1] (Lin, 2004). ``bleu``: smoothed sentence BLEU in [0, 1].

        Raises:
            ValueError: If there is no such metric.
            ImportError: If the extra ``metrics`` is not installed.
        """
        if name not in self.metrics:
            raise ValueError(f"metric={name!r}: expected one of {', '.join(self.metrics)}")
        written = self._continuations(model, examples)
        true = [self.describe(examples, row)["continuation"] for row in range(len(written))]
        scores = rouge(written, true, name) if name == "rougeL" else sentence_bleu(written, true) / 100
        return torch.from_numpy(scores).float()

    def outcome(self, model: nn.Module, examples: Examples) -> dict[str, str]:
        """The greedy continuation of the prompt of one example."""
        with torch.no_grad():
            return {"model writes": self._continuations(model, examples)[0]}

    def _continuations(self, model: nn.Module, examples: Examples) -> list[str]:
        """Greedy continuations of the prefixes, each as long as the true one."""
        tokens, length = examples["tokens"][:, : self.prefix_tokens].long(), examples["length"].tolist()
        new, states = tokens, None
        for _ in range(max(length) - self.prefix_tokens):
            out = model(input_ids=new, past_key_values=states, use_cache=True, logits_to_keep=1)
            written, states = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            tokens = torch.cat([tokens, written], dim=1)
            new = tokens if states is None else written  # not every model keeps keys and values
        return [
            self.tokenizer.decode(row[self.prefix_tokens : end], skip_special_tokens=True)
            for row, end in zip(tokens.tolist(), length, strict=True)
        ]
