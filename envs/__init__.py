"""Gymnasium environments over the gated system (imported as `dsa_gym.envs`)."""
