"""The adapted model one transformer block at a time: what a decision per layer needs.

The blocks of a model are called one after the other with the arguments that the model itself gives them, so nothing is
known of the architecture but the list of its blocks, and that each takes the states that the one before it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsa_gym.backbone import ReachedError, standing_in
from dsa_gym.domains import Examples, take
from dsa_gym.model import AdaptedModel
from dsa_gym.pathways import ActiveAdapters


@dataclass
class Passage:
    """A batch of examples on its way through the blocks.

    Attributes:
        examples: The examples, one row per user.
        phi: Flat adapter parameters (users, P).
        users: Row of ``phi`` of each example, int64 (rows,); None if ``phi`` has just theirs, in order.
        calls: Arguments of each block beside the states.
        states: Hidden states that the next block receives (n, tokens, d).
        block: Index of the next block.
    """

    examples: Examples
    phi: Tensor
    users: Tensor | None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    block: int = 0


class LayerwiseModel:
    """An :class:`AdaptedModel` that stops before every block.

    Attributes:
        model: The adapted model.
        count: Number of blocks.
    """

    def __init__(self, model: AdaptedModel) -> None:
        """Find the blocks."""
        self.model = model
        self._blocks: list[Any] = [model.backbone.model.get_submodule(path) for path in model.backbone.blocks]
        self.count = len(self._blocks)
        self._returns_tuple: bool | None = None

    @torch.inference_mode()
    def begin(self, examples: Examples, phi: Tensor, users: Tensor | None = None) -> Passage:
        """Bring examples to the first block; for ``phi`` and ``users`` see :class:`Passage`."""
        if self._returns_tuple is None:
            self._look(take(examples, torch.zeros(1, dtype=torch.int64)))
        passage = Passage(examples, phi, users)

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            states, call = _split(args, kwargs)
            if index == 0:
                passage.states = states
            passage.calls.append(call)
            if index == self.count - 1:
                raise ReachedError
            return self._returned(states)

        with self._instead(note), self.model.backbone.adapted(None) as model, suppress(ReachedError):
            self.model.domain.losses(model, examples)
        return passage

    @torch.inference_mode()
    def advance(self, passage: Passage, mask: Tensor | None) -> None:
        """Run the next block under a component mask (rows, sites, rank); None for no adapters."""
        adapters = None
        if mask is not None:
            adapters = ActiveAdapters(self.model.shape, passage.phi, mask, passage.users)
        args, kwargs = passage.calls[passage.block]
        with self.model.backbone.adapted(adapters):
            output = self._blocks[passage.block](passage.states, *args, **kwargs)
        passage.states = output[0] if isinstance(output, tuple) else output
        passage.block += 1

    @torch.inference_mode()
    def known(self, passage: Passage) -> Tensor:
        """What the states that have been reached say of the input, without what is to be predicted (rows, d)."""
        return self.model.domain.known_state(passage.states, passage.examples)

    @torch.inference_mode()
    def losses(self, passage: Passage) -> Tensor:
        """Loss of each example (rows,), when all blocks have been run.

        Raises:
            ValueError: If some have not.
        """
        if passage.block < self.count:
            raise ValueError(f"passage: stands before block {passage.block}, expected all {self.count} to be done")

        def last(_index: int, *_args: Any, **_kwargs: Any) -> Any:
            return self._returned(passage.states)

        with self._instead(last), self.model.backbone.adapted(None) as model:
            return self.model.domain.losses(model, passage.examples)

    def _look(self, example: Examples) -> None:
        """See whether blocks return a tensor or a tuple that begins with one."""
        seen: list[bool] = []
        hook = self._blocks[-1].register_forward_hook(lambda _m, _i, output: seen.append(isinstance(output, tuple)))
        try:
            with self.model.backbone.adapted(None) as model:
                self.model.domain.losses(model, example)
        finally:
            hook.remove()
        self._returns_tuple = seen[0]

    def _returned(self, states: Tensor) -> Any:
        return (states,) if self._returns_tuple else states

    def _instead(self, stub: Callable[..., Any]) -> AbstractContextManager[None]:
        """Call ``stub(index, ...)`` in the place of the blocks."""
        return standing_in(self._blocks, [partial(stub, index) for index in range(self.count)])


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The states that a block is called with, and its other arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)
