"""Let `asag-detect` and `asag-serve` work for long, and see that they hold no more in the end than before.

    python tests/endurance/soak.py
    python tests/endurance/soak.py --pictures 300 --requests 400 --output /tmp/soak.json

Ten thousand pictures, some damaged, go through one process of `asag-detect`, into pictures and JSON; then as
many requests through one `asag-serve`, from 32 clients at once, a third of them bad ones.  Memory stays flat,
no descriptor and no thread is left, every answer is that of one client alone.  The report goes to `results/`,
the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asag_bench.measuring.machine import describe_machine
from asag_deploy import Detector
from asag_deploy.bundle.bundle import Bundle
from asag_deploy.images.reading import decode_image
from endurance.clients import Address, Clients, ask
from endurance.watching import Watch, sample, until
from support.tiny_bundle import make_bundle

RESULT = Path(__file__).parent / "results" / "soak.json"
_DIFFERENT = 48
"""Pictures that differ; the others are like one of them."""
_EVERY_DAMAGED = 40
_MOST_MEBIBYTES = 0.25
_TERMINATED = 128 + signal.SIGTERM
_SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; return 0 if everything was as it should be, 1 if not."""
    options = _parser().parse_args(argv)
    begin = time.monotonic()
    machine = asdict(describe_machine())
    with tempfile.TemporaryDirectory(prefix="asag-soak-") as folder:
        bundle = make_bundle(Path(folder) / "bundle")
        images = pictures(random.Random(0))
        report: dict[str, Any] = {
            "command": " ".join(["python", "tests/endurance/soak.py", *(argv or sys.argv[1:])]),
            "machine": machine,
            "detect": soak_detect(bundle, images, Path(folder), options.pictures),
            "serve": soak_serve(bundle, images, options.requests, options.clients),
            "seconds": round(time.monotonic() - begin, 1),
        }
    problems = [*report["detect"]["problems"], *report["serve"]["problems"]]
    report["clean"] = not problems
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{'clean' if not problems else f'{len(problems)} problems'}; see {options.output}")
    return 1 if problems else 0


def pictures(rng: random.Random) -> list[bytes]:
    """Draw image files of several formats and sizes, whose colours steer the network to every level."""
    found = []
    for number in range(_DIFFERENT):
        shape = (rng.randrange(40, 160), rng.randrange(40, 160), 3)
        image = np.empty(shape, np.uint8)
        image[...] = (rng.randrange(4), rng.randrange(4), rng.randrange(12))
        image[shape[0] // 2 :, shape[1] // 2 :] = number
        found.append(bytes(cv2.imencode(rng.choice((".png", ".bmp", ".tif")), image)[1]))
    return found


def soak_detect(bundle: Bundle, images: list[bytes], folder: Path, count: int) -> dict[str, Any]:
    """Send pictures through one process of `asag-detect`; return what came of it."""
    source, out = folder / "pictures", folder / "out"
    source.mkdir()
    for number in range(count):
        image = images[number % len(images)]
        damaged = number % _EVERY_DAMAGED == 0
        (source / f"{number:05d}.png").write_bytes(image[: len(image) // 2] if damaged else image)
    command = [str(bundle.path), str(source), "--threshold", "0", "--output-dir", str(out)]
    command += ["--json", str(folder / "results.json"), "--quiet"]
    log = folder / "detect.log"
    with log.open("wb") as stream, _program("asag_deploy.detect.cli", *command, stderr=stream) as process:
        done = _counted(folder / "results.json", out)
        with Watch(process.pid, done) as watch:
            code = process.wait(_SECONDS + count)
    problems = _differences(bundle, images, folder / "results.json", count)
    if code != 1:  # some were damaged
        problems.append(f"asag-detect ended with {code}: {log.read_text()[-300:]}")
    broken = -(-count // _EVERY_DAMAGED)
    written = sum(1 for _ in out.iterdir()) if out.exists() else 0
    if written != count - broken:
        problems.append(f"asag-detect wrote {written} pictures, expected {count - broken}")
    seen = watch.result()
    problems += [] if seen.flat else [f"asag-detect holds more and more: {seen.to_json()}"]
    return {"pictures": count, "damaged": broken, "exit_code": code, **seen.to_json(), "problems": problems}


def soak_serve(bundle: Bundle, images: list[bytes], count: int, clients: int) -> dict[str, Any]:
    """Send requests to one `asag-serve` from many clients at once; return what came of it."""
    arguments = [str(bundle.path), "--port", "0", "--requests", "2", "--queue", "64", "--body-seconds", "2"]
    arguments += ["--max-megabytes", str(_MOST_MEBIBYTES)]
    problems: list[str] = []
    with _program("asag_deploy.serving.cli", *arguments, stdout=subprocess.PIPE) as process:
        address = _address(process)
        alone = {image: ask(address, "POST", "/detect?threshold=0", image)[1] for image in images}
        kinds = Clients(alone, int(_MOST_MEBIBYTES * 2**20)).kinds
        _send(address, kinds, 4 * clients, clients)  # so that every thread has been begun
        _idle(address)
        before = sample(process.pid)
        done = Counter[str]()
        with Watch(process.pid, done.total) as watch:
            problems += _send(address, kinds, count, clients, done)
        if not _idle(address):
            problems.append("asag-serve still has requests in hand")
        until(lambda: sample(process.pid).descriptors <= before.descriptors, _SECONDS)
        after = sample(process.pid)
        process.send_signal(signal.SIGTERM)
        code = process.wait(_SECONDS)
    if code != _TERMINATED:
        problems.append(f"asag-serve ended with {code} after SIGTERM, expected {_TERMINATED}")
    if after.descriptors > before.descriptors or after.threads > before.threads:
        problems.append(f"asag-serve holds more than before: {before} became {after}")
    seen = watch.result()
    problems += [] if seen.flat else [f"asag-serve holds more and more: {seen.to_json()}"]
    left = {
        "descriptors": (before.descriptors, after.descriptors),
        "threads": (before.threads, after.threads),
    }
    return {
        "requests": done.total(),
        "clients": clients,
        "by_kind": dict(sorted(done.items())),
        "exit_code": code,
        "before_and_after": left,
        **seen.to_json(),
        "problems": problems[:20],
    }


def _send(
    address: Address, kinds: Any, count: int, clients: int, done: Counter[str] | None = None
) -> list[str]:
    """Send `count` requests of all kinds from so many threads; return what was wrong."""
    names, weights = list(kinds), [weight for _, weight in kinds.values()]
    lock, problems = threading.Lock(), list[str]()

    def send(number: int) -> None:
        rng = random.Random(number)
        name = rng.choices(names, weights)[0]
        try:
            problem = kinds[name][0](address, rng)
        except Exception as error:  # whatever it is, it is reported
            problem = f"{type(error).__name__}: {error}"
        with lock:
            if done is not None:
                done[name] += 1
            if problem is not None:
                problems.append(f"request {number} ({name}): {problem[:300]}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, range(count)))
    return problems


def _idle(address: Address) -> bool:
    return until(lambda: ask(address, "GET", "/health")[1]["requests"] == 0, _SECONDS)


def _differences(bundle: Bundle, images: list[bytes], results: Path, count: int) -> list[str]:
    """Compare what `asag-detect` wrote with what a detector finds in each picture alone."""
    if not results.exists():
        return ["asag-detect wrote no results"]
    with Detector.load(bundle) as detector:
        alone = [detector(decode_image(image, "picture"), channel_order="rgb").to_json() for image in images]
    found = {Path(item["source"]).name: item for item in json.loads(results.read_text())}
    problems = []
    for number in range(count):
        item = found.pop(f"{number:05d}.png", None)
        if number % _EVERY_DAMAGED == 0:
            if item is not None and "error" not in item:
                problems.append(f"picture {number} is damaged, but has a result")
        elif item is None:
            problems.append(f"picture {number} has no result")
        elif any(item[key] != alone[number % len(images)][key] for key in ("detections", "trace")):
            problems.append(f"picture {number} has another result than alone")
    return [*problems[:10], *(f"a result for {name}" for name in list(found)[:3])]


def _counted(results: Path, out: Path) -> Any:
    """Return a function that tells how many pictures have been written."""
    known = 0

    def count() -> int:
        nonlocal known
        with os.scandir(out) as entries:
            known = max(known, sum(1 for _ in entries))
        return known

    def safe() -> int:
        try:
            return count()
        except FileNotFoundError:
            return known

    return safe


@contextmanager
def _program(module: str, *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of the programs; it has ended when the block does."""
    with subprocess.Popen([sys.executable, "-m", module, *arguments], **streams) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _address(process: subprocess.Popen[bytes]) -> Address:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    match = re.search(r"http://([\d.]+):(\d+)", line)
    if match is None:
        raise RuntimeError(f"asag-serve did not say where it listens: {line!r}")
    return match[1], int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Soak asag-detect and asag-serve.")
    parser.add_argument("--pictures", type=int, default=10_000, help="through asag-detect")
    parser.add_argument("--requests", type=int, default=10_000, help="to asag-serve")
    parser.add_argument("--clients", type=int, default=32, help="at once")
    parser.add_argument("--output", type=Path, default=RESULT, help="the report (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
