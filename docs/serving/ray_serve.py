"""ASAG on Ray Serve: a bundle in each replica, behind the HTTP proxy of Ray.

pip install 'asag-deploy[serve]' 'ray[serve]'
serve run ray_serve:app bundle=/models/bundle backend=onnxruntime threshold=0.3

curl --data-binary @street.jpg 'http://127.0.0.1:8000/?threshold=0.5&max_level=P4'
curl -F image=@street.jpg -F max_level=P4 http://127.0.0.1:8000/
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from asag_deploy import Detector
from asag_deploy.errors import AsagError, ConfigError, ImageError
from asag_deploy.images.reading import decode_image
from asag_deploy.plain_numbers import real
from asag_deploy.serving.forms import form_of
from asag_deploy.serving.limits import Limits, RefusedError
from asag_deploy.serving.options import Asked, Deadline, Defaults, check_threshold, read_asked
from asag_deploy.serving.requests import ClientGone, body_of, is_form

CALLS_AT_ONCE = 2
"""Of one replica, whose CPU threads are divided among them."""
LIMITS = Limits()
"""Of bodies: as `asag-serve` has them."""
ARGUMENTS = ("bundle", "backend", "threshold")


@serve.deployment(
    ray_actor_options={"num_cpus": 2},
    max_ongoing_requests=8,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": CALLS_AT_ONCE},
)
class AsagDetector:
    """A detector; the same parameters as `asag-serve`, in the query or a form, and the same answers."""

    def __init__(self, bundle: str, backend: str | None = None, threshold: float = 0.3) -> None:
        """Load a bundle; raises what `Detector.load` does."""
        self._detector = Detector.load(bundle, backend=backend, requests=CALLS_AT_ONCE)
        self._defaults = Defaults(threshold=threshold)
        self._turns = asyncio.Semaphore(CALLS_AT_ONCE)

    async def __call__(self, request: Request) -> JSONResponse:
        """Detect in the image file that is the body, or the form's; a deadline counts from here."""
        arrived = time.perf_counter()
        try:
            return JSONResponse(await self._answer(request, arrived))
        except RefusedError as error:
            return _refusal(error.sentence, int(error.status), error.headers)
        except ImageError as error:
            return _refusal(str(error), 422)
        except ConfigError as error:
            return _refusal(str(error), 400)
        except AsagError as error:
            return _refusal(str(error), 500)
        except ClientGone:
            return _refusal("the client went away", 400)  # nobody reads it

    async def _answer(self, request: Request, arrived: float) -> dict[str, Any]:
        query, manifest = request.query_params.multi_items(), self._detector.manifest
        asked = read_asked(query, manifest, self._defaults)
        deadline = Deadline(arrived, asked.deadline_ms)
        if is_form(request):
            form = await form_of(request, LIMITS, deadline)
            data, name = form.image, "file of the form"
            asked = read_asked([*query, *form.fields], manifest, self._defaults)
            deadline = Deadline(arrived, asked.deadline_ms)
        else:
            data, name = await body_of(request, LIMITS, deadline), "request body"
        async with self._turns:
            deadline.check()
            return await asyncio.to_thread(self._detect, data, name, asked, deadline)

    def _detect(self, data: bytes, name: str, asked: Asked, deadline: Deadline) -> dict[str, Any]:
        image = decode_image(data, name, max_pixels=LIMITS.max_pixels)
        found = self._detector(image, channel_order="rgb", **deadline.added_to(asked.call))
        return asked.of(found).to_json()


def app(arguments: dict[str, str]) -> serve.Application:
    """Make the application of the arguments of `serve run`: the bundle, and what is not as usual.

    Raises ConfigError, with one sentence, for what is missing, unknown or makes no sense.
    """
    unknown = [name for name in arguments if name not in ARGUMENTS]
    if unknown:
        raise ConfigError(f"there is no argument '{unknown[0]}'; there are {', '.join(ARGUMENTS)}")
    if "bundle" not in arguments:
        raise ConfigError("no bundle is named; say `serve run ray_serve:app bundle=/models/bundle`")
    threshold = real(str(arguments.get("threshold", "0.3")))
    if threshold is None:
        raise ConfigError(f"threshold is '{arguments['threshold']}', which is not a number between 0 and 1")
    check_threshold(threshold)
    return AsagDetector.bind(arguments["bundle"], arguments.get("backend"), threshold)


def _refusal(sentence: str, status: int, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status, headers=headers)
