"""TensorRT engines of a bundle: built with TensorRT-RTX anywhere, or with TensorRT where it is installed.

`build_engines` compiles every stage graph of a bundle into `engines/FORMAT/TARGET/`, one engine and one
sidecar a stage; `check` gives an engine to load once it has been proven to belong to the bundle, the library
and the GPU at hand.  Neither of the two libraries is imported before it is asked for.
"""

from asag_deploy.engines.build import BuildOptions, BuildReport, build_engines
from asag_deploy.engines.sidecar import Engine, Format, Sidecar, check, engine_folder
from asag_deploy.engines.targets import Target, parse_target, this_gpu

__all__ = [
    "BuildOptions",
    "BuildReport",
    "Engine",
    "Format",
    "Sidecar",
    "Target",
    "build_engines",
    "check",
    "engine_folder",
    "parse_target",
    "this_gpu",
]
