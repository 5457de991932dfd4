"""ASAG in PyTorch: the network, its settings, checkpoints, training and evaluation."""
