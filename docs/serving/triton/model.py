"""ASAG in Triton's Python backend: the same input, outputs and parameters as `asag-serve` has.

Input `image`: image files, BYTES [n].  Outputs: `asag_deploy.serving.tensors.OUTPUTS`.  A request's
parameters are the options of a call (threshold, mode, max_level, ...); its timeout is a deadline.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from asag_deploy import Detector
from asag_deploy.errors import AsagError
from asag_deploy.images.reading import decode_image
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import Defaults, read_asked
from asag_deploy.serving.protocol import tensors_of

MICROSECONDS = 1000


class TritonPythonModel:
    """What the backend makes once for each instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that config.pbtxt names."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: value["string_value"] for name, value in parameters.items()}
        self._detector = Detector.load(values["bundle"], backend=values.get("backend"))
        self._defaults = Defaults(threshold=float(values.get("threshold", "0.3")))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with tensors or with the sentence of what is wrong."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Let go of the network."""
        self._detector.close()

    def _answer(self, request: Any) -> Any:
        try:
            given = json.loads(request.parameters() or "{}")
            if request.timeout():
                given.setdefault("deadline_ms", request.timeout() / MICROSECONDS)
            asked = read_asked(given.items(), self._detector.manifest, self._defaults)
            images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
            found = [
                asked.of(
                    self._detector(
                        decode_image(bytes(data), f"image {number}"),
                        channel_order="rgb",
                        deadline_ms=asked.deadline_ms,
                        **asked.call,
                    )
                )
                for number, data in enumerate(images)
            ]
        except (RefusedError, AsagError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = {
            name: np.array([text.encode() for text in tensor], dtype=np.object_)
            if name == "trace"
            else tensor
            for name, tensor in tensors_of(found).items()
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensor) for name, tensor in tensors.items()])
