"""The summaries of many users at once: one engine answers the prompts of all of them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from launch.bars import WritingBar
from launch.processes import ranks, share_out
from models.chat import Form
from state.answers import Answers
from trsr import InputError, Node, Summarization, solve

# ---- Whose turn it is


def own_users(users: list[str], texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return this process's share of the users with their histories' texts, the longest first.

    The shares are about equal in length; the last users to finish are to be short ones.
    """
    (rank, world), sizes = ranks(), [sum(map(len, texts[user])) for user in users]
    mine = {users[i]: texts[users[i]] for i in share_out(sizes, world)[rank]}
    return dict(sorted(mine.items(), key=lambda pair: -len(pair[1])))


# ---- Many users at once


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


# ---- The engine


class Writer:
    """Answers prompts, texts in and texts out: the engine that run_tasks drives.

    generator: summarize.Generator. answers: those that are known, of which the model is not asked;
    what it writes is added to them as it comes.
    """

    def __init__(
        self, generator, form: Form, bar: WritingBar | None = None, answers: Answers | None = None
    ):
        self.generator, self.form, self.bar, self.answers = generator, form, bar, answers
        self.written = self.answered = 0  # tokens, and texts, that are done
        self.counts: Counter = Counter()  # of prompts: asked of the model, or known
        self.ends: defaultdict[str, Counter] = defaultdict(Counter)  # how each user's texts ended
        self.known: list[tuple[tuple, str]] = []  # (key, answer) pairs to be returned next
        self.asked: dict[str, list[tuple]] = {}  # what the model works on, and who waits for it

    def has_room(self) -> bool:
        """Return whether to start another user: there should always be prompts for free rows."""
        return len(self.generator.waiting) + len(self.known) < self.generator.n_rows

    def submit(self, prompts: list[tuple[tuple, str]], first: bool) -> None:
        """Queue (key, prompt) pairs; `first`: before those of users who have not started."""
        new: dict[str, str] = {}  # messages, by the prompts that they become
        for key, message in prompts:
            prompt = self.form.show(message)
            if self.answers is not None and (found := self.answers.get(prompt)):
                self.known.append(self._answered(key, *found))
            elif prompt in self.asked:  # of another user, or of this one
                self.asked[prompt].append(key)
            else:
                self.asked[prompt] = [key]
                new[prompt] = message
        self.counts.update(asked=len(new), known=len(prompts) - len(new))
        if new:
            ids = self.form.encode(list(new.values()))
            self.generator.submit(zip(new, ids, strict=True), first)

    def _answered(self, key: tuple, answer: str, ended: str) -> tuple[tuple, str]:
        """Return the pair for run_tasks, and count how the text ended."""
        user, _ = key
        self.ends[user][ended] += 1
        self.answered += 1
        return key, answer

    def finished(self) -> list[tuple[tuple, str]]:
        """Work for a step; return the (key, answer) pairs that it completed."""
        if self.known:  # nothing to work for
            known, self.known = self.known, []
            return known
        try:
            done = self.generator.step()
        except torch.OutOfMemoryError:
            self._lower_batch_size()
            return []  # the unfinished prompts are in the queue again
        pairs = []
        for row in done:
            self.written += len(row.tokens)
            text = self.form.tokenizer.decode(row.tokens)
            answer = self.generator.choice.shown(text, row.ended)
            if self.answers is not None:
                self.answers.add(row.key, answer, row.ended)
            pairs += [self._answered(key, answer, row.ended) for key in self.asked.pop(row.key)]
        if self.bar is not None:
            under_way = sum(len(row.tokens) for row in self.generator.rows)
            self.bar.wrote(self.written, self.answered, under_way)
        return pairs

    def _lower_batch_size(self) -> None:
        if self.generator.n_rows == 1:
            what = "out of memory with one prompt per batch"
            raise InputError(f"{what}; lower --max-length, or use --int8 or --fp8") from None
        self.generator.shrink()
        if self.bar is not None:
            rows = self.generator.n_rows
            self.bar.write(f"out of memory: continuing with {rows} prompts per batch")


def recalled(task: Summarization, form: Form, answers: Answers) -> Node | None:
    """Return the root of a user's summarization if all its answers are known, else None."""

    def recall(messages: list[str]) -> list[str]:
        found = [answers.get(form.show(message)) for message in messages]
        if None in found:
            raise LookupError
        return [answer for answer, _ in found]

    try:
        return solve(task, recall)
    except LookupError:
        return None
