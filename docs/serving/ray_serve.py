"""ASAG on Ray Serve: a bundle in each replica, behind the HTTP proxy of Ray.

pip install 'asag-deploy' 'ray[serve]'
serve run ray_serve:app bundle=/models/bundle backend=onnxruntime

curl --data-binary @street.jpg 'http://127.0.0.1:8000/?threshold=0.5&max_level=P4'
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from asag_deploy import Detector
from asag_deploy.errors import AsagError, ImageError
from asag_deploy.images.reading import decode_image
from asag_deploy.serving.limits import RefusedError
from asag_deploy.serving.options import Asked, Defaults, read_asked

CALLS_AT_ONCE = 2
"""Of one replica, whose CPU threads are divided among them."""


@serve.deployment(
    ray_actor_options={"num_cpus": 2},
    max_ongoing_requests=8,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": CALLS_AT_ONCE},
)
class AsagDetector:
    """A detector; the same query parameters as `asag-serve`, and the same answers."""

    def __init__(self, bundle: str, backend: str | None = None, threshold: float = 0.3) -> None:
        """Load a bundle; raises what `Detector.load` does."""
        self._detector = Detector.load(bundle, backend=backend, requests=CALLS_AT_ONCE)
        self._defaults = Defaults(threshold=threshold)
        self._turns = asyncio.Semaphore(CALLS_AT_ONCE)

    async def __call__(self, request: Request) -> JSONResponse:
        """Detect in the image file that is the body."""
        try:
            asked = read_asked(request.query_params.multi_items(), self._detector.manifest, self._defaults)
            data = await request.body()
            async with self._turns:
                return JSONResponse(await asyncio.to_thread(self._detect, data, asked))
        except RefusedError as error:
            return JSONResponse({"error": error.sentence}, status_code=int(error.status))
        except ImageError as error:
            return JSONResponse({"error": str(error)}, status_code=422)
        except AsagError as error:
            return JSONResponse({"error": str(error)}, status_code=500)

    def _detect(self, data: bytes, asked: Asked) -> dict[str, Any]:
        image = decode_image(data, "request body")
        options = {"deadline_ms": asked.deadline_ms, **asked.call}
        return asked.of(self._detector(image, channel_order="rgb", **options)).to_json()


def app(arguments: dict[str, str]) -> serve.Application:
    """Make the application of the arguments of `serve run`: bundle, and backend if it is not ONNX Runtime."""
    return AsagDetector.bind(arguments["bundle"], arguments.get("backend"))
