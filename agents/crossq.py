"""CrossQ over relaxed masks."""

from __future__ import annotations

from sb3_contrib import CrossQ

from dsa_gym.agents.sb3 import SoftActorCriticAgent


class CrossQAgent(SoftActorCriticAgent):
    """Soft actor-critic with batch normalisation, without target networks (Bhatt et al., 2024), on relaxed masks."""

    name = "crossq"
    algorithm_class = CrossQ
