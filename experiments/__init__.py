"""Command line, training, comparison and reports (imported as `dsa_gym.experiments`)."""
