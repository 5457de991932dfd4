"""Data sets, metrics and evaluation reports; no PyTorch."""
