"""Kill programs at random moments: whatever is left is absent or whole, and the next run succeeds.

    python tests/endurance/kill.py --moments 100 --seed 0
    python tests/endurance/kill.py --jobs json,video --moments 10

A job is a command that writes.  It is timed once, then started again and again in the same place, and ended
after a time that is drawn evenly from that length, by SIGTERM, SIGINT and SIGKILL in turn.  Whatever has a
name that is not hidden must be whole each time; only SIGKILL may leave something hidden; and now and then the
command runs to its end, which must succeed and leave nothing hidden.  A report is written to `results/`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from endurance.kill_jobs import JOBS, Job, Place, prepare

RESULTS = Path(__file__).parent / "results"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
_UNTIL_THE_END = 10
"""One run in so many is left to end."""
_MOST_PROBLEMS = 20
_OF_LIBRARIES = (".cache", ".config", "torchinductor_", "pymp-")
"""Caches, and the sockets of Python's multiprocessing, which are small and have no lock to tell by."""
_PATIENCE_S = 120.0
_REPORTED_EVERY_S = 30.0


@dataclass
class Outcome:
    """What became of one job."""

    length_s: float = 0.0
    moments: int = 0
    by_signal: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[str] = field(default_factory=Counter)
    before_the_program: int = 0
    """Ends by the signal itself: it came while Python was starting."""
    left: Counter[str] = field(default_factory=Counter)
    """What stood in the place afterwards."""
    ends: int = 0
    """Runs to the end, each of which must succeed."""
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill; return 0 if nothing was lost and nothing was left half done, 1 otherwise."""
    options = _parser().parse_args(argv)
    chosen = options.jobs.split(",")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in its background
    outcomes: dict[str, Outcome] = {}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        place = prepare(Path(folder), chosen, bundle=options.bundle)
        for name in chosen:
            outcomes[name] = Outcome()
            _kill_again_and_again(JOBS[name], place, outcomes[name], options)
            _write_report(options, outcomes, time.monotonic() - begin)
    print(f"report: {options.report}")
    return 1 if any(outcome.problems for outcome in outcomes.values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--moments", type=int, default=100, help="for each job (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="for each job, at most (default: no limit)")
    add("--seed", type=int, default=0, help="another seed, other moments (default: %(default)s)")
    add("--jobs", default=",".join(JOBS), help="which, with commas (default: %(default)s)")
    add("--bundle", type=Path, help="what detects (default: the project's own network, exported first)")
    add("--report", type=Path, default=RESULTS / "kill.json", help="default: %(default)s")
    return parser


def _kill_again_and_again(job: Job, place: Place, outcome: Outcome, options: argparse.Namespace) -> None:
    random_moments = random.Random(f"{options.seed} {job.name}")
    begin = shown = time.monotonic()
    _run_to_the_end(job, place, outcome)
    outcome.length_s = time.monotonic() - begin
    told = 0
    while outcome.moments < options.moments and not outcome.problems[_MOST_PROBLEMS:]:
        told = _tell_from(told, job, outcome)
        if time.monotonic() - begin > options.seconds:
            break
        number = SIGNALS[outcome.moments % len(SIGNALS)]
        _one_moment(job, place, outcome, number, random_moments.uniform(0, outcome.length_s))
        last = outcome.moments == options.moments
        if outcome.moments % _UNTIL_THE_END == 0 or last:
            _run_to_the_end(job, place, outcome)
        if time.monotonic() - shown > _REPORTED_EVERY_S or last:
            shown = time.monotonic()
            print(
                f"{time.strftime('%H:%M:%S')} {job.name}: {outcome.moments} of {options.moments} moments, "
                f"{dict(outcome.exit_codes)}, {len(outcome.problems)} problems",
                flush=True,
            )
    _tell_from(told, job, outcome)


def _tell_from(told: int, job: Job, outcome: Outcome) -> int:
    """Print the problems but for the first `told`; return how many there are."""
    for problem in outcome.problems[told:]:
        print(f"{job.name}: {problem}", file=sys.stderr, flush=True)
    return len(outcome.problems)


def _one_moment(job: Job, place: Place, outcome: Outcome, number: signal.Signals, after_s: float) -> None:
    before = set(_hidden(place, job))  # of a run that was killed, where this one comes to no writing
    begin = time.monotonic()
    with _started(job, place) as process:
        try:
            process.wait(after_s)
            outcome.length_s = time.monotonic() - begin  # the machine is less busy than it was
            ended = True
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            ended = False
        where = f"{number.name} after {after_s:.2f} s"
        try:
            said = process.communicate(timeout=_PATIENCE_S)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            outcome.problems.append(f"{where}: it went on for {_PATIENCE_S:g} s")
            return
    code = process.returncode
    if ended and code == 0:
        outcome.ends += 1
        job.start_anew(place.of(job.name))
        return
    outcome.moments += 1
    outcome.by_signal[number.name] += 1
    outcome.exit_codes[str(code)] += 1
    if code == -number and number != signal.SIGKILL:
        outcome.before_the_program += 1
    elif code not in (0, -number, 128 + number):
        outcome.problems.append(f"{where}: exit code {code}: {said[:2000]} ... {said[-500:]}")
    elif "Traceback" in said:
        outcome.problems.append(f"{where}: {said[-1500:]}")
    if number != signal.SIGKILL and code != -number:
        outcome.problems += [f"{where}: left '{name}'" for name in set(_hidden(place, job)) - before]
    _look(job, place, outcome, where)


def _run_to_the_end(job: Job, place: Place, outcome: Outcome) -> None:
    with _started(job, place) as process:
        said = process.communicate()[1].decode(errors="replace")
    outcome.ends += 1
    if process.returncode != 0:
        outcome.problems.append(f"the next run failed with {process.returncode}: {said[-1500:]}")
    outcome.problems += [f"after the next run '{name}' is left" for name in _hidden(place, job)]
    _look(job, place, outcome, "after the next run")
    job.start_anew(place.of(job.name))


def _started(job: Job, place: Place) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        job.command(place),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=place.folder,
        env={**os.environ, "TMPDIR": str(place.scratch), "HOME": str(place.scratch), "OMP_NUM_THREADS": "1"},
    )


def _look(job: Job, place: Place, outcome: Outcome, where: str) -> None:
    try:
        outcome.left[job.look(place.of(job.name))] += 1
    except Exception as error:
        outcome.problems.append(f"{where}: {type(error).__name__}: {error}")


def _hidden(place: Place, job: Job) -> list[str]:
    """Return what is hidden where the job writes, and in its scratch, but for what libraries keep there."""
    found = [*place.of(job.name).rglob(".*"), *place.scratch.glob("*"), *place.scratch.glob(".*")]
    return [str(path.relative_to(place.folder)) for path in found if not path.name.startswith(_OF_LIBRARIES)]


def _write_report(options: argparse.Namespace, outcomes: dict[str, Outcome], seconds: float) -> None:
    content = {
        "command": f"python tests/endurance/kill.py --moments {options.moments} --seed {options.seed} "
        f"--jobs {options.jobs}" + (f" --seconds {options.seconds:g}" if options.seconds < math.inf else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": round(seconds),
        "jobs": {name: vars(outcome) for name, outcome in outcomes.items()},
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
