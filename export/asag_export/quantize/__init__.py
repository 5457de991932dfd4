"""Post-training quantisation: a float32 bundle and pictures become an INT8 bundle.  Takes no PyTorch."""
