"""What an engine file says of itself.  (Real ones: test_rtx_builds.py and tests/export/test_engines.py.)"""

from __future__ import annotations

import pytest

from asag_deploy.engines.host_work import HostWork, read_host_work

QUIET = b"\x00profiling=0\n  tf32=0\n  stream_capturable=1\n  mem_alloc_algo=3\n\xff"
DECIDES = (
    b'  stream_capturable=0\n copy={ name="copy_d2h___mye7" output={"host" } stream=0 }\n'
    b'  cjmp={ name="cbr___mye9" input={"host" } op=gt target={bb1 bb2 } }\n'
)
SIZES = b"\x01\x80[ShapeHostToDeviceCopy 0]\x13[ShapeHostToDeviceCopy 1]"


@pytest.mark.parametrize(
    ("engine", "expected", "capturable", "host_memory"),
    [
        (QUIET, (True, 0, 0, 0), True, False),
        (QUIET + SIZES, (True, 0, 0, 2), True, True),
        (DECIDES, (False, 1, 1, 0), False, True),
        (QUIET + DECIDES, (False, 1, 1, 0), False, True),  # one program that cannot is enough
        (QUIET + b"cjmp={ name", (True, 1, 0, 0), False, False),  # whatever it claims
        (b"of another release", (False, 0, 0, 0), False, False),
    ],
)
def test_a_plan_is_read(
    engine: bytes, expected: tuple[bool, int, int, int], capturable: bool, host_memory: bool
) -> None:
    capturable_, decisions, to_host, shapes = expected
    plan = read_host_work(engine)
    assert plan == HostWork(
        stream_capturable=capturable_, decisions=decisions, copies_to_host=to_host, shape_copies=shapes
    )
    assert (plan.capturable, plan.host_memory) == (capturable, host_memory)
