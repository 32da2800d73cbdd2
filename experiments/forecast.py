"""What stages will take, in tokens, before any of them is run: an experiment's --dry-run.

    python -m experiments.table2 --data data/games --out runs/games --dry-run
    python -m experiments.forecast train.py --data data/games --model FOLDER    # of a single call

The prompts of some users of each split are made and tokenized as the scripts do it, and the rest is
extrapolated; of a small split all are. Summaries that are not there yet count with as many tokens
as they may have at most; those by rule are made.
"""

import io
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import evaluate
import summarize
import train
import trsr
from batches.candidates import Choice as Candidates
from batches.candidates import with_candidates
from batches.catalogue import Tails
from batches.positions import prompts_to_learn
from batches.prompts import Prompts, Ranking
from experiments import ruled
from experiments.corpus import Corpus
from experiments.stages import SECONDS, Stage
from files.jsonl import read_json, read_jsonl, write_jsonl
from launch.command import parse_settings, run_main
from llama import CheckpointError
from models.hub import find_model, load_form
from prepare.dataset import load_dataset
from trsr import SUMMARIZED, Example, InputError, content_hash, split_blocks

SAMPLE = 48  # users whose prompts are tokenized, of those to learn from or to summarize
RANKED = 16  # likewise of those to rank for, since each has many candidates
ITEMS = 500  # whose tokens are counted, or a few more
RULED = "experiments.ruled"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Work:
    """The tokens of a stage: read with gradients, read without, and written at most."""

    learned: float = 0.0
    scored: float = 0.0
    written: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def parts(self) -> tuple[float, float, float]:
        """The three numbers."""
        return self.learned, self.scored, self.written

    @property
    def effort(self) -> float:
        """What the time is proportional to: without gradients, a token takes half as long."""
        return self.written or self.learned + self.scored / 2

    def __bool__(self) -> bool:
        return any(self.parts)

    def __str__(self) -> str:
        names = zip(self.parts, ("to learn", "to read", "to write"), strict=True)
        return ", ".join(f"{n:,.0f} {name}" for n, name in names if n)


# ---- Flags and users


@contextmanager
def command_line(script: str, flags: Sequence[str]) -> Iterator[None]:
    """Make these flags those of this process."""
    before = sys.argv
    sys.argv = [script, *flags]
    try:
        yield
    finally:
        sys.argv = before


def settings_of(form: type, script: str, flags: Sequence[str]):
    """Return a script's settings; InputError for a wrong flag."""
    said = io.StringIO()
    try:
        with command_line(script, flags), redirect_stderr(said):
            return parse_settings(form, "")
    except SystemExit:
        # The parser's line begins with the command of this process.
        what = said.getvalue().partition(": ")[2].strip() or f"no settings: {shlex.join(flags)}"
        raise InputError(f"{script}: {what}") from None


@cache
def dataset(data: str) -> tuple:
    """Return load_dataset's (domain, items, examples by split)."""
    return load_dataset(Path(data), SPLITS)


@cache
def rule_of(data: str):
    """Return the rule of experiments.ruled."""
    return Corpus.load(data).rule


def sampled(examples: Sequence[Example], items: dict[str, str], most: int) -> list[Example]:
    """Return so many of the examples, of short and long texts alike, or all if there are less.

    The examples are put in order of their texts' length, and one is taken of each equal part.
    """

    def length(example: Example) -> int:
        return sum(len(items[i]) for i in (*example.history, example.positive, *example.negatives))

    n, ordered = min(most, len(examples)), sorted(examples, key=length)
    return [ordered[int((j + 0.5) * len(ordered) / n)] for j in range(n)]


def over_all(examples: Sequence, sample: Sequence, sizes: Sequence[float]) -> float:
    """Return the sum of sizes, which are the sample's, as it will be over all examples."""
    return sum(sizes) * len(examples) / len(sample)


# ---- Summaries


@dataclass(frozen=True)
class Source:
    """Where a run's summaries come from: the script that makes them, its flags, its run folder."""

    script: str
    flags: tuple[str, ...]
    run: Path

    def lines(self, examples: Sequence[Example], items: dict[str, str]) -> tuple[list[dict], bool]:
        """Return the examples' lines of summaries.jsonl, and whether they are only assumed."""
        path, found = self.run / "summaries.jsonl", {}
        if path.is_file():
            found = {line["user"]: line for _, line in read_jsonl(path, {"user": str})}
        assumed, make = not all(example.user in found for example in examples), self.maker()
        made = []
        for example in examples:
            texts = [items[i] for i in example.history]
            line = {"user": example.user, "paradigm": ""} | (found.get(example.user) or make(texts))
            # The key that a run without settings of its summaries expects.
            made.append(line | {"key": content_hash([{}, texts])})
        return made, assumed and self.script != RULED

    def maker(self) -> Callable[[list[str]], dict]:
        """Return what makes a user's summary, for want of the right one."""
        if self.script == RULED:
            asked = settings_of(ruled.Settings, self.script, self.flags)
            domain, rule = dataset(str(asked.data))[0], rule_of(str(asked.data))
            way = ruled.WAYS[asked.paradigm]

            def by_rule(texts: list[str]) -> dict:
                root = way(rule, texts, domain, asked.block_size)
                return {"summary": root["summary"], "tree": root}

            return by_rule
        asked, _ = summarizer_of(self.flags)
        text = longest_summary(self.flags)

        def of_most_tokens(texts: list[str]) -> dict:
            ends = [end for _, end in split_blocks(len(texts), asked.block_size)]
            tree = {"summary": text, "before": [[end, text] for end in ends[:-1]]}
            return {"summary": text, "tree": tree}

        return of_most_tokens


@cache
def summarizer_of(flags: tuple[str, ...]) -> tuple:
    """Return summarize.py's resolved settings and its Summarizer."""
    asked = settings_of(summarize.Settings, "summarize.py", flags)
    asked = summarize.resolve(asked, torch.device("cpu"))
    return asked, summarize.Summarizer.of(asked, dataset(asked.data)[0])


@cache
def longest_summary(flags: tuple[str, ...]) -> str:
    """Return a text of items with about as many tokens as a summary may have."""
    _, summarizer = summarizer_of(flags)
    items, most = dataset(summarizer.settings.data)[1], summarizer.settings.max_new_tokens
    words = " ".join(list(items.values())[:200]).split()
    encode = summarizer.form.tokenizer.encode
    low, high = 1, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode([" ".join(words[:middle])])[0]) <= most:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


# ---- Stages


class Forecast:
    """Foresees stages, of which many have equal prompts: those are tokenized once.

    known: the work of prompts by what determines them, such as from an earlier call.
    """

    def __init__(self, known: dict[str, Work] | None = None):
        self.known = known or {}
        self.assumed = False  # whether summaries had to be

    def work(self, stage: Stage, all_stages: Sequence[Stage]) -> Work:
        """Return the work of a stage; all_stages: where those are that it builds on."""
        if stage.script == "summarize.py":
            return self.once(("write", stage.flags), lambda: write_work(stage.flags))
        if stage.script not in ("train.py", "evaluate.py"):
            return Work()  # it has no language model, or a baseline's small one

        trained = stage.run if stage.script == "train.py" else stage.settings_of or stage.run
        training = next(s for s in all_stages if (s.run, s.script) == (trained, "train.py"))
        sources = [s for s in all_stages if s.run == training.summaries]
        source = Source(sources[0].script, sources[0].flags, sources[0].run) if sources else None
        if stage.script == "train.py":
            return self.train_work(stage.flags, source)
        return self.rank_work(training.flags, stage.flags, source)

    def once(self, key: tuple, make: Callable[[], Work]) -> Work:
        """Return make(), made once for each key."""
        name = repr(key)
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def train_work(self, flags: Sequence[str], source: Source | None) -> Work:
        """Return the work of train.py: what it learns in all epochs, and its validations."""
        asked = settings_of(train.Settings, "train.py", flags)
        asked = train.resolve(asked, torch.device("cpu"))
        _, _, splits = dataset(asked.data)
        key = prompt_key(asked, source)

        def learned() -> Work:
            users = asked.which.limited(splits["train"])
            return Work(learned=self.tokens(asked, source, users, learn=True))

        def validated() -> Work:
            return Work(scored=self.tokens(asked, source, splits["val"], learn=False))

        each = self.once(("learn", *key), learned) + self.once(("val", *key), validated)
        return Work(each.learned * asked.epochs, each.scored * asked.epochs)

    def rank_work(
        self, trained: Sequence[str], flags: Sequence[str], source: Source | None
    ) -> Work:
        """Return the work of evaluate.py after a training with the flags `trained`."""
        asked = settings_of(train.Settings, "train.py", trained)
        asked = train.resolve(asked, torch.device("cpu"))
        own = settings_of(evaluate.Settings, "evaluate.py", flags)
        test = dataset(asked.data)[2][own.split][: own.users]

        def ranked() -> Work:
            return Work(scored=self.tokens(asked, source, test, False, own.candidates, own.seed))

        what = own.split, own.users, own.candidates, own.seed
        return self.once((*what, *prompt_key(asked, source)), ranked)

    def tokens(
        self,
        asked: train.Settings,
        source: Source | None,
        examples: list[Example],
        learn: bool,
        candidates: Candidates = None,
        seed: int = 0,
    ) -> float:
        """Return the tokens of all examples' trees, with answers or with candidates to rank.

        candidates and seed: evaluate.py's.
        """
        domain, items, _ = dataset(asked.data)
        sample = sampled(examples, items, SAMPLE if learn else RANKED)
        folder = find_model(asked.model, asked.revision)
        with TemporaryDirectory() as name:
            run = Path(name)
            if asked.paradigm in SUMMARIZED:
                lines, assumed = (source or own_source(asked)).lines(sample, items)
                write_jsonl(run / "summaries.jsonl", lines)
                self.assumed |= assumed
            form, here = load_form(folder, asked.chat), replace(asked, run=run)
            recommender, answers = evaluate.make_recommender(
                here, folder, form, domain, items, sample
            )
            if learn:
                prompts = prompts_to_learn(recommender, sample, answers, asked.which, run)
            else:
                ranking = Ranking.of(recommender, sample)
                users = zip(ranking.examples, ranking.candidates, strict=True)
                prompts = Prompts(recommender, list(users))
            trees = [prompts[i][0] for i in range(len(prompts))]
        if errors := [tree for tree in trees if isinstance(tree, InputError)]:
            raise errors[0]
        sizes: list[float] = [tree.size for tree in trees]
        if candidates is not None:
            ranked = with_candidates(candidates, sample, items, seed)
            tail = tail_length(asked.data, asked.model, asked.revision, asked.chat)
            rest = [tail * (1 + len(example.negatives)) for example in ranked]
            sizes = [len(tree.prefix) + n for tree, n in zip(trees, rest, strict=True)]
        return over_all(examples, sample, sizes)


@cache
def tail_length(data: str, model: str, revision: str | None, chat: bool) -> float:
    """Return the mean tokens that an item of the dataset adds to a prompt."""
    domain, items, _ = dataset(data)
    budget = trsr.Budget(2**20, load_form(find_model(model, revision), chat).encode, Counter())
    texts = dict(list(items.items())[:: max(1, len(items) // ITEMS)])
    recommender = trsr.Recommender("none", domain, texts, {}, 0, budget)
    return Tails.of(recommender, list(texts)).mean_length


def prompt_key(asked: train.Settings, source: Source | None) -> tuple:
    """Return what determines the prompts of a training."""
    names = "data model revision paradigm history_items chat max_length which"
    return (*(getattr(asked, name) for name in names.split()), source)


def own_source(asked: train.Settings) -> Source:
    """Return the summaries of a training's own run folder, as summarize.py would make them."""
    flags = "--data", asked.data, "--model", asked.model, "--paradigm", asked.paradigm
    return Source("summarize.py", (*flags, "--run-dir", str(asked.run)), asked.run)


def write_work(flags: tuple[str, ...]) -> Work:
    """Return the work of summarize.py: the prompts, and summaries as long as they may get."""
    asked, summarizer = summarizer_of(flags)
    _, items, splits = dataset(asked.data)
    text, total = longest_summary(flags), Work()
    for examples in splits.values():
        sample, sizes = sampled(examples, items, SAMPLE), []
        for example in sample:
            task = summarizer.task([items[i] for i in example.history], Counter())
            read, asked_for, answers = 0, 0, None
            try:
                while True:
                    prompts = task.send(answers)
                    read += sum(map(len, summarizer.form.encode(prompts)))
                    asked_for += len(prompts)
                    answers = [text] * len(prompts)
            except StopIteration:
                sizes.append((read, asked_for * asked.max_new_tokens))
        read, written = (over_all(examples, sample, column) for column in zip(*sizes, strict=True))
        total += Work(scored=read, written=written)
    return total


# ---- What an experiment will take


def foresee(stages: Sequence[Stage], left: Sequence[Stage], jobs: int, speed: float | None) -> None:
    """Print the tokens of the stages that are left, their sum, and the minutes.

    The minutes come from the stages that have finished: how long those of a script took. Where none
    has, speed counts, the tokens that train.py learns per second, and ranking is twice as fast.
    """
    forecast, works = Forecast(), {}
    for stage in left:
        works[stage] = work = forecast.work(stage, stages)
        print(f"{stage.run.name}: {stage.script}  {work}".rstrip())
    print(f"tokens  {sum(works.values(), Work()) or 'none'} in {len(left)} stages")
    if forecast.assumed:
        print("        summaries that are not there yet count with as many tokens as they may have")

    rates = {}
    for script in dict.fromkeys(stage.script for stage in left):
        rates[script] = seconds_per_effort(script, stages, forecast)
        if rates[script] is None and speed and script in ("train.py", "evaluate.py"):
            rates[script] = 1 / speed
    unknown = [script for script, rate in rates.items() if rate is None]
    times = [rates[s.script] * effort_of(s, works[s]) for s in left if s.script not in unknown]
    if times:
        together = f"; {jobs} at a time {sum(times) / 60 / jobs:.1f}" if jobs > 1 else ""
        print(f"minutes {sum(times) / 60:.1f}{together}")
    if unknown:
        why = "none has finished here to go by"
        print(f"        without {', '.join(unknown)}: {why}")


def effort_of(stage: Stage, work: Work) -> float:
    """Return what a stage's time is proportional to; stages without tokens are all alike."""
    return work.effort or 1.0


def seconds_per_effort(script: str, stages: Sequence[Stage], forecast: Forecast) -> float | None:
    """Return the mean seconds per effort_of the script's finished stages; None without any."""
    seconds = efforts = 0.0
    for stage in stages:
        path = stage.run / SECONDS
        if stage.script != script or not stage.finished() or not path.is_file():
            continue
        if taken := read_json(path).get(stage.mark):
            seconds += taken
            efforts += effort_of(stage, forecast.work(stage, stages))
    return seconds / efforts if seconds else None


# ---- A single call


def main() -> None:
    """Print the tokens of one call of a script."""
    script, flags = [*sys.argv, ""][1], tuple(sys.argv[2:])
    forecast = Forecast()
    if script == "train.py":
        work = forecast.train_work(flags, None)
    elif script == "summarize.py":
        work = write_work(flags)
    else:
        raise InputError(f"expected train.py or summarize.py and its flags, not {script!r}")
    print(f"tokens  {work}, estimated from a sample of users")
    if forecast.assumed:
        print("summaries are not there yet: each counts with as many tokens as it may have")


if __name__ == "__main__":
    run_main(main, CheckpointError)
