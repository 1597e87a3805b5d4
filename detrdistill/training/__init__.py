"""Training loop, evaluation, checkpoints and logs."""
