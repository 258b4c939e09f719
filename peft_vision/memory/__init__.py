"""How much memory a training step takes, before it is run: counted on tensors without numbers."""
