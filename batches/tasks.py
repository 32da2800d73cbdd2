"""The summaries of many users at once: one engine answers the prompts of all of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from models.chat import Form
from trsr import InputError, Node, Summarization


@dataclass
class _Waiting:
    """A user's summarization, the answers so far, and how many it waits for."""

    task: Summarization
    due: int
    answers: dict[int, str] = field(default_factory=dict)


def run_tasks(tasks: Iterable[tuple[str, Summarization]], engine) -> Iterator[tuple[str, Node]]:
    """Yield (user, root) as users finish; each continues once its own prompts are answered.

    The engine answers prompts in any order. A prompt's key is (user, number).
        has_room() -> bool                whether another user should start
        submit(pairs, first)              take (key, prompt) pairs, `first`: before all others
        finished() -> pairs               work for a while; the (key, answer) pairs that are done
    """
    waiting: dict[str, _Waiting] = {}

    def advance(user: str, task: Summarization, answers: list[str] | None):
        """Give task its answers; yield its root if it is done, else submit what it asks next."""
        try:
            prompts = task.send(answers)
        except StopIteration as end:
            yield user, end.value
            return
        waiting[user] = _Waiting(task, len(prompts))
        # A user who has begun goes before those who have not, so that users finish steadily.
        numbered_prompts = [((user, i), prompt) for i, prompt in enumerate(prompts)]
        engine.submit(numbered_prompts, first=answers is not None)

    tasks = iter(tasks)
    while True:
        while engine.has_room() and (started := next(tasks, None)):
            yield from advance(*started, None)
        if not waiting:  # no user is under way, and none is left to start
            return
        for (user, i), answer in engine.finished():
            asked = waiting[user]
            asked.answers[i] = answer
            if len(asked.answers) == asked.due:  # the user can go on
                del waiting[user]
                yield from advance(user, asked.task, [asked.answers[i] for i in range(asked.due)])


class Writer:
    """Answers prompts, texts in and texts out: the engine that run_tasks drives.

    generator: summarize.Generator.
    """

    def __init__(self, generator, form: Form, bar: tqdm | None = None):
        self.generator, self.form, self.bar = generator, form, bar
        self.written = 0  # tokens so far
        self.ends: defaultdict[str, Counter] = defaultdict(Counter)  # how each user's texts ended

    def has_room(self) -> bool:
        """Return whether to start another user: there should always be prompts for free rows."""
        return len(self.generator.waiting) < self.generator.n_rows

    def submit(self, prompts: list[tuple[object, str]], first: bool) -> None:
        """Queue (key, prompt) pairs; `first`: before those of users who have not started."""
        keys, texts = zip(*prompts, strict=True)
        ids = self.form.encode(list(texts))
        self.generator.submit(zip(keys, ids, strict=True), first)

    def finished(self) -> list[tuple[object, str]]:
        """Work for a step; return the (key, answer) pairs that it completed."""
        try:
            done = self.generator.step()
        except torch.OutOfMemoryError:
            self._lower_batch_size()
            return []  # the unfinished prompts are in the queue again
        for row in done:
            self.written += len(row.tokens)
            self.ends[row.key[0]][row.ended] += 1  # a key is (user, number)
        if self.bar is not None:
            rate = self.written / max(self.bar.format_dict["elapsed"], 1e-9)
            self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=bool(done))
        decode, shown = self.form.tokenizer.decode, self.generator.choice.shown
        return [(row.key, shown(decode(row.tokens), row.ended)) for row in done]

    def _lower_batch_size(self) -> None:
        if self.generator.n_rows == 1:
            what = "out of memory with one prompt per batch"
            raise InputError(f"{what}; lower --max-length, or use --int8") from None
        self.generator.shrink()
        if self.bar is not None:
            rows = self.generator.n_rows
            self.bar.write(f"out of memory: continuing with {rows} prompts per batch")
