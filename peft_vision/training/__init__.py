"""Training: settings, the deterministic batch order, the trainer, checkpoints and logs."""
