"""Gradient-based meta-learning for many tasks at once: MAML, FOMAML, ANIL, Reptile and Meta-SGD.

One batch holds many tasks (here: users). Every task has its own copy of the parameters along a leading task
dimension, so the inner loops of all tasks run in one graph: the gradient of the *sum* of the task losses with
respect to the copies is each task's own gradient. What the parameters mean is up to the caller's ``loss_fn``.

With phi the meta-parameters, S_t and Q_t the support and query loss of task t, alpha the inner learning rate:

    phi_t^0 = phi,    phi_t^{k+1} = phi_t^k - alpha * grad S_t(phi_t^k),    k = 0 .. K-1

| algorithm  | gradient for phi, averaged over the tasks                              | paper            |
|------------|------------------------------------------------------------------------|------------------|
| `maml`     | d Q_t(phi_t^K) / d phi, through the inner loop (second order)          | arXiv:1703.03400 |
| `fomaml`   | grad Q_t at phi_t^K: the inner gradients count as constants            | the same, 5.2    |
| `anil`     | as `maml`, only the parameters in `adapted` move in the inner loop     | arXiv:1909.09157 |
| `reptile`  | phi - phi_t^K                                                          | arXiv:1803.02999 |
| `meta-sgd` | as `maml`, alpha is one learned number per element, trained with phi   | arXiv:1707.09835 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Algorithm = Literal["maml", "fomaml", "anil", "reptile", "meta-sgd"]
Batch = Any
Params = dict[str, Tensor]
LossFn = Callable[[Params, Batch], Tensor]
"""``loss_fn(params, batch) -> losses``: each parameter is (tasks, *shape), the mean losses are (tasks,)."""


@dataclass(frozen=True)
class MetaConfig:
    """What the inner loop does.

    Attributes:
        algorithm: One of the table in the module's docstring.
        inner_steps: Gradient steps on the support set, K. With 0 every algorithm is plain joint training: the
            gradient of the query loss at phi, and the support set is not looked at.
        inner_lr: Step size of the inner loop, alpha. Where Meta-SGD's learning rates start.
        adapted: Names of the parameters that the inner loop moves; None means all. The others are shared by
            the tasks and trained by the query loss only. ANIL needs a strict subset.

    Raises:
        ValueError: If a value cannot be used.
    """

    algorithm: Algorithm = "maml"
    inner_steps: int = 1
    inner_lr: float = 0.01
    adapted: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm must be one of {get_args(Algorithm)}, got {self.algorithm!r}")
        _check_count("inner_steps", self.inner_steps, least=0)
        number = isinstance(self.inner_lr, int | float) and not isinstance(self.inner_lr, bool)
        if not number or not 0 < self.inner_lr < float("inf"):  # False for NaN too
            raise ValueError(f"inner_lr must be a positive finite number, got {self.inner_lr!r}")
        if self.adapted is None:
            if self.algorithm == "anil":
                raise ValueError("adapted must name a strict subset of the parameters for 'anil', got None")
            return
        names = tuple(self.adapted) if isinstance(self.adapted, tuple | list) else ()
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(
                f"adapted must be None or a tuple of one or more different names, got {self.adapted!r}"
                " (inner_steps=0 adapts nothing)"
            )
        object.__setattr__(self, "adapted", names)


@dataclass(frozen=True)
class MetaStep:
    """Losses of one meta-step, all detached and of shape (tasks,), in the unit of ``loss_fn``.

    Attributes:
        query_loss: At the adapted weights.
        support_before: Support loss at the meta-parameters; None with ``inner_steps=0``.
        support_after: Support loss at the adapted weights; None with ``inner_steps=0`` or if not asked for.
    """

    query_loss: Tensor
    support_before: Tensor | None
    support_after: Tensor | None


class MetaLearner(nn.Module):
    """Owns meta-parameters, adapts copies of them to tasks, and computes their meta-gradient.

    The caller owns the optimiser: ``torch.optim.Adam(learner.parameters())``, with further leaves (a gate,
    say) added if they are trained beside it. Meta-SGD's learning rates are among ``learner.parameters()``.

    Everything that needs a gradient should be computed *inside* ``loss_fn``. It must not change its
    parameters in place, and the loss of a task must depend on that task's copy only. Second-order algorithms
    differentiate it twice, which PyTorch's fused attention kernels do not support ("derivative for
    aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"): run a transformer with
    eager attention or under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. FOMAML and Reptile have no
    such limit.

    ``state_dict`` holds ``phi.<name>`` and, for Meta-SGD, ``alpha.<name>``, with "/" for every "." of a name.

    Args:
        params: Initial values by name. An ``nn.Parameter`` is adopted, so whoever shares it sees the
            training; a plain tensor is copied.
        config: The algorithm and its inner loop.

    Attributes:
        config: As given.
        names: Names of the meta-parameters, in the order given.
        adapted: Those that the inner loop moves.

    Raises:
        ValueError: If the parameters cannot be meta-trained or ``config.adapted`` does not fit them.
    """

    def __init__(self, params: Mapping[str, Tensor], config: MetaConfig) -> None:
        super().__init__()
        _check_params(params)
        names = tuple(params)
        adapted = names if config.adapted is None else config.adapted
        unknown = [name for name in adapted if name not in params]
        if unknown:
            raise ValueError(f"adapted must name parameters out of {list(names)}, got unknown {unknown}")
        if config.algorithm == "anil" and len(adapted) == len(names):
            raise ValueError(f"adapted must be a strict subset of {list(names)} for 'anil', got all of them")
        self.config = config
        self.names = names
        self.adapted = tuple(name for name in names if name in adapted)
        self.phi = nn.ParameterDict({_key(name): _as_parameter(value) for name, value in params.items()})
        self.alpha = nn.ParameterDict()
        if config.algorithm == "meta-sgd":
            for name in self.adapted:
                rate = torch.full_like(params[name], config.inner_lr, requires_grad=False)
                self.alpha[_key(name)] = nn.Parameter(rate)

    @property
    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """The meta-parameters phi by name."""
        return {name: self.phi[_key(name)] for name in self.names}

    @property
    def learning_rates(self) -> dict[str, nn.Parameter]:
        """Meta-SGD's learning rates by name, each of its parameter's shape; empty for other algorithms."""
        return {name: self.alpha[_key(name)] for name in self.adapted} if len(self.alpha) else {}

    def expand(self, tasks: int) -> Params:
        """Returns views of phi, (tasks, *shape): every task's weights before adaptation, with gradients."""
        _check_count("tasks", tasks, least=1)
        return {name: phi.expand(tasks, *phi.shape) for name, phi in self.meta_parameters.items()}

    def adapt(
        self,
        loss_fn: LossFn,
        support: Batch,
        tasks: int,
        steps: int | None = None,
        create_graph: bool = False,
    ) -> Params:
        """Runs the inner loop and returns the fast weights of every task.

        Works under ``torch.no_grad()`` too, and never touches ``.grad``.

        Args:
            loss_fn: Per-task mean losses, see ``LossFn``.
            support: Handed to ``loss_fn`` unchanged at every step.
            tasks: Number of tasks in ``support``.
            steps: Inner steps; None means ``config.inner_steps``. May exceed what was trained for.
            create_graph: If False, the fast weights are detached copies that belong to the caller. If True,
                they are connected to the meta-parameters the way the algorithm differentiates: through the
                inner gradients (MAML, ANIL, Meta-SGD) or as if those were constants (FOMAML, Reptile).

        Returns:
            Fast weights by name, each (tasks, *shape), all names, also those that are not adapted.

        Raises:
            ValueError: If an argument or what ``loss_fn`` returns cannot be used.
            FloatingPointError: If a task's support loss is not finite.
        """
        _check_count("tasks", tasks, least=1)
        steps = self.config.inner_steps if steps is None else steps
        _check_count("steps", steps, least=0)
        return self._inner_loop(loss_fn, support, tasks, steps, create_graph)[0]

    def meta_step(
        self, loss_fn: LossFn, support: Batch, query: Batch, tasks: int, measure_support: bool = True
    ) -> MetaStep:
        """Adapts on support, takes the query loss, and adds the meta-gradient to ``.grad``.

        Gradients are means over the tasks and are *added*, as ``backward`` does: call
        ``optimizer.zero_grad()`` between updates, or not, to accumulate over several batches of tasks. Every
        meta-parameter (and Meta-SGD learning rate) has a ``.grad`` afterwards, zero where the loss does not
        use it. Any other leaf that ``loss_fn`` uses gets the gradient of the mean query loss, for
        second-order algorithms including its path through the inner loop.

        Reptile puts ``phi - mean_t(phi_t^K)`` into ``.grad`` of the adapted meta-parameters, so SGD with
        learning rate eps is the paper's ``phi += eps * (mean_t(phi_t^K) - phi)``. That is about
        ``inner_lr * inner_steps`` times the size of a gradient. The query set serves only ``query_loss`` and
        the leaves that are not adapted, which get the query gradient at the adapted weights.

        Args:
            loss_fn: Per-task mean losses, see ``LossFn``.
            support: Adapted on. May be None with ``inner_steps=0``.
            query: The meta-loss is taken on it.
            tasks: Number of tasks in each of them.
            measure_support: Also take the support loss at the adapted weights, one more forward pass.

        Returns:
            The losses before and after adaptation, detached.

        Raises:
            ValueError: If an argument or what ``loss_fn`` returns cannot be used.
            FloatingPointError: If a task's loss is not finite; ``.grad`` is then as it was before.
        """
        _check_count("tasks", tasks, least=1)
        steps = self.config.inner_steps
        reptile = self.config.algorithm == "reptile" and steps > 0
        with torch.inference_mode(False), torch.enable_grad():
            fast, before = self._inner_loop(loss_fn, support, tasks, steps, create_graph=True)
            if reptile:
                # Cut, so that the query loss reaches the other leaves only.
                fast |= {name: fast[name].detach() for name in self.adapted}
            losses = _losses(loss_fn, fast, query, tasks, "query loss")
            after = None
            if measure_support and steps > 0:
                with torch.no_grad():
                    after = _losses(loss_fn, fast, support, tasks, "support loss after adaptation")
            if losses.requires_grad:
                losses.mean().backward()
            elif not reptile:
                raise ValueError("loss_fn must depend on its parameters, got a query loss without a gradient")
        if reptile:
            self._add_reptile_gradient(fast)
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return MetaStep(losses.detach(), before, after)

    def _inner_loop(
        self, loss_fn: LossFn, support: Batch, tasks: int, steps: int, create_graph: bool
    ) -> tuple[Params, Tensor | None]:
        """Returns the fast weights and, if a step was taken, the support losses at phi, (tasks,)."""
        second_order = create_graph and self.config.algorithm in ("maml", "anil", "meta-sgd")
        rates = self.learning_rates
        before = None
        with torch.inference_mode(False), torch.enable_grad():
            fast = self.expand(tasks)
            if not create_graph:
                fast = {name: _copy(value) for name, value in fast.items()}
            for step in range(steps):
                if not create_graph:
                    fast |= {name: fast[name].detach().requires_grad_() for name in self.adapted}
                losses = _losses(loss_fn, fast, support, tasks, f"support loss at inner step {step}")
                if before is None:
                    before = losses.detach()
                for name, gradient in self._task_gradients(losses, fast, second_order).items():
                    # (tasks, *shape) - (*shape) or a number * (tasks, *shape)
                    fast[name] = fast[name] - rates.get(name, self.config.inner_lr) * gradient
            if not create_graph:
                fast = {name: value.detach() for name, value in fast.items()}
        return fast, before

    def _task_gradients(self, losses: Tensor, fast: Params, second_order: bool) -> Params:
        """Returns each task's own gradient, (tasks, *shape), for the adapted parameters in use."""
        gradients: tuple[Tensor | None, ...] = (None,)
        if losses.requires_grad:
            # A task's loss depends on its own copy only, so the gradient of the sum is each task's gradient.
            weights = [fast[name] for name in self.adapted]
            gradients = torch.autograd.grad(losses.sum(), weights, create_graph=second_order, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(f"loss_fn must depend on a parameter of {self.adapted}, got a support loss of none")
        return {name: g for name, g in zip(self.adapted, gradients, strict=True) if g is not None}

    @torch.no_grad()
    def _add_reptile_gradient(self, fast: Params) -> None:
        """Adds ``phi - mean_t(phi_t^K)`` to ``.grad`` of the adapted meta-parameters."""
        meta_parameters = self.meta_parameters
        for name in self.adapted:
            phi = meta_parameters[name]
            gradient = phi - fast[name].mean(dim=0)
            phi.grad = gradient if phi.grad is None else phi.grad + gradient


def _losses(loss_fn: LossFn, params: Params, batch: Batch, tasks: int, what: str) -> Tensor:
    """Calls ``loss_fn`` and checks shape and finiteness of the (tasks,) losses."""
    losses = loss_fn(dict(params), batch)
    if not isinstance(losses, Tensor) or losses.shape != (tasks,) or not losses.is_floating_point():
        got = type(losses).__name__
        if isinstance(losses, Tensor):
            got = f"{tuple(losses.shape)} of {losses.dtype}"
        raise ValueError(f"loss_fn must return a floating point loss per task, ({tasks},), got {got} for the {what}")
    finite = losses.detach().isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(f"the {what} is not finite for tasks {bad}; a smaller inner_lr often helps")
    return losses


def _check_count(argument: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument} must be an integer of at least {least}, got {value!r}")


def _check_params(params: Mapping[str, Tensor]) -> None:
    if not isinstance(params, Mapping) or not params:
        raise ValueError(f"params must be a mapping that names at least one tensor, got {params!r}")
    reserved = set(dir(nn.ParameterDict()))
    for name, value in params.items():
        if not isinstance(name, str) or not name or "/" in name or name in reserved:
            raise ValueError(f"params must have names without '/' that nn.ParameterDict can hold, got {name!r}")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"params[{name!r}] must be a floating point tensor, got {got}")
        if isinstance(value, nn.Parameter) and not value.requires_grad:
            raise ValueError(f"params[{name!r}] must require a gradient, got a frozen nn.Parameter")


def _key(name: str) -> str:
    """A module cannot hold a parameter with a dot in its name."""
    return name.replace(".", "/")


def _copy(value: Tensor) -> Tensor:
    """Returns a detached copy with its own memory for every task, where an expanded tensor shares one."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _as_parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())
