"""Run stages one after another in one process: what `--jobs` starts (experiments/processes.py).

    echo '{"script": "train.py", "flags": ["--help"], "log": "train.log"}' | \\
        python -m experiments.worker

Each line of stdin is a call: the script, its flags, and the file that gets all output. The answer
is a line {"status": ...} on stdout. The script runs as `python SCRIPT FLAGS` would, in the main
thread, so that it receives signals; what it changes in the process is restored afterwards, except
that modules stay imported and kernels compiled. The process ends with stdin.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
EARLY = ("summarize", "train")  # they import what all scripts need
COMPILATIONS = 1024  # of a function, since all trainings of a worker share them


def run_stage(script: str, flags: list[str]) -> int:
    """Run a script with these flags, as a process of its own would; return its exit status."""
    sys.argv = [script, *flags]
    try:
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Defaults:
    """The state of a process that a script may change."""

    def __init__(self):
        self.environment, self.threads = dict(os.environ), torch.get_num_threads()
        self.interval = sys.getswitchinterval()

    def restore(self) -> None:
        """Make the process as it was, and free what the last script held."""
        os.environ.clear()
        os.environ.update(self.environment)
        sys.setswitchinterval(self.interval)
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.set_grad_enabled(True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # which scripts report


def redirect(log: str) -> None:
    """Send all further output to a file, that of libraries and child processes too."""
    sys.stdout.flush()
    sys.stderr.flush()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def take_signals() -> None:
    """Handle signals as a process does that has just started."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def own(descriptor: int, put: str, mode: str):
    """Return a pipe as a file of its own, and put another file into its place."""
    # Scripts must not read the calls that follow, nor write into the answers.
    pipe = os.fdopen(os.dup(descriptor), mode)
    other = os.open(put, os.O_RDWR)
    os.dup2(other, descriptor)
    os.close(other)
    return pipe


def main() -> None:
    """Run what stdin asks for."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is lost between two stages
    calls, answers = own(0, os.devnull, "r"), own(1, os.devnull, "w")
    with contextlib.suppress(Exception):  # a stage will meet it too, and has a log
        for name in EARLY:
            importlib.import_module(name)
    if torch.cuda.is_available():
        torch.cuda.init()
    torch._dynamo.config.recompile_limit = COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = COMPILATIONS
    defaults = Defaults()
    for line in calls:
        call = json.loads(line)
        redirect(call["log"])
        take_signals()
        status = run_stage(call["script"], call["flags"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        defaults.restore()
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps({"status": status}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
