"""TQC over relaxed masks."""

from __future__ import annotations

from sb3_contrib import TQC

from dsa_gym.agents.sb3 import SoftActorCriticAgent


class TQCAgent(SoftActorCriticAgent):
    """Soft actor-critic with truncated quantile critics (Kuznetsov et al., 2020) on relaxed masks."""

    name = "tqc"
    algorithm_class = TQC
