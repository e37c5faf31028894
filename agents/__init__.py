"""Gating agents: one interface, one registry.

Agents know the Gymnasium API and, where they need more (an oracle, a gradient), the documented protocol
:class:`dsa_gym.agents.base.Scorer` that the environments offer as their attribute ``problem``.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsa_gym.agents.base import Agent

__all__ = ["AGENTS", "agent_class", "make_agent"]

AGENTS: dict[str, str] = {
    "ppo": "dsa_gym.agents.ppo:PPOAgent",
    "factored_ppo": "dsa_gym.agents.factored_ppo:FactoredPPOAgent",
    "a2c": "dsa_gym.agents.a2c:A2CAgent",
    "trpo": "dsa_gym.agents.trpo:TRPOAgent",
    "maskable_ppo": "dsa_gym.agents.maskable_ppo:MaskablePPOAgent",
    "recurrent_ppo": "dsa_gym.agents.recurrent_ppo:RecurrentPPOAgent",
    "ars": "dsa_gym.agents.ars:ARSAgent",
    "dqn": "dsa_gym.agents.dqn:DQNAgent",
    "qr_dqn": "dsa_gym.agents.qr_dqn:QRDQNAgent",
    "sac": "dsa_gym.agents.sac:SACAgent",
    "td3": "dsa_gym.agents.td3:TD3Agent",
    "tqc": "dsa_gym.agents.tqc:TQCAgent",
    "crossq": "dsa_gym.agents.crossq:CrossQAgent",
    "rloo": "dsa_gym.agents.rloo:RLOOAgent",
    "disarm": "dsa_gym.agents.disarm:DisARMAgent",
    "counterfactual": "dsa_gym.agents.counterfactual:CounterfactualAgent",
    "exact_gradient": "dsa_gym.agents.exact_gradient:ExactGradientAgent",
    "gumbel": "dsa_gym.agents.gumbel:GumbelAgent",
    "hard_concrete": "dsa_gym.agents.hard_concrete:HardConcreteAgent",
    "linucb": "dsa_gym.agents.linucb:LinUCBAgent",
    "neural_linear": "dsa_gym.agents.neural_linear:NeuralLinearAgent",
    "none": "dsa_gym.agents.fixed:NoneAgent",
    "all": "dsa_gym.agents.fixed:AllAgent",
    "random": "dsa_gym.agents.fixed:RandomAgent",
    "static": "dsa_gym.agents.searched:StaticAgent",
    "user_static": "dsa_gym.agents.searched:UserStaticAgent",
    "cross_entropy": "dsa_gym.agents.cross_entropy:CrossEntropyAgent",
    "coordinate_ascent": "dsa_gym.agents.coordinate_ascent:CoordinateAscentAgent",
    "magnitude": "dsa_gym.agents.magnitude:MagnitudeAgent",
    "fisher": "dsa_gym.agents.fisher:FisherAgent",
    "snip": "dsa_gym.agents.snip:SNIPAgent",
    "oracle": "dsa_gym.agents.searched:OracleAgent",
}
"""Name to ``module:class``; imported when it is asked for."""


def agent_class(name: str) -> type[Agent]:
    """The class of a registered agent.

    Raises:
        ValueError: If the name is not registered; the closest one is suggested.
    """
    if name not in AGENTS:
        close = get_close_matches(str(name), AGENTS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"agent={name!r}: expected one of {', '.join(AGENTS)}{hint}")
    module, _, attribute = AGENTS[name].partition(":")
    found: type[Agent] = getattr(import_module(module), attribute)
    return found


def make_agent(name: str, env: Any, seed: int = 0, **config: Any) -> Agent:
    """Make a registered agent for an environment.

    Args:
        name: A key of :data:`AGENTS`.
        env: A Gymnasium environment or a stable-baselines3 ``VecEnv`` with a ``Dict`` observation of vectors
            and a ``MultiBinary`` action.
        seed: Seeds everything random in the agent.
        **config: Overrides of the agent's tuned defaults (``agents/zoo/NAME.yaml``).

    Raises:
        ValueError: If the name, a setting or the environment's spaces do not fit.
    """
    return agent_class(name)(env, seed=seed, **config)
