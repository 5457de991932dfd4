"""Read what a TensorRT-RTX engine does on the host from its file; unlike the inspector, this needs no GPU.

An engine file is readable text in parts.  Its settings say whether the library allows a stream capture, and
its program lists what it does step by step: a jump that the host takes (`cjmp`), the copy of the condition to
the host before it (`copy_d2h`), and a layer that copies sizes from the host's memory to the GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CAPTURABLE = re.compile(rb"\bstream_capturable=([01])")
_DECISION = b"cjmp={"
_COPY_TO_HOST = b"copy_d2h"
_SHAPE_COPY = b"[ShapeHostToDeviceCopy"


@dataclass(frozen=True, kw_only=True)
class HostWork:
    """What keeps an engine from being captured in a CUDA graph.

    If an engine holds several programs, the numbers are those of all together.
    """

    stream_capturable: bool
    """True if every program says that it can be captured; false if none says anything."""
    decisions: int
    """Jumps that the host takes on what the GPU has computed, as in a loop or a branch."""
    copies_to_host: int
    """Copies that the host waits for."""
    shape_copies: int
    """Layers that copy sizes from the host's memory.  In a CUDA graph such a copy has a host source, which
    the body of a conditional node may not rely on."""

    @property
    def capturable(self) -> bool:
        """Whether a captured graph does what the engine does, whatever it is given."""
        return self.stream_capturable and self.decisions == 0 and self.copies_to_host == 0

    @property
    def host_memory(self) -> bool:
        """Whether it reads or writes memory of the host while it runs."""
        return self.shape_copies > 0 or self.copies_to_host > 0


def read_host_work(engine: bytes) -> HostWork:
    """Read the content of an engine file that TensorRT-RTX has built."""
    said = _CAPTURABLE.findall(engine)
    return HostWork(
        stream_capturable=bool(said) and all(value == b"1" for value in said),
        decisions=engine.count(_DECISION),
        copies_to_host=engine.count(_COPY_TO_HOST),
        shape_copies=engine.count(_SHAPE_COPY),
    )
