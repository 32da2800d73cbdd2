"""The processes of stages: workers that run one stage after another, or a new one for each.

A worker (experiments.worker) has torch imported and its kernels compiled when its second stage
begins. Both kinds leave the output of a stage in its log, and are told to stop by SIGTERM.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from trsr import InputError

ROOT = Path(__file__).parent.parent
TAIL = 1 << 16  # bytes of an output that are searched for the reason of a failure
PATIENCE = 30.0  # seconds that a worker without a stage has to end
Environment = dict[str, str] | None  # None: this process's own


@dataclass(frozen=True)
class Call:
    """One call of a script, the file for its output, and the GPU that it was given."""

    script: str
    flags: tuple[str, ...]
    log: Path
    gpu: str | None = None


def command_of(script: str, flags: tuple[str, ...], processes: int) -> list[str]:
    """Return the command that starts a script, under torchrun if it has several processes."""
    if not script.endswith(".py"):
        return [sys.executable, "-m", script, *flags]
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [sys.executable, *torchrun, str(ROOT / script), *flags]


def show(chunk: bytes) -> None:
    """Pass a stage's output on to the terminal."""
    sys.stderr.write(chunk.decode("utf-8", "replace"))
    sys.stderr.flush()


# ---- A new process, or torchrun's several, for each stage


@dataclass
class Fresh:
    """Starts a process for every stage."""

    processes: int = 1  # of a stage, started by torchrun
    echo: bool = False  # whether their output is shown
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def run(self, call: Call, environment: Environment) -> tuple[int, str]:
        """Run a script; return its exit status and the end of its output."""
        process = self.start(command_of(call.script, call.flags, self.processes), environment)
        output = b""
        try:
            with open(call.log, "wb") as file:
                while chunk := os.read(process.stdout.fileno(), TAIL):
                    file.write(chunk)
                    file.flush()
                    output = (output + chunk)[-TAIL:]
                    if self.echo:
                        show(chunk)
            return process.wait(), output.decode("utf-8", "replace")
        finally:
            if process.poll() is None:  # interrupted: the script saves what it has
                process.terminate()
                process.wait()
            process.stdout.close()
            self.running.discard(process)

    def start(self, command: list[str], environment: Environment) -> subprocess.Popen:
        """Start a process with its output in a pipe; InputError once all are being stopped."""
        with self.lock:
            if self.stopped:
                raise InputError("interrupted")
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=environment, **pipes)
            self.running.add(process)
            return process

    def warm(self, gpus: Iterable[str | None], environment: Callable) -> None:
        """Do nothing: a process starts with its stage."""

    def idle_on(self, gpu: str | None) -> bool:
        """Return whether a worker waits for a stage on this GPU: there are none."""
        return False

    def stop(self) -> None:
        """Ask all processes to save what they have and end, and let no other one start."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                if process.poll() is None:
                    process.terminate()

    def close(self) -> None:
        """Do nothing: every process ends with its stage."""


# ---- Workers


class Worker:
    """A process that runs the stages that it is told to, one after another."""

    def __init__(self, gpu: str | None, environment: Environment):
        self.gpu, self.scripts = gpu, set()  # scripts: what it has run
        # Its errors go to this process's stderr until its first stage has a log.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-m", "experiments.worker"]
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, call: Call, echo: bool) -> int:
        """Run a script to its end; return its exit status, or the worker's own if it has died."""
        self.scripts.add(call.script)
        request = {"script": call.script, "flags": call.flags, "log": str(call.log.absolute())}
        call.log.write_bytes(b"")
        with open(call.log, "rb") as log:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.answer(log, echo)
        return self.process.wait() if answer is None else json.loads(answer)["status"]

    def answer(self, log: BinaryIO, echo: bool) -> bytes | None:
        """Return the answer once it is there, or None if the worker has died; show its output."""
        pipe, found = self.process.stdout, b""
        while not found:
            # A killed worker's own children may hold its end of the pipe for some time.
            dead = self.process.poll() is not None
            ready, _, _ = select.select([pipe], [], [], 0 if dead else 0.2)
            if ready:
                found = pipe.readline()
                dead = not found
            if echo:
                show(log.read())
            if dead and not found:
                return None
        return found

    def stop(self) -> None:
        """Ask it to end, after the stage under way has saved what it has."""
        if self.process.poll() is None:
            self.process.terminate()

    def dismiss(self) -> None:
        """Let it end when it has nothing left to do."""
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def end(self, patience: float | None = None) -> None:
        """Wait for its end; it is killed after so many seconds."""
        self.dismiss()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Workers:
    """Runs stages in workers, each on one GPU if there are any. A stage that fails costs its own.

    echo: whether the output of stages is shown.
    """

    def __init__(self, echo: bool = False):
        self.echo, self.lock, self.stopped = echo, Lock(), False
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def run(self, call: Call, environment: Environment) -> tuple[int, str]:
        """Run a script in a worker; return its exit status and the end of its output."""
        worker = self.take(call, environment)
        try:
            status = worker.run(call, self.echo)
        except BaseException:  # interrupted: the script saves what it has
            worker.stop()
            worker.end()
            self.release(worker, again=False)
            raise
        if status:  # a failure may have left memory, a device or a library in any state
            worker.end(PATIENCE)
        self.release(worker, again=status == 0)
        with open(call.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            return status, log.read().decode("utf-8", "replace")

    def take(self, call: Call, environment: Environment) -> Worker:
        """Return a worker on the call's GPU; InputError once all are being stopped."""
        with self.lock:
            if self.stopped:
                raise InputError("interrupted")
            for worker in [worker for worker in self.idle if worker.process.poll() is not None]:
                self.idle.remove(worker)  # somebody has killed it
                worker.end()

            here = [worker for worker in self.idle if worker.gpu == call.gpu]
            # The one that has compiled this script's kernels.
            found = max(here, key=lambda worker: call.script in worker.scripts, default=None)
            if found:
                self.idle.remove(found)
            else:
                found = Worker(call.gpu, environment)
            self.busy.append(found)
            return found

    def release(self, worker: Worker, again: bool) -> None:
        """Take note that a worker's stage has ended; it can have others if `again`."""
        with self.lock:
            self.busy.remove(worker)
            if again:
                self.idle.append(worker)

    def warm(self, gpus: Iterable[str | None], environment: Callable) -> None:
        """Start a worker for each of these, so that they import while the first stages run."""
        with self.lock:
            self.idle += [Worker(gpu, environment(gpu)) for gpu in gpus]

    def idle_on(self, gpu: str | None) -> bool:
        """Return whether a worker waits for a stage on this GPU."""
        with self.lock:
            return any(worker.gpu == gpu for worker in self.idle)

    def stop(self) -> None:
        """Ask all stages to save what they have and end, and let no other one start."""
        with self.lock:
            self.stopped = True
            for worker in self.busy:
                worker.stop()

    def close(self) -> None:
        """End the workers, none of which has a stage any more."""
        with self.lock:
            for worker in self.idle:
                worker.dismiss()
            for worker in self.idle:
                worker.end(PATIENCE)
            self.idle.clear()


def signal_name(status: int) -> str | None:
    """Return the name of the signal that ended a process; None if it ended by itself."""
    if status >= 0:
        return None
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
