"""TensorRT engines of a bundle: built with TensorRT-RTX anywhere, or with TensorRT where it is installed.

`build_engines` compiles every stage graph of a bundle into `engines/FORMAT/TARGET/`, one engine and one
sidecar a stage; `check` gives an engine to load once it has been proven to belong to the bundle, the library
and the GPU at hand.  Neither of the two libraries is imported before it is asked for.
"""

from asag_deploy.engines.build import BuildOptions, BuildReport, build_engines
from asag_deploy.engines.sidecar import Engine, Format, Sidecar, canvas_engines, check, engine_folder
from asag_deploy.engines.targets import Target, parse_target, this_gpu
from asag_deploy.processing.canvases import Canvas, default_canvases, parse_canvas

__all__ = [
    "BuildOptions",
    "BuildReport",
    "Canvas",
    "Engine",
    "Format",
    "Sidecar",
    "Target",
    "build_engines",
    "canvas_engines",
    "check",
    "default_canvases",
    "engine_folder",
    "parse_canvas",
    "parse_target",
    "this_gpu",
]
