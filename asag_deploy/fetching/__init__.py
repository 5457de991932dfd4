"""Bundles and checkpoints by their address: fetched once, and kept."""
