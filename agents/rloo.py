"""REINFORCE with several masks per input, each the others' baseline."""

from __future__ import annotations

from dsa_gym.agents.policy_gradient import Batch, PolicyGradientAgent, bernoulli_log_prob, leave_one_out, scaled


class RLOOAgent(PolicyGradientAgent):
    """Policy gradient with a leave-one-out baseline (Kool et al., 2019; Ahmadian et al., 2024).

    Of K masks of an input, ``gradient = 1/K sum_k (r_k - mean_{j != k} r_j) grad log pi(m_k)``: unbiased, and how hard
    the input is does not enter.
    """

    name = "rloo"

    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """One gradient step."""
        logits = self.network(batch.observed)
        gates = batch.draw(logits, self.config["masks"])
        rewards = batch.rewards(gates)
        score = bernoulli_log_prob(logits[:, None], gates).sum(-1)  # (rows, masks)
        self.improve((scaled(leave_one_out(rewards)) * score).mean() / self.gates, logits)
        return rewards.numel(), {"train/reward": rewards.mean().item(), "train/density": gates.mean().item()}
