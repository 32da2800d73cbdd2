"""Run the benchmarks behind docs/performance.md on one H100, the most important ones first.

    python -m bench.all --out bench/results/2026-11-28 --dry-run       # the plan, with its times
    python -m bench.all --out bench/results/2026-11-28 --minutes 9.5   # again, until all are done
    python -m bench.all --out runs/bench --shape tiny                  # small: does all of it run?

Each benchmark is a process of its own. What it prints is added to DIR/all.txt with its command,
commit, date, versions and card. The same command continues with what that file does not have yet
for this commit, and then with what has failed. A benchmark that fails, or takes three times as long
as expected, is recorded as such, and the next one begins. --minutes starts only what is expected to
end in time.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

from launch.command import option, parse_settings, run_main
from launch.numbers import positive_real
from trsr import InputError

# Later flags replace earlier ones.
SMALL = {
    "bench.train": "--shape tiny --layers 1 --users 2 --repeats 1",
    "bench.score": "--shape tiny --layers 1 --users 2 --repeats 1 --peer-users 1",
    "bench.summarize": "--shape tiny --layers 1 --prompts 4 --batch-size 4 --batches 1 --repeats 1"
    " --prompt-tokens 110 120 --new-tokens 4 8",
}


class Job(NamedTuple):
    """A benchmark, and the seconds that it is expected to take on an H100."""

    name: str
    seconds: int
    command: str

    def words(self, small: bool) -> list[str]:
        """Return the words after `python -m`; small: scaled down to what a CPU can take."""
        words = self.command.split()
        return words + (SMALL[words[0]].split() if small else [])


# Name, expected seconds, benchmark, shape and flags. Expected are 20 s to start, 30 to 50 s for
# what has to be compiled, and the rest at the speeds of docs/performance.md: in all, less than
# three times 9.5 minutes.
PLAN = """
train             150  train llama-2-7b --batches 1 12 --repeats 1
score             100  score llama-2-7b --users 400 --repeats 1
train-fp8         100  train llama-2-7b --fp8 --no-peer --repeats 2
score-fp8          75  score llama-2-7b --fp8 --users 400 --repeats 1
train-100m         75  train 100m --pack-tokens 16384 --batches 1 32 --repeats 2
score-100m         60  score 100m --users 1000
train-smollm2      75  train smollm2-135m --pack-tokens 16384 --batches 1 32 --repeats 2
score-smollm2      65  score smollm2-135m --users 1000
summarize         105  summarize llama-2-7b 700-TO-128 --prompts 256 --batches 64 --repeats 1
train-amazon      100  train llama-2-7b --work amazon --batches 1 6 8 --users 24 --repeats 1
score-amazon       70  score llama-2-7b --work amazon --users 128 --repeats 1
train-fp8-amazon   65  train llama-2-7b --work amazon --fp8 --no-peer --users 24 --repeats 1
score-fp8-amazon   60  score llama-2-7b --work amazon --fp8 --no-peer --users 128 --repeats 1
train-launched     45  train 100m --no-cuda-graphs --no-peer
score-launched     40  score 100m --no-cuda-graphs --no-peer --users 1000
negatives         180  train llama-2-7b --negatives 1 3 7 15 31 --users 16 --repeats 1
deterministic      75  train llama-2-7b --deterministic --no-peer --repeats 2
summarize-30b     120  summarize llama-30b 700-TO-128 --int8 --prompts 64 --batches 16 \
                       --peer-layers 6 --repeats 1
summarize-int8     60  summarize llama-2-7b 700-TO-128 --int8 --no-peer --prompts 256 --repeats 1
summarize-fp8      60  summarize llama-2-7b 700-TO-128 --fp8 --no-peer --prompts 256 --repeats 1
"""


def planned(plan: str) -> list[Job]:
    """Return the benchmarks of a plan."""
    jobs = []
    for line in plan.strip().splitlines():
        name, expected, module, shape, *flags = line.split()
        command = " ".join([f"bench.{module} --shape {shape}", *flags])
        lengths = "--prompt-tokens 700 700 --new-tokens 128 128"
        jobs.append(Job(name, int(expected), command.replace("700-TO-128", lengths)))
    return jobs


JOBS = planned(PLAN)


@dataclass(frozen=True)
class Settings:
    """The flags."""

    out: Path = option(SUPPRESS, "folder for all.txt", Path, required=True)
    only: tuple[str, ...] | None = option(
        None,
        "benchmarks to run (unset: all)",
        nargs="+",
        choices=[job.name for job in JOBS],
        metavar="NAME",
    )
    minutes: float | None = option(None, "time for this call (unset: no limit)", positive_real)
    commit: str | None = option(None, "the code's commit (unset: git's)")
    shape: str | None = option(None, "scale all down to this one", choices=("tiny",))
    dry_run: bool = option(False, "print the plan, and stop")

    @property
    def file(self) -> Path:
        """Where the outputs are."""
        return self.out / "all.txt"


# ---- The file

HEADER = re.compile(
    r"^# (?P<name>\S+): (?P<state>[^,]+), (?P<seconds>\d+) s, commit (?P<commit>[^,]+), "
)


class Result(NamedTuple):
    """What the file says of a benchmark."""

    state: str  # ok, or what went wrong
    seconds: int
    output: str


def results(path: Path, commit: str, small: bool) -> dict[str, Result]:
    """Return the file's last result of each benchmark as it is listed now, for a commit."""
    found = {}
    text = path.read_text() if path.exists() else ""
    commands = {job.name: typed(job.words(small)) for job in JOBS}
    for entry in re.split(r"\n(?=# \S+: )", "\n" + text):
        header, _, rest = entry.strip().partition("\n")
        command, _, output = rest.partition("\n")
        about = HEADER.match(header)
        if about and about["commit"] == commit and command == commands.get(about["name"]):
            found[about["name"]] = Result(about["state"], int(about["seconds"]), output.strip())
    return found


def typed(words: list[str]) -> str:
    """Return a benchmark's command as it is in the file."""
    return f"$ python -m {shlex.join(words)}"


def git_commit() -> str:
    """Return the checkout's commit, with "+" if its code was changed since."""
    try:
        run = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"]
        changed = subprocess.run(status, **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise InputError("not in a git checkout; name the commit with --commit") from None
    return commit + "+" * bool(changed)


VERSIONS = """
import torch
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"
names = ("transformers", "peft", "bitsandbytes", "triton", "liger-kernel")
card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(", ".join([card, f"torch {torch.__version__}", *map(of, names)]))
"""  # in a process of its own, because this one is to leave the GPU alone


def card_and_versions() -> str:
    """Return the GPU's name and the versions of what is compared."""
    line = [sys.executable, "-c", VERSIONS]
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


# ---- Running


def run(words: list[str], limit: float) -> tuple[str, float, str]:
    """Run a benchmark; return its state, its seconds and what it has printed."""
    began = time.monotonic()
    # Files, since a pipe would stay open for as long as a process that the benchmark has started.
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        # In a session of its own, so that the processes that it has started can be ended too.
        options = {"stdout": out, "stderr": err, "start_new_session": True}
        child = subprocess.Popen([sys.executable, "-m", *words], **options)
        state = None
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # none of them is left
                os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        took = time.monotonic() - began
        out.seek(0)
        err.seek(0)
        output, errors = out.read(), err.read()

    state = "ok" if status == 0 else state or f"exit status {status}"
    if state != "ok":  # and why
        output += "".join(f"! {line}\n" for line in errors.splitlines()[-15:])
    return state, took, output


def main() -> None:
    """Run what is missing, and print the table."""
    settings = parse_settings(Settings, __doc__)
    began, small = time.monotonic(), settings.shape is not None
    commit = settings.commit or git_commit()
    jobs = [job for job in JOBS if job.name in (settings.only or [job.name])]
    found = results(settings.file, commit, small)
    due = [job for job in jobs if job.name not in found or found[job.name].state != "ok"]
    due.sort(key=lambda job: job.name in found)  # what has failed comes last
    if settings.dry_run:
        return show_plan(jobs, due, small)

    settings.out.mkdir(parents=True, exist_ok=True)
    about = card_and_versions()
    for job in due:
        left = 60 * (settings.minutes or 1e6) - (time.monotonic() - began)
        if job.seconds > left:
            continue
        words = job.words(small)
        print(f"{job.name}, about {job.seconds} s: {typed(words)}", flush=True)
        state, took, output = run(words, min(3 * job.seconds, left))
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        header = f"# {job.name}: {state}, {took:.0f} s, commit {commit}, {now}, {about}"
        with settings.file.open("a") as file:
            file.write(f"{header}\n{typed(words)}\n{output.rstrip()}\n\n")
        print(output, flush=True)
    show_results(jobs, results(settings.file, commit, small))


def show_plan(jobs: list[Job], due: list[Job], small: bool) -> None:
    """Print the benchmarks and when each would end."""
    clock = 0
    for job in due + [job for job in jobs if job not in due]:
        clock += job.seconds * (job in due)
        when = f"{clock // 60:>4}:{clock % 60:02}" if job in due else "   done"
        print(f"{when} {job.seconds:>5} s  {job.name:<20}python -m {shlex.join(job.words(small))}")
    print(f"{len(due)} of {len(jobs)} are due, in about {clock / 60:.1f} minutes on an H100")


def show_results(jobs: list[Job], found: dict[str, Result]) -> None:
    """Print a line for each benchmark: what it took, its speed, and the ratio to the best peer."""
    print(f"{'':<20}{'s':>6}{'expected':>10}   {'speed of this project':<28}{'best peer':>10}")
    for job in jobs:
        result = found.get(job.name, Result("not run", 0, ""))
        speed = re.search(r"^ours.*?([\d.]+ [a-z ]+/s)", result.output, re.MULTILINE)
        ratios = map(float, re.findall(r"ours is ([\d.]+) times", result.output))
        ratio = min(ratios, default=None)
        said = (speed[1] if speed else "in the file") if result.state == "ok" else result.state
        line = f"{job.name:<20}{result.seconds:>6}{job.seconds:>10}   {said:<28}"
        print(line + (f"{f'{ratio:g}x':>10}" if ratio else ""), flush=True)


if __name__ == "__main__":
    run_main(main)
