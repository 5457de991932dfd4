"""From a checkpoint to a bundle: stage graphs, the parity gate and the manifest."""
