"""A training run: forward pass, optimiser, loop, log and checkpoints."""
