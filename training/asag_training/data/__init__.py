"""Data sets: reading them, preparing images for training, and generating scenes."""
