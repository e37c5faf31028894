"""Timing of the environments against what a user would build instead, and against the floor, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dsa_gym import storage
from dsa_gym.backbone import resolve_source
from dsa_gym.bundle import Bundle
from dsa_gym.domains import Examples, take
from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.experiments.bench import different_users, interleaved, machine, quartiles

TABLE_ENVS = 4096
"""Environments of a batch of look-ups."""


def rivals(*, num_envs: int = 64, repetitions: int = 20, ppo_steps: int = 262_144, seed: int = 0) -> dict[str, Any]:
    """Time the text environment and its rivals on the shipped bundle, all users and masks different, caches off.

    Args:
        num_envs: Environments in the batch.
        repetitions: Timed repetitions of each, interleaved.
        ppo_steps: Steps of stable-baselines3's PPO on the table environment.
        seed: Seeds inputs, masks and policies.

    Returns:
        ``milliseconds`` of a batch (median and quartiles): ``products`` (the matrix products of the adapted model
        alone, the floor), ``hugging_face`` (the frozen model as Hugging Face runs it with eager attention, without any
        adapter), ``step``, ``layerwise`` (a whole episode), ``dummy`` (scalar environments in a ``DummyVecEnv``) and,
        if peft is installed, ``peft`` (one LoRA per user, mixed in a batch by ``adapter_names``). ``share``: quartiles
        of each over ``step``, repetition by repetition. ``table`` and ``ppo``: steps per second. ``scaling``:
        milliseconds per environment at other sizes of the batch. Machine and versions.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value, least in (("num_envs", num_envs, 1), ("repetitions", repetitions, 2), ("ppo_steps", ppo_steps, 1)):
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
    envs: Any = gym.make_vec("DSA-Text-v0", num_envs=num_envs, cache_bytes=0)
    layered: Any = gym.make_vec("DSA-TextLayerwise-v0", num_envs=num_envs)
    generator = np.random.default_rng(seed)
    inputs, gates = different_users(envs, seed)
    dummy = DummyVecEnv([lambda: gym.make("DSA-Text-v0", cache_bytes=0)] * num_envs)
    dummy.reset()
    layered.reset(seed=seed)
    per_layer = (generator.random((4, num_envs, layered.single_action_space.n)) < 0.5).astype(np.int8)
    problem = envs.problem
    examples = take(problem.bundle.examples, problem.rows[torch.from_numpy(inputs)])
    model = _hugging_face(problem.bundle)
    functions: dict[str, Callable[[], object]] = {
        "products": _products(problem.model, examples),
        "hugging_face": lambda: _loss(model, problem.model.domain, examples),
        "step": lambda: envs.step(gates),
        "layerwise": lambda: [layered.step(actions) for actions in per_layer],
        "dummy": lambda: dummy.step(gates),
    }
    with suppress(ImportError):  # peft is not among our requirements
        functions["peft"] = _peft(problem.bundle, problem.model.domain, examples)
    with torch.inference_mode():
        timed = {name: np.asarray(values) for name, values in interleaved(functions, repetitions).items()}
    return {
        "num_envs": num_envs,
        "repetitions": repetitions,
        "seed": seed,
        "milliseconds": {name: quartiles(values) for name, values in timed.items()},
        "share": {name: quartiles(values / timed["step"]) for name, values in timed.items() if name != "step"},
        "scaling": {count: _per_environment(count, seed) for count in (64, 256, 1024)},
        "table": _table_rate(seed),
        "ppo": _ppo_rate(ppo_steps, seed),
        "machine": machine(),
        "versions": storage.versions(),
    }


def _hugging_face(bundle: Bundle) -> Any:
    source = resolve_source(bundle.manifest["backbone"]["source"])
    return AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", dtype=torch.float32).eval()


def _loss(model: Any, domain: Any, examples: Examples, **arguments: Any) -> Tensor:
    """Loss per row as it is usually written: logits, then the cross-entropy over their transposition."""
    tokens = examples["tokens"].long()
    positions = torch.arange(domain.prefix_tokens - 1, tokens.shape[1] - 1)
    logits = model(input_ids=tokens[:, :-1], logits_to_keep=positions, use_cache=False, **arguments).logits
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, domain.prefix_tokens :], reduction="none")
    scored = positions + 1 < examples["length"][:, None]
    return (loss * scored).sum(1) / scored.sum(1)


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


def _peft(bundle: Bundle, domain: Any, examples: Examples) -> Callable[[], object]:
    """The same model with one LoRA per row in a mixed batch."""
    from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]

    config = LoraConfig(r=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    names = [f"user{row}" for row in range(len(examples["length"]))]
    model: Any = get_peft_model(_hugging_face(bundle), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    return lambda: _loss(model, domain, examples, adapter_names=names)


def _per_environment(count: int, seed: int) -> float:
    """Milliseconds per environment of a step of a batch, the median of five."""
    envs: Any = gym.make_vec("DSA-Text-v0", num_envs=count, cache_bytes=0)
    _, gates = different_users(envs, seed)
    times = interleaved({"step": lambda: envs.step(gates)}, 5)["step"]
    return float(np.median(times)) / count


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
    table = Table(title=f"DSA-Text-v0, {result['num_envs']} environments and users, caches off")
    for name in ("what", "ms, median [quartiles]", "over the step"):
        table.add_column(name, justify="left" if name == "what" else "right")
    labels = {
        "step": "environment step, with adapters",
        "hugging_face": "Hugging Face, eager, no adapters",
        "products": "matrix products alone",
        "layerwise": "layerwise episode",
        "dummy": "DummyVecEnv of scalar environments",
        "peft": "peft, mixed batch of LoRAs",
    }
    for name, label in labels.items():
        if name in result["milliseconds"]:
            value, share = result["milliseconds"][name], result["share"].get(name)
            times = f"{share['median']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" if share else ""
            table.add_row(label, f"{value['median']:.1f} [{value['low']:.1f}, {value['high']:.1f}]", times)
    console.print(table)
    scaling = ", ".join(f"{value:.2f} at {count}" for count, value in result["scaling"].items())
    console.print(f"milliseconds per environment: {scaling}")
    console.print(
        f"look-ups: {result['table']:,.0f} steps per second at {TABLE_ENVS:,} environments; PPO over them: "
        f"{result['ppo']:,.0f}"
    )
    console.print(f"machine: {result['machine']}")
