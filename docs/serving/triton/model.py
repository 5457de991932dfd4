"""ASAG in Triton's Python backend: the same input, outputs and parameters as `asag-serve` has.

Input `image`: image files, BYTES [n].  Outputs: `asag_deploy.serving.tensors.OUTPUTS`.  A request's
parameters are the options of a call (threshold, mode, max_level, ...); its timeout is a deadline, of all its
images together, from when Triton gives the request to the model.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from asag_deploy import Detector
from asag_deploy.errors import AsagError, ConfigError
from asag_deploy.images.reading import decode_image
from asag_deploy.plain_numbers import real
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import Deadline, Defaults, read_asked
from asag_deploy.serving.protocol import TIMEOUT, deadline_name, named, tensors_of, with_deadline
from asag_deploy.serving.tensors import MOST_IMAGES


class TritonPythonModel:
    """What the backend makes once for each instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that config.pbtxt names; raises ConfigError for what it does not say rightly."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in parameters.items()}
        if "bundle" not in values:
            raise ConfigError("config.pbtxt has no parameter 'bundle'; it has to be the bundle's folder")
        threshold = real(values.get("threshold", "0.3"))
        if threshold is None or not 0 <= threshold <= 1:
            raise ConfigError(
                f"config.pbtxt's parameter 'threshold' is '{values['threshold']}', which is not a number "
                "between 0 and 1"
            )
        self._defaults = Defaults(threshold=threshold)
        self._detector = Detector.load(values["bundle"], backend=values.get("backend"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with tensors or with the sentence of what is wrong; one harms no other."""
        arrived = time.perf_counter()
        return [self._answer(request, arrived) for request in requests]

    def finalize(self) -> None:
        """Let go of the network."""
        self._detector.close()

    def _answer(self, request: Any, arrived: float) -> Any:
        try:
            tensors = self._tensors(request, arrived)
        except (RefusedError, AsagError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        except Exception:
            # What is raised out of `execute` is the answer to every request of the call.
            logging.getLogger(__name__).exception("the model failed at a request")
            sentence = "the model failed at this request; the server's log says why"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(sentence))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensor) for name, tensor in tensors.items()])

    def _tensors(self, request: Any, arrived: float) -> dict[str, Any]:
        given = list(json.loads(request.parameters() or "{}").items())
        if request.timeout():
            given.append((TIMEOUT, request.timeout()))
        asked = read_asked(with_deadline(given), self._detector.manifest, self._defaults)
        deadline = Deadline(arrived, asked.deadline_ms, name=deadline_name(given))
        found = []
        for data, name in named(_images(request)):
            deadline.check()
            image = decode_image(data, name)
            one = self._detector(image, channel_order="rgb", **deadline.added_to(asked.call))
            found.append(asked.of(one))
        return {
            name: np.array([text.encode() for text in tensor], dtype=np.object_)
            if name == "trace"
            else tensor
            for name, tensor in tensors_of(found).items()
        }


def _images(request: Any) -> list[bytes]:
    """Return the image files of a request; raises ConfigError for what are none, or too many."""
    images = list(pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1))
    if not 1 <= len(images) <= MOST_IMAGES:
        raise ConfigError(f"the input 'image' holds {len(images)} images; send 1 to {MOST_IMAGES}")
    if not all(isinstance(data, bytes) for data in images):
        raise ConfigError("the input 'image' holds what are no bytes; send image files, as BYTES")
    return images
