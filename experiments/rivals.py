"""Timing of the text environment against what a user would build instead, and against the floor, in one run."""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM

from dsa_gym import pathways, storage
from dsa_gym.backbone import resolve_source
from dsa_gym.domains import Examples, take
from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.experiments.bench import different_users, interleaved, machine, quartiles, visit_all
from dsa_gym.experiments.made_bundle import make_bundle

TABLE_ENVS = 4096
"""Environments of a batch of look-ups."""

LABELS = {
    "step": "environment step, with adapters",
    "upper_half": "step with adapters in the upper half only",
    "nothing_kept": "step that computes everything anew",
    "bfloat16": "step in bfloat16",
    "compiled": "step under torch.compile",
    "layerwise": "layerwise episode",
    "hugging_face": "Hugging Face, eager, no adapters, process of its own",
    "hugging_face_kept": "the same with freed memory kept",
    "products": "matrix products alone",
    "dummy": "DummyVecEnv of scalar environments",
    "peft": "peft, mixed batch of LoRAs",
}


def rivals(
    *,
    num_envs: Sequence[int] = (64, 256),
    repetitions: int = 20,
    ppo_steps: int = 262_144,
    users: Sequence[int] = (100, 10_000, 100_000),
    seed: int = 0,
) -> dict[str, Any]:
    """Time the text environment and its rivals on the shipped bundle, all users and masks different, caches off.

    Args:
        num_envs: Environments in a batch. ``bfloat16``, ``dummy`` and ``peft`` are measured at the
            first number only: they take minutes or tens of gigabytes at more.
        repetitions: Timed repetitions of each, interleaved.
        ppo_steps: Steps of stable-baselines3's PPO on the table environment.
        users: Users of the bundles that the scaling is measured with.
        seed: Seeds inputs, masks and policies.

    Returns:
        ``batches``, by number of environments: ``milliseconds`` of a batch (median and quartiles) of everything in
        :data:`LABELS`, and ``share``, quartiles of each over ``step``, repetition by repetition. Hugging Face and peft
        (one LoRA per user, mixed in a batch by ``adapter_names``; if it is installed) run in a process of their own, as
        they do for a user. ``difference``: largest differences of losses from ``step``. ``profile``: shares of a step.
        ``cache``: a converged policy on a fixed split with and without the cache of losses. ``scaling``: milliseconds
        per environment at other sizes of the batch. ``users``: milliseconds of a step by users in the bundle.
        ``table`` and ``ppo``: steps per second. Machine and versions.

    Raises:
        ValueError: If a number is out of range.
    """
    numbers = (("num_envs", min(num_envs), 1), ("repetitions", repetitions, 2), ("ppo_steps", ppo_steps, 1),
               ("users", min(users, default=1), 1))  # fmt: skip
    for name, value, least in numbers:
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    if seed < 0:
        raise ValueError(f"seed={seed}: expected an integer >= 0")
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(Path(folder) / "upper", users=200, numbers=6000, first_layer=2, seed=seed)
        batches, difference = {}, {}
        for count in num_envs:
            batches[count], difference[count] = _batch(
                count, repetitions, seed, str(Path(folder) / "upper"), everything=count == num_envs[0]
            )
    return {
        "batches": batches,
        "difference": difference,
        "repetitions": repetitions,
        "seed": seed,
        "profile": _profile(num_envs[0], seed),
        "cache": _cache(num_envs[0], seed),
        "scaling": {count: _per_environment(count, seed) for count in (64, 256, 1024)},
        "users": {count: _alone(_with_users, count, repetitions, seed) for count in users},
        "table": _table_rate(seed),
        "ppo": _ppo_rate(ppo_steps, seed),
        "machine": machine(),
        "versions": storage.versions(),
    }


def _batch(
    count: int, repetitions: int, seed: int, upper_half: str, *, everything: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """One size of the batch, interleaved; without ``everything`` not what takes minutes or much memory."""
    envs: Any = gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0)
    inputs, gates = different_users(envs, seed)
    problem = envs.problem
    variants: dict[str, Any] = {
        "compiled": gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0, compile=True),
        "nothing_kept": gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0, state_bytes=0),
        "upper_half": gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0, bundle=upper_half),
    }
    if everything:
        variants["bfloat16"] = gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0, dtype="bfloat16")
    for variant in variants.values():
        different_users(variant, seed)
    visit_all(
        problem, *(variant.problem for name, variant in variants.items() if name not in ("nothing_kept", "compiled"))
    )
    layered: Any = gym.make_vec("DSA-TextLayerwise-v0", num_envs=count)
    layered.reset(seed=seed)
    generator = np.random.default_rng(seed)
    per_layer = (generator.random((4, count, layered.single_action_space.n)) < 0.5).astype(np.int8)
    examples = take(problem.bundle.examples, problem.rows[torch.from_numpy(inputs)])
    domain, model = problem.model.domain, _hugging_face(problem.bundle.manifest["backbone"]["source"])
    functions: dict[str, Callable[[], object]] = {
        "step": lambda: envs.step(gates),
        **{name: partial(variant.step, gates) for name, variant in variants.items()},
        "products": _products(problem.model, examples),
        "hugging_face_kept": lambda: _loss(model, domain.prefix_tokens, examples),
        "layerwise": lambda: [layered.step(actions) for actions in per_layer],
    }
    if everything:
        dummy = DummyVecEnv([lambda: gym.make("DSA-Text-v0", cache_bytes=0)] * count)
        dummy.reset()
        functions["dummy"] = lambda: dummy.step(gates)
    arguments = (problem.bundle.manifest["backbone"]["source"], domain.prefix_tokens, examples, everything)
    with _rivals_process(arguments) as theirs, torch.inference_mode():
        timed = interleaved(functions, repetitions, theirs)
    losses = problem.compute_losses(inputs, gates)
    difference = {
        name: float(np.abs(variant.problem.compute_losses(inputs, gates) - losses).max())
        for name, variant in variants.items()
        if name != "upper_half"  # another problem
    }
    step = np.asarray(timed["step"])
    result = {
        "milliseconds": {name: quartiles(np.asarray(values)) for name, values in timed.items()},
        "share": {name: quartiles(np.asarray(values) / step) for name, values in timed.items() if name != "step"},
    }
    return result, difference


def _hugging_face(source: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        resolve_source(source), attn_implementation="eager", dtype=torch.float32
    ).eval()


def _loss(model: Any, prefix: int, examples: Examples, **arguments: Any) -> Tensor:
    """Loss per row as it is usually written: logits, then the cross-entropy over their transposition."""
    tokens = examples["tokens"].long()
    positions = torch.arange(prefix - 1, tokens.shape[1] - 1)
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=positions, use_cache=False, **arguments).logits
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, prefix:], reduction="none")
    scored = positions + 1 < examples["length"][:, None]
    return (loss * scored).sum(1) / scored.sum(1)


@contextmanager
def _rivals_process(arguments: tuple[Any, ...]) -> Iterator[dict[str, Callable[[], float]]]:
    """Functions that let another process do the rivals' work and return the milliseconds that it took there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
    process.start()

    def ask(name: str) -> float:
        ours.send(name)
        return float(ours.recv())

    try:
        yield {name: partial(ask, name) for name in ours.recv()}
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, source: str, prefix: int, examples: Examples, with_peft: bool) -> None:
    """What the rivals' process does until it is killed."""
    model = _hugging_face(source)
    functions: dict[str, Callable[[], object]] = {"hugging_face": lambda: _loss(model, prefix, examples)}
    if with_peft and importlib.util.find_spec("peft"):  # not among our requirements
        functions["peft"] = _peft(source, prefix, examples)
    connection.send(list(functions))
    with torch.inference_mode():
        while True:
            function = functions[connection.recv()]
            began = time.perf_counter()
            function()
            connection.send(1000 * (time.perf_counter() - began))


def _peft(source: str, prefix: int, examples: Examples) -> Callable[[], object]:
    """The same model with one LoRA per row in a mixed batch."""
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]

    config = LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    names = [f"user{row}" for row in range(len(examples["length"]))]
    model: Any = get_peft_model(_hugging_face(source), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    return lambda: _loss(model, prefix, examples, adapter_names=names)


def _products(adapted: Any, examples: Examples) -> Callable[[], object]:
    """The matrix products of one adapted forward over these examples, on random numbers of their shapes."""
    calls: list[Callable[[], object]] = []
    rows, length = examples["tokens"].shape
    length -= 1
    hooks = []

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        states = arguments[0].flatten(0, -2)
        left, right = torch.randn(states.shape), torch.randn(states.shape[1], output.shape[-1])
        calls.append(lambda: left @ right)

    for module in adapted.backbone.model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            hooks.append(module.register_forward_hook(note))
    adapted.losses(examples, None)
    for hook in hooks:
        hook.remove()
    config = adapted.backbone.config
    heads, width = config.num_attention_heads, config.hidden_size
    query = torch.randn(rows * heads, length, width // heads)
    for _ in range(config.num_hidden_layers):
        calls.append(lambda: (query @ query.transpose(1, 2)) @ query)
    up = torch.randn(rows, width, adapted.shape.rank)
    states = torch.randn(rows, length, width)
    for _ in adapted.shape.sites:
        calls.append(lambda: (states @ up) @ up.transpose(1, 2))
    return lambda: [call() for call in calls]


def _profile(count: int, seed: int) -> dict[str, float]:
    """Shares of a step: ``matrix_products``, ``attention``, ``adapters``, ``other_kernels``, ``python``."""
    envs: Any = gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0)
    _, gates = different_users(envs, seed)
    visit_all(envs.problem)
    call = pathways.ActiveAdapters.__call__

    def marked(self: pathways.ActiveAdapters, hidden: Tensor, site: int) -> Tensor:
        with record_function("adapters"):
            return call(self, hidden, site)

    seconds = dict.fromkeys(("matrix_products", "attention", "adapters", "other_kernels"), 0.0)
    pathways.ActiveAdapters.__call__ = marked  # type: ignore[method-assign]
    try:
        envs.step(gates)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            began = time.perf_counter()
            for _ in range(10):
                envs.step(gates)
            total = time.perf_counter() - began
    finally:
        pathways.ActiveAdapters.__call__ = call  # type: ignore[method-assign]
    for event in profiled.events():
        parent, name = event.cpu_parent, event.name
        while parent is not None and parent.name != "adapters":
            parent = parent.cpu_parent
        if not name.startswith("aten::"):
            continue
        if parent is not None:
            part = "adapters"
        elif "attention" in name:
            part = "attention"
        else:
            part = "matrix_products" if re.fullmatch(r"aten::(add)?(b?)(add)?mm_?", name) else "other_kernels"
        seconds[part] += event.self_cpu_time_total / 1e6
    shares = {name: value / total for name, value in seconds.items()}
    return shares | {"python": 1 - sum(shares.values())}


def _cache(count: int, seed: int) -> dict[str, float]:
    """The reference gate at 64 gates, which no table serves, on the test split with and without the cache."""
    rewards: dict[str, list[np.ndarray]] = {}
    result: dict[str, float] = {}
    for name, size in (("with", 64 * 2**20), ("without", 0)):
        envs: Any = gym.make_vec("DSA-Text-v0", num_envs=count, split="test", granularity="site", cache_bytes=size)
        envs.reset(seed=seed)
        problem, times, rewards[name] = envs.problem, [], []
        masks = problem.reference_gates()
        problem.compute_losses(np.arange(count), masks[:count])
        generator = np.random.default_rng(seed)
        for _ in range(40):
            inputs = generator.integers(0, len(problem), count)
            envs.reset(options={"input": inputs})
            began = time.perf_counter()
            rewards[name].append(envs.step(masks[inputs])[1])
            times.append(1000 * (time.perf_counter() - began))
        result[f"{name}_milliseconds"] = float(np.mean(times))
        if size:
            result["hit_rate"] = problem.hit_rate
    difference = np.abs(np.asarray(rewards["with"]) - np.asarray(rewards["without"])).max()
    return result | {"largest_difference": float(difference)}


def _per_environment(count: int, seed: int) -> float:
    """Milliseconds per environment of a step of a batch, the median of five."""
    envs: Any = gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0)
    _, gates = different_users(envs, seed)
    visit_all(envs.problem)
    times = interleaved({"step": lambda: envs.step(gates)}, 5)["step"]
    return float(np.median(times)) / count


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, whose memory is nothing else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _with_users(count: int, repetitions: int, seed: int) -> dict[str, float]:
    """A step of 64 environments over a bundle of so many users, every step with users drawn anew."""
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(Path(folder), users=count, seed=seed)
        began = time.perf_counter()
        # the fraction of inputs whose states fit differs between these bundles: none are kept in any
        envs: Any = gym.make_vec("DSA-Text-v0", num_envs=64, bundle=folder, cache_bytes=0, state_bytes=0)
        envs.reset(seed=seed)
        envs.action_space.seed(seed)
        envs.step(envs.action_space.sample())
        opened = time.perf_counter() - began
        times = interleaved({"step": lambda: envs.step(envs.action_space.sample())}, repetitions)["step"]
        return {**quartiles(np.asarray(times)), "seconds_to_open": opened, "own_megabytes": _own_memory()}


def _own_memory() -> float:
    """Resident memory of this process that is no file's, in MB; NaN where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else float("nan")


def _table_rate(seed: int) -> float:
    """Steps per second of a batch of look-ups, the median of five times 100 steps."""
    envs: Any = gym.make_vec("DSA-TextTable-v0", num_envs=TABLE_ENVS)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    actions = envs.action_space.sample()
    times = interleaved({"step": lambda: [envs.step(actions) for _ in range(100)]}, 5)["step"]
    return 1000 * 100 * TABLE_ENVS / float(np.median(times))


def _ppo_rate(steps: int, seed: int) -> float:
    """Environment steps per second of stable-baselines3's PPO, learning included."""
    envs = make_sb3_vec_env("DSA-TextTable-v0", TABLE_ENVS)
    agent = PPO("MultiInputPolicy", envs, gamma=0.0, n_steps=16, batch_size=16_384, n_epochs=2, seed=seed, device="cpu")
    agent.learn(16 * TABLE_ENVS)
    began = time.perf_counter()
    agent.learn(steps)
    done = -(-steps // (16 * TABLE_ENVS)) * 16 * TABLE_ENVS
    return done / (time.perf_counter() - began)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the timings."""
    for count, batch in result["batches"].items():
        table = Table(title=f"DSA-Text-v0, {count} environments, users and masks, reward caches off")
        for name in ("what", "ms, median [quartiles]", "over the step"):
            table.add_column(name, justify="left" if name == "what" else "right")
        for name, label in LABELS.items():
            if name in batch["milliseconds"]:
                value, share = batch["milliseconds"][name], batch["share"].get(name)
                times = f"{share['median']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" if share else ""
                table.add_row(label, f"{value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}]", times)
        console.print(table)
        differences = ", ".join(f"{name} {value:.2g}" for name, value in result["difference"][count].items())
        console.print(f"largest difference of a loss from the step's: {differences}")
    console.print("a step is " + ", ".join(f"{name} {value:.0%}" for name, value in result["profile"].items()))
    cache = result["cache"]
    console.print(
        f"cache of losses, converged policy: {cache['hit_rate']:.0%} hits, {cache['with_milliseconds']:.1f} ms a step "
        f"against {cache['without_milliseconds']:.1f}, largest difference {cache['largest_difference']:.2g}"
    )
    scaling = ", ".join(f"{value:.2f} at {count:,}" for count, value in result["scaling"].items())
    console.print(f"milliseconds per environment: {scaling}")
    for count, value in result["users"].items():
        console.print(
            f"{count:,} users: {value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}] ms a step of 64 "
            f"environments, {value['seconds_to_open']:.1f} s to open, {value['own_megabytes']:.0f} MB resident"
        )
    console.print(
        f"look-ups: {result['table']:,.0f} steps per second at {TABLE_ENVS:,} environments; PPO over them: "
        f"{result['ppo']:,.0f}"
    )
    console.print(f"machine: {result['machine']}")
