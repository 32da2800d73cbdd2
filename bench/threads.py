"""Time evaluate.py on CPUs that are idle or busy, by how torch's threads wait for work.

    python -m bench.threads --run runs/demo                 # with two other programs, and without

The rows are the ways to wait: one thread, which has nothing to wait for; all cores, with torch's
own waiting, in which threads spin; and all cores as this project sets it (launch/waiting.py). The
columns are the numbers of other programs, which are loops that never pause. Each time is what
evaluate.py prints, the median of --repeats; the ranks have to be the same in all rows.
"""

from launch.waiting import OWN
import hashlib
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.command import option, parse_settings, run_main
from launch.numbers import natural, positive
from trsr import InputError

CORES = str(len(os.sched_getaffinity(0)))
TORCHS = {"OMP_NUM_THREADS": CORES, "GOMP_SPINCOUNT": "300000"}  # as if nothing were set
ROWS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    f"{CORES} threads, torch's own waiting": TORCHS,
    f"{CORES} threads, as set here": {"OMP_NUM_THREADS": CORES},
}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    run: Path = option(Path("runs/demo"), "run folder, after train.py", Path, "settings")
    users: int = option(20, "test users to rank", positive)
    busy: tuple[int, ...] = option((0, 2), "numbers of other programs", natural, nargs="+")
    repeats: int = option(3, "timings of each; the median counts", positive)
    limit: int = option(600, "seconds after which a timing is given up", positive)


@contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """Run n programs that keep a core busy each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def timed(settings: Settings, row: dict[str, str]) -> tuple[float, str]:
    """Return the seconds of an evaluation, infinite past the limit, and its scores' checksum."""
    kept = {k: v for k, v in os.environ.items() if k not in (*OWN, "OMP_NUM_THREADS")}
    line = [sys.executable, "-m", "evaluate", "--run", settings.run, "--users", settings.users]
    try:
        options = {"env": kept | row, "timeout": settings.limit, "capture_output": True}
        done = subprocess.run(list(map(str, line)), text=True, check=False, **options)
    except subprocess.TimeoutExpired:
        return float("inf"), ""
    took = re.search(r"users in ([0-9.]+) s", done.stdout)
    if not took:
        raise InputError(f"evaluate.py failed: {done.stderr.strip().splitlines()[-1]}")
    scores = settings.run / f"scores-test-{settings.users}-users.jsonl"
    return float(took.group(1)), hashlib.sha256(scores.read_bytes()).hexdigest()


def main() -> None:
    """Print the table."""
    settings = parse_settings(Settings, __doc__)
    programs = "".join(f"{f'{n} others':>12}" for n in settings.busy)
    print(f"{f'seconds for {settings.users} users':<34}{programs}", flush=True)
    sums = set()
    for name, row in ROWS.items():
        print(f"{name:<34}", end="", flush=True)
        for n in settings.busy:
            with busy_loops(n):
                took, found = zip(
                    *(timed(settings, row) for _ in range(settings.repeats)), strict=True
                )
            sums |= set(found) - {""}
            print(f"{statistics.median(took):>12.1f}", end="", flush=True)
        print(flush=True)
    print("the scores are the same in all of them" if len(sums) == 1 else "the scores differ")


if __name__ == "__main__":
    run_main(main)
