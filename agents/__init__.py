"""Gating agents; they know only the Gymnasium API (imported as `dsa_gym.agents`)."""
