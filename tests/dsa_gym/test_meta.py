"""Meta-learning against closed forms, finite differences and the published sinusoid regression."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsa_gym.meta import MetaConfig, MetaLearner, Params

ALGORITHMS = ("maml", "fomaml", "anil", "reptile", "meta-sgd")
SECOND_ORDER = ("maml", "anil", "meta-sgd")

# ------------------------------------------------------------------------------------------------------------
# Quadratic losses: everything is known in closed form.
# ------------------------------------------------------------------------------------------------------------

Quadratic = tuple[Tensor, Tensor]  # A: (tasks, n, n), symmetric positive definite; a: (tasks, n)
TASKS, BODY, HEAD = 5, 3, 2


def quadratic(generator: torch.Generator, tasks: int = TASKS) -> Quadratic:
    n = BODY + HEAD
    R = torch.randn(tasks, n, n, dtype=torch.float64, generator=generator)
    return R @ R.mT / n + torch.eye(n, dtype=torch.float64), torch.randn(
        tasks, n, dtype=torch.float64, generator=generator
    )


def quadratic_loss(params: Params, batch: Quadratic) -> Tensor:
    """L_t(w) = 1/2 (w - a_t)^T A_t (w - a_t) with w = (body, head)."""
    A, a = batch
    d = torch.cat([params["net.body"], params["net.head"]], dim=-1) - a
    return 0.5 * torch.einsum("ti,tij,tj->t", d, A, d)


def quadratic_learner(
    algorithm: str, steps: int, generator: torch.Generator, adapted: tuple[str, ...] | None = None
) -> MetaLearner:
    params = {
        "net.body": torch.randn(BODY, dtype=torch.float64, generator=generator),
        "net.head": torch.randn(HEAD, dtype=torch.float64, generator=generator),
    }
    if algorithm == "anil":
        adapted = ("net.head",)
    return MetaLearner(params, MetaConfig(algorithm, steps, 0.1, adapted))


def step_sizes(learner: MetaLearner) -> Tensor:
    """The diagonal of the step size matrix D, (n,): zero where a parameter is not adapted."""
    sizes = [torch.full_like(p, learner.config.inner_lr) for p in learner.meta_parameters.values()]
    rates = learner.learning_rates
    parts = [
        rates.get(name, size).detach() * (name in learner.adapted)
        for name, size in zip(learner.names, sizes, strict=True)
    ]
    return torch.cat(parts)


def closed_form(learner: MetaLearner, support: Quadratic, query: Quadratic) -> tuple[Tensor, ...]:
    """The inner loop is linear: w_{k+1} - a = P (w_k - a) with P = I - D A.

    Returns:
        Adapted weights w_K (tasks, n), and the meta-gradients averaged over the tasks, (n,) each:
        second order (P^K)^T B (w_K - b), first order B (w_K - b), Reptile w_0 - w_K, and Meta-SGD's for the
        step sizes, by d w_{k+1} / d alpha = P d w_k / d alpha - diag(A (w_k - a)).
    """
    (A, a), (B, b) = support, query
    D = step_sizes(learner)
    P = torch.eye(len(D), dtype=torch.float64) - D[:, None] * A  # (tasks, n, n)
    w0 = torch.cat([p.detach() for p in learner.meta_parameters.values()])
    w, jacobian = w0.expand_as(a), torch.zeros_like(A)
    for _ in range(learner.config.inner_steps):
        inner = torch.einsum("tij,tj->ti", A, w - a)
        jacobian = P @ jacobian - torch.diag_embed(inner)
        w = w - D * inner
    outer = torch.einsum("tij,tj->ti", B, w - b)  # (tasks, n)
    PK = torch.linalg.matrix_power(P, learner.config.inner_steps)
    second = torch.einsum("tji,tj->ti", PK, outer)
    alpha = torch.einsum("tji,tj->ti", jacobian, outer)
    return w, second.mean(0), outer.mean(0), (w0 - w).mean(0), alpha.mean(0)


def gradient(learner: MetaLearner) -> Tensor:
    return torch.cat([p.grad for p in learner.meta_parameters.values()])


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_quadratic_losses_give_the_closed_form(algorithm: str, steps: int, generator: torch.Generator) -> None:
    support, query = quadratic(generator), quadratic(generator)
    learner = quadratic_learner(algorithm, steps, generator)
    if algorithm == "meta-sgd":
        for rate in learner.learning_rates.values():  # different ones, so that a mix-up shows
            nn.init.uniform_(rate, 0.02, 0.15, generator=generator)
    w, second, first, reptile, alpha = closed_form(learner, support, query)

    result = learner.meta_step(quadratic_loss, support, query, TASKS)

    expected = {"fomaml": first, "reptile": reptile}.get(algorithm, second)
    torch.testing.assert_close(gradient(learner), expected, rtol=1e-10, atol=1e-12)
    if algorithm == "meta-sgd":
        rates = torch.cat([rate.grad for rate in learner.learning_rates.values()])
        torch.testing.assert_close(rates, alpha, rtol=1e-10, atol=1e-12)
    adapted = {"net.body": w[:, :BODY], "net.head": w[:, BODY:]}
    torch.testing.assert_close(learner.adapt(quadratic_loss, support, TASKS), adapted, rtol=1e-10, atol=0)
    before = {name: p.detach().expand(TASKS, -1) for name, p in learner.meta_parameters.items()}
    torch.testing.assert_close(result.support_before, quadratic_loss(before, support))
    torch.testing.assert_close(result.support_after, quadratic_loss(adapted, support))
    torch.testing.assert_close(result.query_loss, quadratic_loss(adapted, query))
    assert not result.query_loss.requires_grad and result.query_loss.shape == (TASKS,)
    assert (result.support_after < result.support_before).all()


def test_anil_adapts_the_head_only_and_trains_the_body(generator: torch.Generator) -> None:
    support, query = quadratic(generator), quadratic(generator)
    learner = quadratic_learner("anil", 3, generator)
    fast = learner.adapt(quadratic_loss, support, TASKS)
    body = learner.meta_parameters["net.body"]
    assert torch.equal(fast["net.body"], body.detach().expand(TASKS, BODY))
    assert not torch.allclose(fast["net.head"][0], fast["net.head"][1])
    learner.meta_step(quadratic_loss, support, query, TASKS)
    # Through the adaptation of the head as well: the first-order gradient would be another one.
    _, second, first, *_ = closed_form(learner, support, query)
    torch.testing.assert_close(body.grad, second[:BODY])
    assert not torch.allclose(body.grad, first[:BODY], rtol=0.05)


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "meta-sgd"])
def test_a_subset_can_be_adapted_by_any_algorithm(algorithm: str, generator: torch.Generator) -> None:
    support, query = quadratic(generator), quadratic(generator)
    learner = quadratic_learner(algorithm, 2, generator, adapted=("net.body",))
    _, second, first, _, alpha = closed_form(learner, support, query)
    learner.meta_step(quadratic_loss, support, query, TASKS)
    torch.testing.assert_close(gradient(learner), first if algorithm == "fomaml" else second)
    if algorithm == "meta-sgd":
        assert list(learner.learning_rates) == ["net.body"]
        torch.testing.assert_close(learner.learning_rates["net.body"].grad, alpha[:BODY])


def test_reptile_trains_what_it_does_not_adapt_by_the_query_loss(generator: torch.Generator) -> None:
    support, query = quadratic(generator), quadratic(generator)
    learner = quadratic_learner("reptile", 2, generator, adapted=("net.head",))
    _, _, first, reptile, _ = closed_form(learner, support, query)
    learner.meta_step(quadratic_loss, support, query, TASKS)
    torch.testing.assert_close(gradient(learner), torch.cat([first[:BODY], reptile[BODY:]]))


def test_reptile_with_sgd_of_rate_one_moves_to_the_mean_of_the_adapted_weights(
    generator: torch.Generator,
) -> None:
    support = quadratic(generator)
    learner = quadratic_learner("reptile", 4, generator)
    mean = learner.adapt(quadratic_loss, support, TASKS)["net.head"].mean(0)
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    learner.meta_step(quadratic_loss, support, support, TASKS)
    optimizer.step()
    torch.testing.assert_close(learner.meta_parameters["net.head"].detach(), mean)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_inner_steps_it_is_joint_training(algorithm: str, generator: torch.Generator) -> None:
    query = quadratic(generator)
    learner = quadratic_learner(algorithm, 0, generator)
    _, _, first, *_ = closed_form(learner, query, query)
    result = learner.meta_step(quadratic_loss, None, query, TASKS)
    torch.testing.assert_close(gradient(learner), first)
    assert result.support_before is None and result.support_after is None
    assert all(not rate.grad.any() for rate in learner.learning_rates.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_accumulate_like_those_of_backward(algorithm: str, generator: torch.Generator) -> None:
    support, query = quadratic(generator), quadratic(generator)
    learner = quadratic_learner(algorithm, 2, generator)
    learner.meta_step(quadratic_loss, support, query, TASKS)
    once = gradient(learner).clone()
    learner.meta_step(quadratic_loss, support, query, TASKS, measure_support=False)
    torch.testing.assert_close(gradient(learner), 2 * once)


# ------------------------------------------------------------------------------------------------------------
# A small network with a gate beside it.
# ------------------------------------------------------------------------------------------------------------

Points = tuple[Tensor, Tensor]  # x, y: (tasks, points, 1)
HIDDEN = 4


def points(generator: torch.Generator, tasks: int) -> Points:
    x = 2 * torch.randn(tasks, 6, 1, dtype=torch.float64, generator=generator)
    return x, torch.sin(x + torch.randn(tasks, 1, 1, dtype=torch.float64, generator=generator))


def gated_loss(gate: Tensor) -> Callable[[Params, Points], Tensor]:
    """A hidden layer whose units are scaled by a shared gate, (HIDDEN,)."""

    def loss_fn(params: Params, batch: Points) -> Tensor:
        x, y = batch
        hidden = torch.tanh(x @ params["up"] + params["bias"]) * torch.sigmoid(gate)
        return (hidden @ params["down"] - y).square().mean((1, 2))

    return loss_fn


def gated_learner(algorithm: str, steps: int, generator: torch.Generator) -> tuple[MetaLearner, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    params = {"up": normal(1, HIDDEN), "bias": normal(1, HIDDEN), "down": normal(HIDDEN, 1)}
    adapted = ("bias", "down") if algorithm == "anil" else None
    learner = MetaLearner(params, MetaConfig(algorithm, steps, 0.1, adapted))
    return learner, normal(HIDDEN).requires_grad_()


@pytest.mark.parametrize("algorithm", SECOND_ORDER)
def test_finite_differences_of_the_query_loss(algorithm: str, generator: torch.Generator) -> None:
    tasks, epsilon = 3, 1e-5
    support, query = points(generator, tasks), points(generator, tasks)
    learner, gate = gated_learner(algorithm, 3, generator)
    learner.meta_step(gated_loss(gate), support, query, tasks)
    for leaf in [*learner.parameters(), gate]:
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-4
        numeric = torch.zeros_like(leaf)
        for index in range(leaf.numel()):
            losses = []
            for sign in (1, -1):
                shifted, shifted_gate = copy.deepcopy((learner, gate))
                twin = next(
                    b
                    for a, b in zip([*learner.parameters(), gate], [*shifted.parameters(), shifted_gate], strict=True)
                    if a is leaf
                )
                with torch.no_grad():
                    twin.view(-1)[index] += sign * epsilon
                fast = shifted.adapt(gated_loss(shifted_gate), support, tasks)
                losses.append(gated_loss(shifted_gate)(fast, query).mean().item())
            numeric.view(-1)[index] = (losses[0] - losses[1]) / (2 * epsilon)
        torch.testing.assert_close(leaf.grad, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_first_order_algorithms_give_the_gate_the_query_gradient_at_the_adapted_weights(
    algorithm: str, generator: torch.Generator
) -> None:
    tasks = 3
    support, query = points(generator, tasks), points(generator, tasks)
    learner, gate = gated_learner(algorithm, 3, generator)
    learner.meta_step(gated_loss(gate), support, query, tasks)
    fast = learner.adapt(gated_loss(gate), support, tasks)
    (expected,) = torch.autograd.grad(gated_loss(gate)(fast, query).mean(), gate)
    torch.testing.assert_close(gate.grad, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_batch_of_tasks_equals_the_tasks_one_by_one(algorithm: str, generator: torch.Generator) -> None:
    tasks = 4
    support, query = points(generator, tasks), points(generator, tasks)
    learner, gate = gated_learner(algorithm, 3, generator)
    loss_fn = gated_loss(gate)
    leaves = [*learner.parameters(), gate]
    together = learner.meta_step(loss_fn, support, query, tasks)
    fast = learner.adapt(loss_fn, support, tasks)
    gradients = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    for t in range(tasks):
        own = [(x[t : t + 1], y[t : t + 1]) for x, y in (support, query)]
        alone = learner.meta_step(loss_fn, *own, 1)
        for name in ("query_loss", "support_before", "support_after"):
            torch.testing.assert_close(getattr(alone, name), getattr(together, name)[t : t + 1])
        for name, value in learner.adapt(loss_fn, own[0], 1).items():
            torch.testing.assert_close(value, fast[name][t : t + 1])
    for leaf, expected in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(leaf.grad / tasks, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapt_returns_weights_that_belong_to_the_caller(algorithm: str, generator: torch.Generator) -> None:
    support = points(generator, 1)  # with one task, expanding would not copy
    learner, gate = gated_learner(algorithm, 2, generator)
    before = copy.deepcopy(learner.state_dict())
    for steps in (0, 2):
        for value in learner.adapt(gated_loss(gate), support, 1, steps=steps).values():
            assert not value.requires_grad and value.is_contiguous()
            value.zero_()
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
    assert gate.grad is None and all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_adapt_works_where_gradients_are_off(context: Callable[[], object], generator: torch.Generator) -> None:
    support = points(generator, 3)
    learner, gate = gated_learner("maml", 2, generator)
    expected = learner.adapt(gated_loss(gate), support, 3)
    with context():
        actual = learner.adapt(gated_loss(gate), support, 3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapt_with_a_graph_differentiates_as_the_algorithm_does(algorithm: str, generator: torch.Generator) -> None:
    support, query = points(generator, 3), points(generator, 3)
    learner, gate = gated_learner(algorithm, 2, generator)
    loss_fn = gated_loss(gate)
    fast = learner.adapt(loss_fn, support, 3, create_graph=True)
    torch.testing.assert_close(fast, learner.adapt(loss_fn, support, 3), rtol=0, atol=0)
    (manual,) = torch.autograd.grad(loss_fn(fast, query).mean(), learner.meta_parameters["down"])
    if algorithm == "reptile":  # whose meta-gradient is not a derivative: as FOMAML then
        learner.config = MetaConfig("fomaml", 2, 0.1)
    learner.meta_step(loss_fn, support, query, 3)
    torch.testing.assert_close(learner.meta_parameters["down"].grad, manual)


def test_a_parameter_the_loss_does_not_use_gets_a_zero_gradient(generator: torch.Generator) -> None:
    learner, gate = gated_learner("meta-sgd", 2, generator)
    params = {name: p.detach() for name, p in learner.meta_parameters.items()}
    wider = MetaLearner({**params, "unused": torch.ones(2)}, MetaConfig("meta-sgd", 2, 0.1))
    batch = points(generator, 3)
    wider.meta_step(gated_loss(gate), batch, batch, 3)
    assert not wider.meta_parameters["unused"].grad.any()
    assert not wider.learning_rates["unused"].grad.any()
    assert torch.equal(wider.adapt(gated_loss(gate), batch, 3)["unused"], torch.ones(3, 2))


def test_parameters_are_adopted_and_tensors_are_copied() -> None:
    shared, plain = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    learner = MetaLearner({"block.0.up": shared, "block.0.down": plain}, MetaConfig())
    assert learner.meta_parameters["block.0.up"] is shared
    learner.meta_parameters["block.0.down"].data.fill_(1)
    assert not plain.any()
    assert sorted(learner.state_dict()) == ["phi.block/0/down", "phi.block/0/up"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_resumes_bit_for_bit_from_a_checkpoint(algorithm: str, generator: torch.Generator) -> None:
    batches = [(points(generator, 3), points(generator, 3)) for _ in range(6)]
    learner, gate = gated_learner(algorithm, 2, generator)

    def train(learner: MetaLearner, optimizer: torch.optim.Optimizer, part: slice) -> None:
        for support, query in batches[part]:
            optimizer.zero_grad()
            learner.meta_step(gated_loss(gate.detach()), support, query, 3)
            optimizer.step()

    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    train(learner, optimizer, slice(0, 3))
    checkpoint = copy.deepcopy({"learner": learner.state_dict(), "optimizer": optimizer.state_dict()})
    train(learner, optimizer, slice(3, 6))

    resumed, _ = gated_learner(algorithm, 2, generator)  # other initial values
    resumed.load_state_dict(checkpoint["learner"])
    optimizer = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, optimizer, slice(3, 6))
    torch.testing.assert_close(resumed.state_dict(), learner.state_dict(), rtol=0, atol=0)


def test_second_order_works_through_math_attention(generator: torch.Generator) -> None:
    def loss_fn(params: Params, x: Tensor) -> Tensor:  # x: (tasks, length, d)
        q, k, v = (x @ params[name] for name in ("q", "k", "v"))
        out = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)
        return out.square().mean((1, 2, 3))

    params = {name: torch.randn(8, 8, generator=generator) for name in ("q", "k", "v")}
    x = torch.randn(2, 5, 8, generator=generator)
    learner = MetaLearner(params, MetaConfig("maml", 2, 0.1))
    with sdpa_kernel(SDPBackend.MATH):
        learner.meta_step(loss_fn, x, x, 2)
    assert all(p.grad.any() for p in learner.parameters())


# ------------------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "mamal"}, r"algorithm must be one of .*'maml'.* got 'mamal'"),
        ({"inner_steps": -1}, "inner_steps must be an integer of at least 0, got -1"),
        ({"inner_steps": 1.5}, "inner_steps must be an integer of at least 0, got 1.5"),
        ({"inner_steps": True}, "inner_steps must be an integer of at least 0, got True"),
        ({"inner_lr": 0.0}, "inner_lr must be a positive finite number, got 0.0"),
        ({"inner_lr": math.nan}, "inner_lr must be a positive finite number, got nan"),
        ({"inner_lr": math.inf}, "inner_lr must be a positive finite number, got inf"),
        ({"inner_lr": "0.1"}, "inner_lr must be a positive finite number, got '0.1'"),
        ({"algorithm": "anil"}, "adapted must name a strict subset .* got None"),
        ({"adapted": ()}, r"adapted must be None or a tuple of one or more different names, got \(\)"),
        ({"adapted": "head"}, "adapted must be None or a tuple .* got 'head'"),
        ({"adapted": ("head", "head")}, "adapted must be None or a tuple .* got"),
        ({"adapted": (1,)}, "adapted must be None or a tuple .* got"),
        ({"adapted": 3}, "adapted must be None or a tuple .* got 3"),
    ],
)
def test_config_rejects(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaConfig(**arguments)


def test_config_takes_a_list_of_names_as_read_from_yaml() -> None:
    assert MetaConfig(adapted=["head"]) == MetaConfig(adapted=("head",))


@pytest.mark.parametrize(
    ("params", "config", "message"),
    [
        ({}, MetaConfig(), "params must be a mapping that names at least one tensor"),
        ([torch.zeros(2)], MetaConfig(), "params must be a mapping that names at least one tensor"),
        ({"w": torch.zeros(2, dtype=torch.long)}, MetaConfig(), r"params\['w'\] .* floating .* torch.int64"),
        ({"w": [0.0]}, MetaConfig(), r"params\['w'\] must be a floating point tensor, got list"),
        ({"a/b": torch.zeros(2)}, MetaConfig(), "params must have names without '/' .* got 'a/b'"),
        ({"keys": torch.zeros(2)}, MetaConfig(), "params must have names .* got 'keys'"),
        ({3: torch.zeros(2)}, MetaConfig(), "params must have names .* got 3"),
        ({"w": nn.Parameter(torch.zeros(2), requires_grad=False)}, MetaConfig(), "must require a gradient"),
        ({"w": torch.zeros(2)}, MetaConfig(adapted=("v",)), r"adapted must name .* \['w'\], got .*\['v'\]"),
        ({"w": torch.zeros(2)}, MetaConfig("anil", adapted=("w",)), r"adapted must be a strict subset"),
    ],
)
def test_learner_rejects(params: dict[str, Tensor], config: MetaConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaLearner(params, config)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: w.sum(), r"loss per task, \(3,\), got \(\) of torch.float32 for the support loss"),
        (lambda w: w.sum(1)[:2], r"loss per task, \(3,\), got \(2,\)"),
        (lambda w: w, r"loss per task, \(3,\), got \(3, 2\)"),
        (lambda w: w.argmax(1), r"floating point loss per task, \(3,\), got \(3,\) of torch.int64"),
        (lambda w: [1.0, 2.0, 3.0], r"loss per task, \(3,\), got list"),
        (lambda w: torch.ones(3), "loss_fn must depend on a parameter of"),
        (lambda w: torch.ones(3, requires_grad=True) * 2, "loss_fn must depend on a parameter of"),
    ],
)
def test_losses_that_cannot_be_used_are_named(returned: Callable[[Tensor], Tensor], message: str) -> None:
    learner = MetaLearner({"w": torch.zeros(2)}, MetaConfig())
    with pytest.raises(ValueError, match=message):
        learner.meta_step(lambda params, batch: returned(params["w"]), None, None, 3)


def test_a_query_loss_without_gradient_is_named() -> None:
    learner = MetaLearner({"w": torch.zeros(2)}, MetaConfig(inner_steps=0))
    with pytest.raises(ValueError, match="loss_fn must depend on its parameters, got a query loss without"):
        learner.meta_step(lambda params, batch: torch.ones(3), None, None, 3)


@pytest.mark.parametrize("tasks", [0, -1, 2.0, None])
def test_the_number_of_tasks_is_checked(tasks: int) -> None:
    learner = MetaLearner({"w": torch.zeros(2)}, MetaConfig())
    for call in (learner.meta_step, learner.adapt):
        arguments = (None, None) if call == learner.meta_step else (None,)
        with pytest.raises(ValueError, match=f"tasks must be an integer of at least 1, got {tasks}"):
            call(lambda params, batch: params["w"].sum(1), *arguments, tasks)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -2"):
        learner.adapt(lambda params, batch: params["w"].sum(1), None, 1, steps=-2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("support", r"support loss at inner step 0 is not finite for tasks \[1, 3\]"),
        ("query", r"query loss is not finite for tasks \[1, 3\]"),
    ],
)
def test_losses_that_are_not_finite_name_the_tasks_and_leave_the_gradients(
    algorithm: str, where: str, message: str, generator: torch.Generator
) -> None:
    batches = {"support": quadratic(generator), "query": quadratic(generator)}
    learner = quadratic_learner(algorithm, 2, generator)
    learner.meta_step(quadratic_loss, batches["support"], batches["query"], TASKS)
    before = [p.grad.clone() for p in learner.parameters()]
    A, a = batches[where]
    a = a.clone()
    a[1, 0], a[3, 0] = math.nan, math.inf
    with pytest.raises(FloatingPointError, match=message):
        learner.meta_step(quadratic_loss, *(batches | {where: (A, a)}).values(), TASKS)
    assert all(torch.equal(p.grad, g) for p, g in zip(learner.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Sinusoid regression (Finn et al. 2017, arXiv:1703.03400, section 5.1)
# ------------------------------------------------------------------------------------------------------------

SHOTS = 10


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The products are so small that a second thread only costs time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sinusoids(
    generator: torch.Generator, tasks: int, count: int, frequency: tuple[float, float] = (1.0, 1.0)
) -> Points:
    """y = A sin(w x - p), A ~ U[0.1, 5], p ~ U[0, pi], x ~ U[-5, 5], and w ~ U[frequency]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    amplitude, phase = uniform(0.1, 5.0, tasks, 1, 1), uniform(0.0, math.pi, tasks, 1, 1)
    x = uniform(-5.0, 5.0, tasks, count, 1)
    return x, amplitude * torch.sin(uniform(*frequency, tasks, 1, 1) * x - phase)


def split(batch: Points) -> tuple[Points, Points]:
    x, y = batch
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def mlp_init(generator: torch.Generator, normal: bool) -> dict[str, Tensor]:
    """1 -> 40 -> 40 -> 1, initialised as ``nn.Linear``, or as the MAML code: truncated N(0, 0.01^2)."""
    params = {}
    for i, (fan_in, fan_out) in enumerate([(1, 40), (40, 40), (40, 1)]):
        W, b = torch.empty(fan_in, fan_out), torch.zeros(1, fan_out)
        if normal:
            nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02, generator=generator)
        else:
            for tensor in (W, b):
                nn.init.uniform_(tensor, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        params |= {f"W{i}": W, f"b{i}": b}
    return params


def mlp_loss(params: Params, batch: Points) -> Tensor:
    x, y = batch
    hidden = torch.baddbmm(params["b0"], x, params["W0"]).relu()  # (tasks, points, 40)
    hidden = torch.baddbmm(params["b1"], hidden, params["W1"]).relu()
    return (torch.baddbmm(params["b2"], hidden, params["W2"]) - y).square().mean((1, 2))


def train_sinusoids(
    algorithm: str,
    iterations: int,
    *,
    lr: float = 1e-3,
    tasks: int = 25,
    inner_steps: int = 1,
    frequency: tuple[float, float] = (1.0, 1.0),
    normal: bool = False,
) -> MetaLearner:
    generator = torch.Generator().manual_seed(0)
    learner = MetaLearner(mlp_init(generator, normal), MetaConfig(algorithm, inner_steps, 0.01))
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr)
    for _ in range(iterations):
        support, query = split(sinusoids(generator, tasks, 2 * SHOTS, frequency))
        optimizer.zero_grad()
        learner.meta_step(mlp_loss, support, query, tasks, measure_support=False)
        optimizer.step()
    return learner


def mse(learner: MetaLearner, steps: int, frequency: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """Mean error on 100 new points of 2,000 new tasks, and half the width of its 95 % interval over tasks.

    After more steps than it was trained for, MAML diverges on one task in some thousands, whose error is then
    most of the mean. So the worst 0.5 % of the tasks are left out there.
    """
    tasks = 2000
    support, query = split(sinusoids(torch.Generator().manual_seed(1), tasks, SHOTS + 100, frequency))
    losses = mlp_loss(learner.adapt(mlp_loss, support, tasks, steps=steps), query)
    if steps > learner.config.inner_steps:
        losses = losses.sort().values[: int(0.995 * tasks)]
    return losses.mean().item(), 1.96 * losses.std().item() / len(losses) ** 0.5


@pytest.mark.usefixtures("one_thread")
def test_sinusoids_are_learned_in_one_step_where_joint_training_fails() -> None:
    """1,000 iterations at three times the usual learning rate; bounds are about 1.3 times what was measured.

    Measured after 0, 1, 10 steps: MAML 3.07, 0.82, 0.36; FOMAML 3.78, 1.05, 0.46; Meta-SGD 3.06, 0.37, not
    trained for 10; the same network trained jointly 3.13, 2.54, 1.63. Predicting zero has an error of 4.25.
    """
    joint = train_sinusoids("maml", 1000, lr=3e-3, inner_steps=0)
    joint_one, joint_ten = mse(joint, 1)[0], mse(joint, 10)[0]
    for algorithm, one_bound, ten_bound in (("maml", 1.05, 0.5), ("fomaml", 1.35, 0.65)):
        learner = train_sinusoids(algorithm, 1000, lr=3e-3)
        zero, one, ten = (mse(learner, steps)[0] for steps in (0, 1, 10))
        assert ten < one < zero
        assert one < one_bound < 0.6 * joint_one
        assert ten < ten_bound < 0.5 * joint_ten
    assert mse(train_sinusoids("meta-sgd", 1000, lr=3e-3), 1)[0] < 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_maml_reproduces_the_sinusoids_of_its_paper() -> None:
    """The full setting: 70,000 iterations (the command in the MAML code's main.py), 25 tasks, Adam 1e-3.

    The paper prints no numbers. Its curve for K = 10 (figure "Quantitative sinusoid regression results", in
    the appendix) falls from about 3 over 0.4-0.5 after one step to 0.1-0.2 after nine (from descriptions
    of it, which differ).
    Measured after 0, 1 and 10 steps: 2.99, 0.326 +- 0.017, 0.095 +- 0.006 (203 s on a shared core).
    """
    learner = train_sinusoids("maml", 70_000)
    zero, one, ten = (mse(learner, steps)[0] for steps in (0, 1, 10))
    assert 2.7 < zero < 3.4
    assert one < 0.5
    assert ten < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("algorithm", "published", "interval"), [("maml", 0.77, 0.11), ("meta-sgd", 0.53, 0.09)])
def test_sinusoids_of_varying_frequency_reach_the_published_error(
    algorithm: str, published: float, interval: float
) -> None:
    """Table 1 of the Meta-SGD paper (arXiv:1707.09835), 10 shots in training and testing, one step.

    Its tasks have a frequency from U[0.8, 1.2] besides, and it trains 60,000 iterations of 4 tasks from
    truncated normal weights; the intervals are over 100 test tasks. The paper was not at hand when this was
    written: the setting and the 5-shot row are confirmed by the maml++ benchmark of PaddlePaddle/PARL, the
    10-shot row is quoted from memory. Measured: MAML 0.70 (0.72 with seed 1), Meta-SGD 0.49, each +- 0.03
    (170 and 196 s on a shared core).
    """
    frequency = (0.8, 1.2)
    learner = train_sinusoids(algorithm, 60_000, tasks=4, frequency=frequency, normal=True)
    error, own_interval = mse(learner, 1, frequency)
    assert abs(error - published) < math.hypot(interval, own_interval)
