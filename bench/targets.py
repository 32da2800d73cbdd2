"""What every position as a target costs: computed tokens and time of an example.

    python -m bench.targets --data data/games --model data/models/smollm2       # tokens, no GPU
    python -m bench.targets --data data/games --model data/models/smollm2 --history 16
    python -m bench.targets --data data/games --model data/models/smollm2 --shape tiny   # and time

For each paradigm, with one target for each user and with all: the tokens of an example read apart;
computed in packs if the examples of one position share their prefix; computed in packs with one
tree for each user. In packs, the instruction is there once for all. "own" are the tokens that an
example shares with no other: nothing computes fewer.

Counting needs no weights. --shape trains random ones on these prompts, in steps like those of
train.py, and prints the examples/s of separate positions and of trees; on a CPU, a second of CPU
time counts, without packing. Token ids beyond that shape's vocabulary are wrapped around, which
changes no time.

Summaries are written by a rule (experiments/rule.py), for every block; --summary-words repeats
their words to another length. --run has those of a model, made with summarize.py --every-block.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice
from pathlib import Path

import torch

import trsr
from batches.positions import ALL, EveryPosition, Targets
from batches.prompts import Prompts
from bench import train
from bench.common import make_models
from bench.shapes import SHAPES
from experiments.corpus import BLOCK, Corpus
from experiments.ruled import WAYS
from launch.command import option, parse_settings
from launch.numbers import natural, positive
from launch.processes import join_processes, run_script, same_bits
from models.hub import find_model, load_config, load_form
from ops.packs import Tree, make_tree, pack_trees
from prepare.dataset import load_dataset
from state.settings import read_config
from state.summaries import load_before, load_summaries


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: str = option("data/demo", "dataset folder made by prepare", group="files")
    model: str = option("models/tiny", "model folder or hub id, for its tokenizer")
    run: Path | None = option(None, "run folder with summaries (unset: by a rule)", Path)
    users: int = option(100, "training users to count", positive, "prompts")
    history: int | None = option(
        None, "items before the target: longer histories are cut, shorter ones left out", positive
    )
    negatives: int = option(1, "negatives of a position", positive)
    history_items: int = option(3, "recent items in the prompt", natural)
    block_size: int = option(BLOCK, "items per block of the summaries by rule", positive)
    summary_words: int | None = option(
        None, "words of each summary by rule (unset: as many as the rule writes)", positive
    )
    max_length: int = option(2048, "longest prompt with its answer", positive)
    pack_tokens: int = option(8192, "tokens of a pack", positive)
    shape: str | None = option(
        None, "shape of the model to time", choices=tuple(SHAPES), group="time"
    )
    timed_users: int = option(4, "users of a timed step", positive)
    cuda_graphs: bool | None = option(
        None, "on a GPU, launch passes whole, as in train.py (unset: if it pays)"
    )
    repeats: int = option(3, "timings; the median counts", positive)


# ---- Prompts


def chosen(settings: Settings, examples: list[trsr.Example]) -> list[trsr.Example]:
    """Return the users to count, with as much of the history and as many negatives as asked for."""
    history, n = settings.history or 0, settings.negatives
    found = [
        replace(example, history=example.history[-history:], negatives=example.negatives[:n])
        for example in examples
        if len(example.history) >= history
    ][: settings.users]
    if not found:
        raise trsr.InputError(f"--history {history}: no user of {settings.data} has as many items")
    if len(found[0].negatives) < n:
        raise trsr.InputError(
            f"--negatives {n}: {settings.data} has {len(found[0].negatives)}; "
            "prepare it with --train-negatives"
        )
    return found


@dataclass(frozen=True)
class Summaries:
    """The last summary of each user, and those of the blocks before as (items, summary)."""

    last: dict[str, str]
    before: dict[str, list[tuple[int, str]]]

    @classmethod
    def of_run(cls, run: Path, items: dict[str, str], examples: list[trsr.Example]) -> "Summaries":
        """Return a run's summaries."""
        return cls(load_summaries(run, items, examples), load_before(run, examples))

    @classmethod
    def by_rule(
        cls, settings: Settings, paradigm: str, items: dict[str, str], examples: list[trsr.Example]
    ) -> "Summaries":
        """Return summaries by the rule of the training split."""
        corpus, last, before = Corpus.load(settings.data), {}, {}
        for example in examples:
            texts, size, made = [items[i] for i in example.history], settings.block_size, []
            for _, end in trsr.split_blocks(len(texts), size):
                root = WAYS[paradigm](corpus.rule, texts[:end], corpus.domain, size)
                words = root["summary"].split()
                n = settings.summary_words or len(words)
                made.append((end, " ".join(islice(cycle(words), n))))
            *before[example.user], (_, last[example.user]) = made
        return cls(last, before)

    def words(self) -> float:
        """Return the mean number of words."""
        texts = [*self.last.values(), *(text for made in self.before.values() for _, text in made)]
        return sum(len(text.split()) for text in texts) / len(texts)


def paradigms(settings: Settings) -> list[str]:
    """Return the paradigms that have several positions, and summaries if they need them."""
    summarized = [name for name in trsr.SUMMARIZED if name in WAYS]
    if settings.run:
        summarized = [read_config(settings.run)["summarize"]["paradigm"]]
    others = [name for name in trsr.PARADIGMS if name not in (*trsr.SUMMARIZED, "none")]
    return [*others, *summarized]


# ---- Trees


@dataclass(frozen=True)
class Trees:
    """The trees of each user: one for each position, and one of all positions."""

    apart: list[list[Tree]]
    together: list[Tree]

    @classmethod
    def of(cls, prompts: Prompts) -> "Trees":
        """Return the trees of the prompts; InputError if one cannot be made."""
        together = [tree for tree, _ in (prompts[i] for i in range(len(prompts)))]
        for error in together:
            if isinstance(error, trsr.InputError):
                raise error
        if not isinstance(prompts, EveryPosition):
            return cls([[tree] for tree in together], together)
        budget = prompts.recommender.budget
        apart = [
            [make_tree(prompts.prompts(position, budget)) for position in prompts.positions(user)]
            for user in prompts.users
        ]
        return cls(apart, together)

    def ways(self, users: int | None = None) -> tuple[list[Tree], list[Tree]]:
        """Return the first users' trees of single positions, and those of all positions."""
        return list(chain(*self.apart[:users])), self.together[:users]


def computed(trees: list[Tree], pack_tokens: int) -> int:
    """Return the tokens of the trees in packs, without padding."""
    return sum(pack.tokens for pack in pack_trees(trees, pack_tokens))


# ---- Time


class Timer:
    """Times optimizer steps of a model with random weights, as train.py makes them."""

    def __init__(self, settings: Settings, device: torch.device):
        shared = ("shape", "pack_tokens", "cuda_graphs", "repeats")
        self.settings = train.Settings(**{name: getattr(settings, name) for name in shared})
        self.device = device
        same_bits(device.type == "cpu")  # as in train.py
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model, _ = make_models(self.settings, device, dtype, peer=False)
        train.make_trainable(self.settings, self.model, device)

    def examples_per_second(self, trees: list[Tree]) -> float:
        """Return how many examples of one step with all these trees are trained a second."""
        ours = train.Ours(self.settings, self.model, list(map(self.wrapped, trees)), self.device)
        if self.device.type == "cuda":
            return ours.measure(self.settings.repeats)
        step = ours.make()  # once, because in train.py a thread packs meanwhile
        took = cpu_seconds(lambda: ours.update(step).read(), self.settings.repeats)
        return len(ours.examples) / took

    def wrapped(self, tree: Tree) -> Tree:
        """Return the tree with ids that the model has."""
        prefix, *branches = (
            [i % self.settings.vocabulary for i in ids] for ids in (tree.prefix, *tree.branches)
        )
        return replace(tree, prefix=prefix, branches=branches)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU time of work in seconds, after one warm-up.

    Unlike the time on a clock, it hardly depends on other programs.
    """
    times = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


# ---- The table


def line(settings: Settings, name: str, prompts: Prompts, timer: Timer | None) -> str:
    """Return a line of the table."""
    trees = Trees.of(prompts)
    sequences = [ids for tree in trees.together for ids in tree.sequences()]
    n, tokens = len(sequences), sum(map(len, sequences))
    own = sum(len(tree.branches[leaf]) for tree in trees.together for leaf in tree.leaves)
    apart, together = (computed(way, settings.pack_tokens) for way in trees.ways())
    counts = zip((tokens, apart, together, own), (9, 15, 10, 7), strict=True)
    text = f"{name:22}{n:>9}" + "".join(f"{count / n:>{width}.1f}" for count, width in counts)
    text += f"{apart / together:>7.2f}x"
    if timer:
        apart, together = map(timer.examples_per_second, trees.ways(settings.timed_users))
        text += f"{apart:>13.1f}{together:>10.1f}{together / apart:>7.2f}x"
    return text


def main() -> None:
    """Print the table."""
    settings = parse_settings(Settings, __doc__)
    domain, items, splits = load_dataset(settings.data, ("train",))
    examples, folder = chosen(settings, splits["train"]), find_model(settings.model)
    form, config = load_form(folder, chat=False), load_config(folder)
    context = min(settings.max_length, config.max_position_embeddings)
    answers, timer = trsr.answer_ids(form.encode, domain), None

    mean = sum(len(example.history) for example in examples) / len(examples)
    what = f"{settings.negatives} negatives a position, {settings.model}'s tokens an example"
    print(f"{len(examples)} users of {settings.data}, {mean:.1f} items each; {what}:")
    heading = f"{'':22}{'examples':>9}{'apart':>9}{'shared prefix':>15}"
    heading += f"{'one tree':>10}{'own':>7}{'saved':>8}"
    if settings.shape:
        timer = Timer(settings, join_processes()[2])
        heading += f"{'examples/s':>13}{'one tree':>10}{'faster':>8}"
    print(heading)
    for paradigm in paradigms(settings):
        summaries = Summaries({}, {})
        if paradigm in trsr.SUMMARIZED and settings.run:
            summaries = Summaries.of_run(settings.run, items, examples)
        elif paradigm in trsr.SUMMARIZED:
            summaries = Summaries.by_rule(settings, paradigm, items, examples)
        budget = trsr.Budget(context - 1, form.encode, Counter())
        shown = paradigm, domain, items, summaries.last, settings.history_items, budget
        recommender = trsr.Recommender(*shown)
        if summaries.last:
            print(f"summaries of {summaries.words():.0f} words on average:")
        one = Prompts.to_learn(recommender, examples, answers)
        every = EveryPosition(recommender, examples, answers, Targets(ALL), summaries.before)
        for targets, prompts in (("last", one), ("all", every)):
            print(line(settings, f"{paradigm}, {targets}", prompts, timer), flush=True)


if __name__ == "__main__":
    run_script(main)
