"""Running stages, one or several at a time, over the GPUs that there are."""

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from experiments.processes import Call, Fresh, Workers, signal_name
from experiments.stages import MARKS, SECONDS, Stage
from files.jsonl import read_json, write_json
from state.summaries import share_summaries
from trsr import InputError

NO_GPU = ""  # as CUDA_VISIBLE_DEVICES has it
TRIMMED = "trimmed.json"  # in a run folder: what each script had to cut from prompts
TOKENS = "tokens.json"  # in a run folder: what train.py learns in an epoch
RANKING = ("evaluate.py", "baselines")  # begin anew each time, while others resume from their files

# ---- The machine


def gpus_of_this_machine() -> list[str]:
    """Return the GPUs as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    n, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in given.split(",")] if given else list(map(str, range(n)))
    return names[:n]


@dataclass
class Machine:
    """How many stages run at once, with how many processes each, and where."""

    jobs: int = 1
    processes: int = 1  # of a stage, started by torchrun
    fresh: bool = False  # a new process for every stage, instead of workers
    cpu_jobs: int = 0  # baselines that run at once beside the others, on the CPU
    gpus: list[str] = field(default_factory=gpus_of_this_machine)
    busy: list[str] = field(default_factory=list)  # a GPU for every stage under way
    children: Fresh | Workers = field(init=False)

    def __post_init__(self):
        if self.jobs > 1 and self.processes > 1:
            what = f"--jobs {self.jobs} and --nproc {self.processes}"
            raise InputError(f"{what}: either several stages at once or several processes each")
        # The outputs of several would be mixed up.
        echo = self.alone and sys.stderr.isatty()
        workers = self.processes == 1 and not self.fresh
        self.children = Workers(echo) if workers else Fresh(self.processes, echo)

    @property
    def alone(self) -> bool:
        """Whether only one stage runs at a time."""
        return self.jobs + self.cpu_jobs == 1

    def on_cpu(self, stage: Stage) -> bool:
        """Return whether a stage is one of those beside the others."""
        return self.cpu_jobs > 0 and stage.script == "baselines"

    def has_room(self, stage: Stage, others: Iterable[Stage]) -> bool:
        """Return whether a stage can run beside the others that are under way."""
        kind = self.on_cpu(stage)
        n = sum(self.on_cpu(other) == kind for other in others)
        return n < (self.cpu_jobs if kind else self.jobs)

    def take_gpu(self, stage: Stage) -> str | None:
        """Return the GPU with the fewest stages; None if a stage has the whole machine."""
        if self.on_cpu(stage):
            return NO_GPU
        if self.jobs == 1 or not self.gpus:
            return None
        # Of equal ones that with a worker, so that no more workers are made than are needed.
        idle = self.children.idle_on
        gpu = min(self.gpus, key=lambda gpu: (self.busy.count(gpu), not idle(gpu)))
        self.busy.append(gpu)
        return gpu

    def warm(self, n: int) -> None:
        """Have workers for the first n stages get ready on their GPUs, if there are GPUs."""
        if self.jobs > 1 and self.gpus:
            places = [self.gpus[i % len(self.gpus)] for i in range(min(n, self.jobs))]
            self.children.warm(places, self.environment)

    def free_gpu(self, gpu: str | None) -> None:
        """Take note that a stage on this GPU has ended."""
        if gpu:
            self.busy.remove(gpu)

    def environment(self, gpu: str | None) -> dict[str, str] | None:
        """Return the environment of a stage on that GPU; None: as it is."""
        if gpu == NO_GPU:
            alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": NO_GPU}
            return dict(os.environ) | alone
        if self.jobs == 1:
            return None
        share = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        # Otherwise every stage would compile with as many processes as there are cores.
        own = {"OMP_NUM_THREADS": share, "TORCHINDUCTOR_COMPILE_THREADS": share} | os.environ
        return own | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})


class Here(Executor):
    """Runs one stage after the other in the main thread, where an interruption is raised."""

    def submit(self, function: Callable, *arguments: object) -> Future:
        """Run the function; an error of its own is the future's."""
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


# ---- One stage


def launch(call: Call, machine: Machine) -> tuple[int, str]:
    """Run a script; return its exit status and the end of its output, which is in its log."""
    return machine.children.run(call, machine.environment(call.gpu))


def reason(script: str, output: str, status: int = 2) -> str:
    """Return why a script failed: its own error line if it wrote one, else its last line."""
    if killed := signal_name(status):
        return f"it was ended by {killed}"
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    name = script.removesuffix(".py").split(".")[-1]
    form = re.compile(rf"(?:{name}|__main__)(?:\.py)?: (?:error: )?(.+)")
    own = [match for line in lines if (match := form.match(line))]
    if own:
        return own[-1].group(1)
    return lines[-1] if lines else "it printed nothing"


def execute(stage: Stage, machine: Machine, gpu: str | None = None) -> None:
    """Run a stage and mark it as finished; InputError, which names the stage, if it fails."""
    marks, log = stage.marks(), stage.run / f"{stage.mark.replace('.py', '').replace(' ', '-')}.log"
    stage.run.mkdir(parents=True, exist_ok=True)
    if stage.script == "train.py" and stage.mark in marks and not stage.made():
        # The training had finished, but its result is gone.
        shutil.rmtree(stage.run / "checkpoint", ignore_errors=True)
    if stage.script in RANKING:
        # Ranks of other flags are not to be taken for this stage's.
        for name in stage.makes:
            (stage.run / name).unlink(missing_ok=True)

    # The stages after this one lose their marks: they have to be run again.
    names = list(marks)
    if stage.mark in names:
        names = names[: names.index(stage.mark)]
    before = {name: marks[name] for name in names}
    write_json(stage.run / MARKS, before)
    if stage.summaries:
        share_summaries(stage.summaries, stage.run)
    if stage.settings_of:
        write_json(stage.run / "config.json", read_json(stage.settings_of / "config.json"))
    began = time.perf_counter()
    status, output = launch(Call(stage.script, stage.flags, log, gpu), machine)
    if status or not stage.made():
        why = f"it made no {' or '.join(stage.makes)}"
        if status:
            why = reason(stage.script, output, status)
        raise InputError(f"{stage.run}: {stage.script} failed: {why} (its output is in {log})")
    note(stage, SECONDS, round(time.perf_counter() - began, 1))
    note_output(stage, log.read_text("utf-8", "replace"))
    write_json(stage.run / MARKS, before | {stage.mark: stage.key})


def note_output(stage: Stage, output: str) -> None:
    """Record what the script says it reads and cut from its prompts, if it has made any."""
    if told := re.search(r"(\d+) tokens an epoch", output):
        note(stage, TOKENS, int(told[1]))
    if "prompt  " not in output:
        return
    found = re.findall(r"trimmed to the context: (\d+) ([\w ]+)", output)
    note(stage, TRIMMED, {what: int(n) for n, what in found})


def note(stage: Stage, name: str, value: object) -> None:
    """Record something of a stage in a file of its run folder, which has a field per script."""
    path = stage.run / name
    before = read_json(path) if path.is_file() else {}
    write_json(path, before | {stage.mark: value})


def untrimmed(run: list[Stage]) -> bool:
    """Return whether no prompt of a run was cut, neither in training nor in evaluation."""
    path = run[-1].run / TRIMMED
    cut = read_json(path) if path.is_file() else {}
    return all(cut.get(script) == {} for script in ("train.py", "evaluate.py"))


# ---- All stages


class Jobs:
    """Runs the stages that plan() says are left, each as soon as those before it are done.

    plan is asked again whenever a stage has finished, so it can name others by then. A stage that
    fails stops only those that wait for it. One that does not fit() is passed over. When
    time.monotonic() reaches `until`, the running stages are asked to save their work and end.
    note() is called with each stage that has finished.
    """

    def __init__(
        self,
        plan: Callable[[], list[Stage]],
        machine: Machine,
        total: int,
        fits: Callable[[Stage], bool] = lambda stage: True,
        until: float = math.inf,
        note: Callable[[Stage], None] = lambda stage: None,
    ):
        self.plan, self.machine, self.total = plan, machine, total
        self.fits, self.until, self.note = fits, until, note
        self.under_way: dict[Future, tuple[Stage, str | None, float]] = {}
        self.started: set[Stage] = set()
        self.failed: dict[Stage, Exception] = {}
        self.ended = 0

    def run(self) -> None:
        """Run all; InputError, with a line for each stage that failed, at the end."""
        machine = self.machine
        machine.warm(self.total)
        n = machine.jobs + machine.cpu_jobs
        pool = Here() if n == 1 and self.until == math.inf else ThreadPoolExecutor(n)
        try:
            while self.start_due(pool) or self.under_way:
                seconds = None if self.until == math.inf else self.until - time.monotonic()
                done = wait(self.under_way, seconds, FIRST_COMPLETED).done
                if not done:
                    n = len(self.under_way)
                    what = f"{n} stages, which save their" if n > 1 else "1 stage, which saves its"
                    print(f"  time is up: stopping {what} work", flush=True)
                    break
                for future in done:
                    self.conclude(future)
        finally:
            machine.children.stop()  # after an interruption; otherwise all have ended
            pool.shutdown()
            machine.children.close()

        if self.failed:
            raise InputError("\n".join(map(str, self.failed.values())))
        if self.under_way:  # stopped at the end of the time
            return
        if left := [stage for stage in self.plan() if stage in self.started]:
            first = left[0]
            what = f"{first.script} is not done after it was run; is another process at work here?"
            raise InputError(f"{first.run}: {what}")

    def start_due(self, pool: Executor) -> bool:
        """Start what can start now; return whether anything did."""
        before, began = [*self.failed, *(stage for stage, *_ in self.under_way.values())], False
        for stage in self.plan():
            free = self.machine.has_room(stage, [s for s, *_ in self.under_way.values()])
            waits = any(stage.follows(other) for other in before if other != stage)
            before.append(stage)
            if free and not waits and stage not in self.started and self.fits(stage):
                self.start(stage, pool)
                began = True
        return began

    def start(self, stage: Stage, pool: Executor) -> None:
        """Start a stage; alone, it is announced by a line that its end completes."""
        self.started.add(stage)
        if self.machine.alone:
            # On a terminal the stage's own output follows, on lines of its own.
            print(self.title(stage), end="\n" if sys.stderr.isatty() else "", flush=True)
        gpu, began = self.machine.take_gpu(stage), time.perf_counter()
        future = pool.submit(execute, stage, self.machine, gpu)
        self.under_way[future] = stage, gpu, began

    def title(self, stage: Stage) -> str:
        """Return how a stage's line begins."""
        number = self.ended + 1
        return f"{f'{number}/{max(number, self.total)}':<8}{stage.run.name}: {stage.mark}"

    def conclude(self, future: Future) -> None:
        """Tell that a stage has ended, and how long it took."""
        stage, gpu, began = self.under_way.pop(future)
        self.machine.free_gpu(gpu)
        error = future.exception()
        if error is not None and not isinstance(error, InputError | OSError):
            raise error
        text = f"  {time.perf_counter() - began:.0f} s"
        if not self.machine.alone:
            text = self.title(stage) + text
        self.ended += 1
        if error is None:
            self.note(stage)
        else:
            self.failed[stage] = error
            text += f", failed: {error}"
        print(text, flush=True)
