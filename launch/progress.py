"""What a training tells while it works."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from files.jsonl import append_jsonl
from launch.bars import Bar
from launch.processes import peak_memory
from trsr import Example, InputError


class StepBar:
    """A bar of optimizer steps with loss, rate and memory; after ten steps it foresees an epoch."""

    def __init__(self, total: int, done: int, tokens_per_epoch: int, device: torch.device):
        self.tokens, self.device, self.speeds = tokens_per_epoch, device, []
        self.bar = Bar(total=total, initial=done, unit="step")

    def step(self, epoch: int, loss: float, lr: float, speed: float) -> None:
        """Show a step that was done at `speed` tokens/s."""
        what = f"epoch {epoch}, loss {loss:.4f}, lr {lr:g}, {speed:.0f} tokens/s"
        self.bar.set_postfix_str(f"{what}, {peak_memory(self.device)}")
        self.bar.update()
        self.speeds.append(speed)
        if len(self.speeds) == 10:  # the first ones compile
            rate = median(self.speeds)
            minutes = self.tokens / rate / 60
            self.write(f"after ten steps {rate:.0f} tokens/s: {minutes:.1f} minutes per epoch")

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.write(line)


class StepLog:
    """Tells of each optimizer step, on a GPU once the next one is launched, so that it never waits.

    It writes a line per step and per epoch to metrics.jsonl and shows a bar. bar: of the first
    process; the others have None and tell nothing.
    """

    def __init__(self, settings, users: Sequence[Example], bar: StepBar | None):
        self.settings, self.users, self.bar = settings, users, bar
        self.running = None  # what was launched: (its number, its epoch, the step, its outcome)
        self.ended = 0.0  # when the last step had ended

    def begin(self) -> None:
        """Take the time from which the next step counts, with the wait for its packs."""
        self.ended = time.perf_counter()

    def launch(self, number: int, epoch: int, step, make: Callable) -> None:
        """Launch a step, then tell of the one before. make: launches it, and returns its outcome.

        Raises InputError if memory runs out, or if the loss before was not finite.
        """
        with self.explaining(number, step):
            try:
                outcome = make()
            finally:  # also if that failed
                self.settle()
        self.running = number, epoch, step, outcome
        if outcome.values.ready:
            self.settle()

    def settle(self) -> None:
        """Wait for what was launched, and tell of it."""
        if self.running is None:
            return
        (number, epoch, step, outcome), self.running = self.running, None
        with self.explaining(number, step):
            loss, norm = outcome.read()
        now, lr = time.perf_counter(), self.settings.lr
        speed, self.ended = step.tokens / (now - self.ended), now
        self.write(number, epoch, loss=loss, grad_norm=norm, lr=lr, tokens_per_second=speed)
        if self.bar:
            self.bar.step(epoch, loss, lr, speed)

    def validated(self, number: int, epoch: int, recall: dict[str, float], best: bool) -> None:
        """Tell of the validation after an epoch."""
        self.write(number, epoch, validation=recall)
        if self.bar:
            values = ", ".join(f"{name} {value:.4f}" for name, value in recall.items())
            note = ", best so far" if best else ""
            self.bar.write(f"epoch {epoch}: validation {values}{note}")

    def write(self, number: int, epoch: int, **record: object) -> None:
        """Append a line to metrics.jsonl."""
        if self.bar:
            place = {"step": number, "epoch": epoch}
            append_jsonl(self.settings.run / "metrics.jsonl", place | record)

    @contextmanager
    def explaining(self, number: int, step) -> Iterator[None]:
        """Raise InputError, with the way out, if a step runs out of memory or is not finite."""
        try:
            yield
        except torch.OutOfMemoryError:
            n, length, batch = len(step.packs), len(step.packs[0].ids), self.settings.batch_size
            what = f"a pack of {length} tokens, {n} of them in a batch of {batch}"
            way = "lower --pack-tokens, add --no-cuda-graphs, or add --activation-checkpointing"
            raise InputError(f"out of memory with {what}; {way}") from None
        except FloatingPointError as error:
            who = ", ".join(self.users[user].user for user in step.users)
            way = f"lower --lr, or look at the data of its users: {who}"
            raise InputError(f"step {number}: {error}; {way}") from None
