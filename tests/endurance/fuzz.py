"""Fuzz whatever reads what comes from outside, for as long as you like.

    python tests/endurance/fuzz.py --target images --seconds 3600
    python tests/endurance/fuzz.py --target images --input tests/endurance/corpus/images/0123456789ab

Inputs are valid files with damage, drawn by hypothesis.  Each has to be taken, or refused with one of the
project's exceptions and one sentence, within 5 seconds and 2 GiB, and nothing may be left behind.  A child
process does it, so that an input that ends it is known too.  What is found is printed and put into
`corpus/TARGET`, which the test suite replays.  A report is written to `results/`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from endurance.hunting import Hunt, keep, read_kept
from endurance.judging import ROOT, Finding, Judge
from endurance.targets import SELF_CHECK, TARGETS, target

RESULTS = Path(__file__).parent / "results"
_CHILD_SECONDS = 300.0
"""After so long a child is followed by another, so that what it may leak does not add up."""
_HANG_SECONDS = 60
_MORE_MEMORY = 2 * 2**30
_PACKAGES = (
    "hypothesis",
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "openvino",
    "av",
    "torch",
    "uvicorn",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz; return 0 if nothing was found, 1 if something was."""
    options = _parser().parse_args(argv)
    if options.child is not None:
        return _child(options)
    if options.input is not None:
        return _replay(options.target, options.input)
    names = list(TARGETS) if options.target == "all" else [options.target]
    runs = {name: Run() for name in names}
    begin = time.monotonic()
    try:
        while any(run.seconds < options.seconds for run in runs.values()):
            for name, run in runs.items():
                _slice(name, run, options)
                _write_report(options, runs, time.monotonic() - begin)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    print(f"report: {_write_report(options, runs, time.monotonic() - begin)}")
    return 1 if any(run.findings for run in runs.values()) else 0


@dataclass
class Run:
    """What became of one target."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """What the hunting itself had of the processors: less than `seconds` where they are shared."""
    executions: int = 0
    slices: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, dict[str, str]] = field(default_factory=dict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", choices=("all", *TARGETS, SELF_CHECK), default="all")
    add("--seconds", type=float, default=60.0, help="for each target (default: %(default)s)")
    add("--seed", type=int, default=0, help="another seed, other inputs (default: %(default)s)")
    add("--report", type=Path, help="where the report goes (default: results/fuzz-TARGET.json)")
    add("--no-corpus", action="store_true", help="keep no input")
    add("--input", type=Path, help="run this input alone, of a corpus, and print what becomes of it")
    add("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def _slice(name: str, run: Run, options: argparse.Namespace) -> None:
    """Fuzz a target in a child process for a while, and say what came of it."""
    seconds = min(_CHILD_SECONDS, options.seconds - run.seconds)
    if seconds <= 0:
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        state = Path(folder)
        begin, cpu_begin = time.monotonic(), _cpu_seconds_of_children()
        code = _run_child(name, state, seconds, options.seed + 10**6 * run.slices)
        run.seconds += time.monotonic() - begin
        run.cpu_seconds += _cpu_seconds_of_children() - cpu_begin
        run.slices += 1
        told = _read_told(state)
        run.executions += told["executions"]
        run.outcomes.update(told["outcomes"])
        findings = [Finding(signature=s, text=t, data=bytes.fromhex(d)) for s, t, d in told["findings"]]
        if code != 0 and not (state / "current").exists():
            raise SystemExit(f"{name} could not be opened: {(state / 'stderr').read_text(errors='replace')}")
        if code != 0:
            findings.append(_end_of_child(state, code))
    for finding in findings:
        if finding.signature not in run.findings:
            kept = finding.data and not options.no_corpus
            shown = str(keep(name, finding.data).relative_to(ROOT)) if kept else repr(finding.data)
            run.findings[finding.signature] = {"input": shown, "text": finding.text}
            print(f"\n{name}: {finding.signature}\n{shown}\n{finding.text}", flush=True)
    print(
        f"{time.strftime('%H:%M:%S')} {name}: {run.executions} inputs in {run.seconds:.0f} s, "
        f"{dict(run.outcomes.most_common(4))}, {len(run.findings)} found",
        flush=True,
    )


def _run_child(name: str, state: Path, seconds: float, seed: int) -> int:
    """Hunt in a child process, with `state` as its folder; return its exit code."""
    command = [sys.executable, __file__, "--target", name, "--child", str(state)]
    with (state / "stderr").open("wb") as stderr:
        return subprocess.run(
            [*command, "--seconds", str(seconds), "--seed", str(seed)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            check=False,
        ).returncode


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _read_told(state: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        told: dict[str, Any] = json.loads((state / "told").read_bytes())
        return told
    return {"executions": 0, "outcomes": {}, "findings": []}


def _end_of_child(state: Path, code: int) -> Finding:
    """Describe how a child ended, with the input that it was at."""
    last = (state / "stderr").read_bytes()[-6000:].decode(errors="replace")
    current = state / "current"
    data = current.read_bytes() if current.exists() else b""
    frames = [line.strip() for line in last.splitlines() if line.strip().startswith("File ")]
    own = [line for line in frames if str(ROOT) in line and "/tests/" not in line and "/.venv" not in line]
    where = (own or frames or ["nowhere"])[0]
    return Finding(signature=f"the process ended with {code} {where}", text=last, data=data)


def _child(options: argparse.Namespace) -> int:
    """Hunt, and tell in `told` what came of it."""
    state: Path = options.child
    current = state / "current"

    def before(data: bytes) -> None:
        current.write_bytes(data)
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)

    faulthandler.enable()
    with opened(options.target, state) as judge:
        _limit_memory()
        hunt = Hunt(judge, before=before)
        end, number = time.monotonic() + options.seconds, options.seed
        while time.monotonic() < end:
            hunt.batch(number, until=end)
            number += 1
            faulthandler.cancel_dump_traceback_later()
            _tell(state, hunt)
        with suppress(OSError):
            current.unlink()
    return 0


def _tell(state: Path, hunt: Hunt) -> None:
    findings = [(f.signature, f.text, f.data.hex()) for f in hunt.findings.values()]
    told = {"executions": hunt.executions, "outcomes": dict(hunt.judge.counts), "findings": findings}
    unfinished = state / "unfinished"
    unfinished.write_text(json.dumps(told), encoding="utf-8")
    unfinished.replace(state / "told")


@contextmanager
def opened(name: str, folder: Path) -> Iterator[Judge]:
    """Open a target in an empty folder, which is this process's for temporary files meanwhile."""
    work, temporary = folder / "work" / "here", folder / "work" / "tmp"
    for each in (work, temporary):
        each.mkdir(parents=True)
    before = Path.cwd(), tempfile.tempdir, dict(os.environ)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    os.environ["ASAG_CACHE_DIR"] = str(folder / "cache")
    os.chdir(work)
    try:
        with target(name)(work) as found:
            yield Judge(found, folder / "work")
    finally:
        os.chdir(before[0])
        tempfile.tempdir = before[1]
        os.environ.clear()
        os.environ.update(before[2])


def _limit_memory() -> None:
    """Let the process have so much more than it has now; what it cannot have is a MemoryError."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + _MORE_MEMORY, now + _MORE_MEMORY))


def _replay(name: str, path: Path) -> int:
    data = read_kept(path.resolve())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, opened(name, Path(folder)) as judge:
        finding = judge(data)
    print("fine" if finding is None else f"{finding.signature}\n{finding.text}", dict(judge.counts))
    return 0 if finding is None else 1


def _write_report(options: argparse.Namespace, runs: dict[str, Run], seconds: float) -> Path:
    path: Path = options.report or RESULTS / f"fuzz-{options.target}.json"
    packages = {}
    for name in _PACKAGES:
        with suppress(ImportError):
            packages[name] = version(name)
    report = {
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "packages": packages,
        "seed": options.seed,
        "seconds": round(seconds),
        "targets": {
            name: {
                "seconds": round(run.seconds),
                "cpu_seconds": round(run.cpu_seconds),
                "inputs": run.executions,
                "outcomes": dict(run.outcomes.most_common()),
                "found": run.findings,
            }
            for name, run in runs.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
