"""Post-training quantisation: a float32 bundle and pictures become an INT8 bundle.  Takes no PyTorch."""

import asag_deploy  # noqa: F401 (it keeps ONNX Runtime silent, whose quantiser is imported here)
