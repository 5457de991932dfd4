"""The TensorRT backends, and the probing loop on the GPU."""
