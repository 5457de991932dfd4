"""The parity gate: exported graphs against the PyTorch network."""
