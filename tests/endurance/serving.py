"""Load `asag-serve` with many clients at once, good and bad, and see that the good ones are served.

    python tests/endurance/serving.py
    python tests/endurance/serving.py --seconds 60 --bundle bundle/ --pictures photos/ --output /tmp/load.json
    python tests/endurance/serving.py --only-good --clients 8 --serve "--requests 2 --batch 4"

Good clients send images as bodies, forms and inference requests, with options and deadlines; each answer has
to be the right one, or 503 where the server is full or a deadline has passed.  Bad ones go away, dawdle, send
what is no image, no form and no HTTP.  Nobody may be answered with 500, nobody may wait for ever, nothing may
be left in the end.  The report goes to `results/`, the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asag_bench.measuring.machine import describe_machine
from endurance.clients import SECONDS, Address, Client, Clients, ask
from endurance.soak import pictures
from endurance.watching import Watch, sample, until
from support.tiny_bundle import make_bundle

RESULT = Path(__file__).parent / "results" / "serving.json"
_MOST_MEBIBYTES = 4.0
_SURE = 0.6
_RETRY_SECONDS = 1.0
_TERMINATED = 128 + signal.SIGTERM
_FORM = (
    '--x\r\nContent-Disposition: form-data; name="max_level"\r\n\r\n{}\r\n'
    '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
)
_WRONG = ("threshold=2", "max_level=P9", "deadline_ms=0", "anchor_cap=100000", "treshold=1", "mode=")


def main(argv: Sequence[str] | None = None) -> int:
    """Load the server; return 0 if everything was as it should be, 1 if not."""
    options = _parser().parse_args(argv)
    machine = asdict(describe_machine())
    with tempfile.TemporaryDirectory(prefix="asag-serving-") as folder:
        bundle = make_bundle(Path(folder) / "bundle").path if options.bundle is None else options.bundle
        images = pictures(random.Random(0)) if options.pictures is None else _files(options.pictures)
        serve = ["--queue", "16", "--body-seconds", "2", "--max-megabytes", str(_MOST_MEBIBYTES)]
        log = Path(folder) / "access.log"
        command = [*serve, "--access-log", str(log), *shlex.split(options.serve)]
        report = {
            "command": " ".join(["python", "tests/endurance/serving.py", *(argv or sys.argv[1:])]),
            "machine": machine,
            **load(bundle, images, command, log, options.clients, options.seconds, options.only_good),
        }
    report["clean"] = not report["problems"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for problem in report["problems"]:
        print(problem, file=sys.stderr)
    ms = report["milliseconds"]
    print(
        f"{report['answers_per_second']} good answers a second, p50 {ms['p50']} ms, p99 {ms['p99']} ms, "
        f"{report['processor_ms_per_good_answer']} ms of processors each, {report['refused']} refused with "
        f"503; see {options.output}"
    )
    return 0 if report["clean"] else 1


@dataclass
class _Tally:
    """What has come of the requests until now."""

    done: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    good_ms: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, milliseconds: float, problem: str | None, good: bool) -> bool:
        """Count a request that has ended; return whether it was refused for want of time or room."""
        full = problem is not None and ("status 503" in problem or "HTTP/1.1 503" in problem)
        with self.lock:
            self.done[name] += 1
            if full:
                self.refused += 1
            elif problem is not None:
                self.problems.append(f"{name}: {problem[:300]}")
            elif good:
                self.good_ms.append(milliseconds)
        return full


def load(
    bundle: Path,
    images: list[bytes],
    serve: list[str],
    log: Path,
    clients: int,
    seconds: float,
    only_good: bool,
) -> dict[str, Any]:
    """Let so many clients send requests for so long; return what came of it."""
    tally = _Tally()
    program = [sys.executable, "-m", "asag_deploy.serving.cli", str(bundle), "--port", "0", *serve]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        try:
            address = _address(process)
            few = images if len(images) < 50 else images[:50]
            alone = {image: ask(address, "POST", "/detect?threshold=0", image)[1] for image in few}
            model = ask(address, "GET", "/health")[1]["variant"]
            kinds = _kinds(alone, model, only_good)
            end = time.monotonic() + seconds
            threads = [
                threading.Thread(target=_send, args=(number, address, kinds, end, tally))
                for number in range(clients)
            ]
            before, cpu_before = sample(process.pid), _cpu_seconds(process.pid)
            begin = time.monotonic()
            with Watch(process.pid, tally.done.total) as watch:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(seconds + 3 * SECONDS)
            took = time.monotonic() - begin
            cpu = _cpu_seconds(process.pid) - cpu_before
            hanging = sum(thread.is_alive() for thread in threads)
            tally.problems += [f"{hanging} clients wait for ever"] if hanging else []
            if not until(lambda: ask(address, "GET", "/health")[1]["requests"] == 0, SECONDS):
                tally.problems.append("there are still requests in hand")
            until(lambda: sample(process.pid).descriptors <= before.descriptors + 2, SECONDS)
            after = sample(process.pid)
            figures = _metrics(address)
            tally.problems += _failures(figures)
            process.send_signal(signal.SIGTERM)
            code = process.wait(SECONDS)
        finally:
            process.kill()
    if code != _TERMINATED:
        tally.problems.append(f"asag-serve ended with {code} after SIGTERM, expected {_TERMINATED}")
    if after.descriptors > before.descriptors + 2:
        tally.problems.append(f"{after.descriptors - before.descriptors} descriptors are left")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seen = watch.result()
    tally.problems += [] if seen.flat or seconds < 60 else [f"it holds more and more: {seen.to_json()}"]
    return {
        "variant": model,
        "clients": clients,
        "seconds": round(took, 1),
        "requests": tally.done.total(),
        "by_kind": dict(sorted(tally.done.items())),
        "refused": tally.refused,
        "answers_per_second": round(len(tally.good_ms) / took, 1),
        "milliseconds": _percentiles(tally.good_ms),
        "images_per_batch": _mean(figures, "asag_batch_images"),
        "processor_seconds": round(cpu, 1),
        "processor_ms_per_good_answer": round(1000 * cpu / max(len(tally.good_ms), 1), 1),
        "log_lines": len(lines),
        "statuses": dict(sorted(Counter(str(line["status"]) for line in lines).items())),
        "exit_code": code,
        **seen.to_json(),
        "problems": tally.problems[:20],
    }


def _kinds(alone: dict[bytes, Any], model: str, only_good: bool) -> dict[str, tuple[Client, int, bool]]:
    """Return, by name, each client, how often it comes, and whether it is a good one."""
    own = _Own(alone, model)
    others = Clients(alone, int(_MOST_MEBIBYTES * 2**20))
    good: dict[str, tuple[Client, int, bool]] = {"good": (own.good, 60, True)}
    if only_good:
        return good
    good |= {
        "form": (own.form, 15, True),
        "inference request": (own.infer, 15, True),
        "deadline": (own.deadline, 10, True),
        "scrape": (own.scrape, 4, False),
        "wrong option": (own.wrong, 4, False),
        "broken form": (own.broken_form, 3, False),
        "broken inference request": (own.broken_infer, 3, False),
    }
    bad = {name: (client, weight, False) for name, (client, weight) in others.kinds.items() if name != "good"}
    return {**good, **bad}


class _Own:
    """Clients of what only this server has: forms, inference requests, deadlines, figures."""

    def __init__(self, alone: dict[bytes, Any], model: str) -> None:
        self._alone, self._images, self._infer = alone, list(alone), f"/v2/models/{model}/infer"

    def good(self, address: Address, rng: random.Random) -> str | None:
        """Send an image as the body; the answer is what it was alone, up to rounding in a batch."""
        image = rng.choice(self._images)
        status, answer = ask(address, "POST", "/detect?threshold=0", image)
        if status != 200:
            return f"status {status}: {answer}"
        return None if _near(answer, self._alone[image]) else f"another answer: {answer}"

    def form(self, address: Address, rng: random.Random) -> str | None:
        """Send an image as a browser does."""
        image = rng.choice(self._images)
        body = _FORM.format("P5").encode() + image + b"\r\n--x--\r\n"
        status, answer = _post(address, "/detect", body, {"Content-Type": "multipart/form-data; boundary=x"})
        if status != 200:
            return f"status {status}: {answer}"
        return None if answer["trace"]["exit_level"] == "P5" else f"another level: {answer['trace']}"

    def infer(self, address: Address, rng: random.Random) -> str | None:
        """Send two images as tensors in JSON."""
        chosen = [rng.choice(self._images) for _ in range(2)]
        data = [base64.b64encode(image).decode() for image in chosen]
        tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": data}
        body = json.dumps({"inputs": [tensor], "parameters": {"threshold": 0}}).encode()
        status, answer = _post(address, self._infer, body)
        if status != 200:
            return f"status {status}: {answer}"
        counts = next(output["data"] for output in answer["outputs"] if output["name"] == "counts")
        expected = [len(self._alone[image]["detections"]) for image in chosen]
        return None if counts == expected else f"{counts} detections, expected {expected}"

    def deadline(self, address: Address, rng: random.Random) -> str | None:
        """Ask for an answer in time: it is there, coarser perhaps, or refused."""
        image, ms = rng.choice(self._images), rng.choice((1, 5, 20, 100, 1000))
        status, answer = ask(address, "POST", f"/detect?deadline_ms={ms}", image)
        return None if status == 200 and answer["trace"]["levels"] else f"status {status}: {answer}"

    def scrape(self, address: Address, rng: random.Random) -> str | None:
        """Read the figures."""
        return None if "asag_patches_count" in _metrics(address) else "no figures"

    def wrong(self, address: Address, rng: random.Random) -> str | None:
        """Ask for what makes no sense."""
        status, answer = ask(address, "POST", f"/detect?{rng.choice(_WRONG)}", rng.choice(self._images))
        return None if status == 400 else f"status {status}, expected 400: {answer}"

    def broken_form(self, address: Address, rng: random.Random) -> str | None:
        """Send a form that breaks off, or one without a file."""
        whole = _FORM.format("P5").encode() + rng.choice(self._images)
        body = whole[: rng.randrange(1, len(whole))]
        status, answer = _post(address, "/detect", body, {"Content-Type": "multipart/form-data; boundary=x"})
        return None if status == 400 else f"status {status}, expected 400: {answer}"

    def broken_infer(self, address: Address, rng: random.Random) -> str | None:
        """Send a damaged inference request."""
        body = bytearray(
            json.dumps({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}).encode()
        )
        body[rng.randrange(len(body))] = rng.randrange(256)
        status, answer = _post(address, self._infer, bytes(body))
        return None if status == 400 else f"status {status}, expected 400: {answer}"


def _near(answer: Any, expected: Any) -> bool:
    """Tell whether two answers have the same sure detections, to a pixel."""
    if answer["trace"]["exit_level"] != expected["trace"]["exit_level"]:
        return False
    one, other = (
        np.array(
            sorted([d["class_id"], *d["box"]] for d in each["detections"] if d["confidence"] >= _SURE),
            np.float64,
        ).reshape(-1, 5)
        for each in (answer, expected)
    )
    return one.shape == other.shape and bool((np.abs(one - other) < 1).all())


def _send(
    number: int, address: Address, kinds: dict[str, tuple[Client, int, bool]], end: float, tally: _Tally
) -> None:
    rng = random.Random(number)
    names, weights = list(kinds), [weight for _, weight, _ in kinds.values()]
    while time.monotonic() < end:
        name = rng.choices(names, weights)[0]
        client, _, good = kinds[name]
        begin = time.perf_counter()
        try:
            problem = client(address, rng)
        except Exception as error:  # whatever it is, it is reported
            problem = f"{type(error).__name__}: {error}"
        if tally.add(name, (time.perf_counter() - begin) * 1000, problem, good):
            time.sleep(_RETRY_SECONDS * (0.5 + rng.random()))  # as Retry-After says, not all at once


def _post(address: Address, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    try:
        connection.request("POST", path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _metrics(address: Address) -> str:
    connection = http.client.HTTPConnection(*address, timeout=SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def _failures(text: str) -> list[str]:
    return [
        f"a request has failed: {line}"
        for line in text.splitlines()
        if re.search(r'status="5(?!03)\d\d"', line)
    ]


def _mean(text: str, name: str) -> float | None:
    """Return the mean of a histogram; None if it has nothing."""
    found = dict(
        line.split() for line in text.splitlines() if line.startswith((f"{name}_sum ", f"{name}_count "))
    )
    count = float(found[f"{name}_count"])
    return round(float(found[f"{name}_sum"]) / count, 2) if count else None


def _percentiles(milliseconds: list[float]) -> dict[str, float]:
    if not milliseconds:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "most": 0.0}
    p50, p90, p99, most = np.percentile(milliseconds, (50, 90, 99, 100)).round(1).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "most": most}


def _cpu_seconds(process: int) -> float:
    """Return the processors' time that a process has had, which others on the machine change little."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]


def _address(process: subprocess.Popen[bytes]) -> Address:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    match = re.search(r"http://([\d.]+):(\d+)", line)
    if match is None:
        raise RuntimeError(f"asag-serve did not say where it listens: {line!r}")
    return match[1], int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Load asag-serve.")
    parser.add_argument("--seconds", type=float, default=600, help="how long")
    parser.add_argument("--clients", type=int, default=32, help="at once")
    parser.add_argument("--bundle", type=Path, help="what is served (default: a tiny network)")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures (default: drawn ones)")
    parser.add_argument("--serve", default="", help="more options for asag-serve, as one word")
    parser.add_argument("--only-good", action="store_true", help="no bad clients, and images as bodies alone")
    parser.add_argument("--output", type=Path, default=RESULT, help="the report (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
