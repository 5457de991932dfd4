"""Compiled graphs as OpenVINO loads them: from the files of the cache, where their weights lie."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asag_deploy.backends.compiled_cache import CompiledCache
from asag_deploy.backends.resident_memory import MappedFile

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, Model

DEVICE = "CPU"
ONE_COMPILES = threading.Lock()
"""Held while a graph is compiled, which takes several times its weights."""


@dataclass(frozen=True)
class Compiled:
    """A compiled graph, and the file whose constants it reads where they lie; None if it holds them."""

    model: CompiledModel
    file: MappedFile | None = None


def compile_into(
    core: Core, cache: CompiledCache, key: str, model: Model, config: Mapping[str, Any]
) -> Compiled:
    """Compile a model, and put it into the cache; take it from there, where its weights are once."""
    compiled = core.compile_model(model, DEVICE, dict(config))
    cache.write(key, compiled.export_model().getvalue())
    return load_from(core, cache, key, config) or Compiled(compiled)


def load_from(core: Core, cache: CompiledCache, key: str, config: Mapping[str, Any]) -> Compiled | None:
    """Load what an earlier start compiled; None if there is nothing, or OpenVINO does not take it."""
    import openvino

    file = cache.map(key)
    if file is None:
        return None
    try:
        model = core.import_model(openvino.Tensor(file.content, shared_memory=True), DEVICE, dict(config))
    except Exception:  # whatever is wrong with it, compiling makes another
        return None
    file.leave_ram()
    return Compiled(model, file)
