"""Every position of a history as a target: what each prompt may show, and a user's tree of them.

A user's sequence is the history and the target. The item at each position was once the next one,
so it is a positive given the items before it. All prompts of a user are in one tree:

    whole history   the prompt of a position begins as that of the next one
    summaries       the summary of the blocks before, and the items since; so the prompts of the
                    positions between two blocks begin alike
    recent items    a window that moves: only the instruction is shared

A summary of the blocks before has not seen what follows them (summarize.py --every-block; the chain
of recurrent summaries has it anyway).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batches.prompts import Prompts
from ops.packs import Tree, make_deep_tree
from prepare.common import draw_distinct
from state.summaries import load_before
from trsr import (
    SUMMARIZED,
    Budget,
    Domain,
    Example,
    InputError,
    Recommender,
    Summarization,
    split_blocks,
)

ALL = 2**31 - 1  # as many positions as there are


@dataclass(frozen=True)
class Targets:
    """Which positions are targets, how many negatives they have, and from what these are drawn.

    most: how many of a user's last positions. past_only: negatives are never the target or an item
    before it, but may come later in the history; otherwise they are no item of the whole history.
    negatives: the number for each target, None for as many as the dataset has for the last one.
    """

    most: int = 1
    past_only: bool = False
    negatives: int | None = None

    def limited(self, examples: list[Example]) -> list[Example]:
        """Return the examples with the first `negatives` of each; InputError if one has fewer."""
        if (n := self.negatives) is None:
            return examples
        if few := [example for example in examples if len(example.negatives) < n]:
            what = f"user {few[0].user!r} has {len(few[0].negatives)} negatives"
            raise InputError(f"train.jsonl: {what}, which is fewer than --negatives {n}")
        return [replace(example, negatives=example.negatives[:n]) for example in examples]


@dataclass(frozen=True)
class Position:
    """A target with what its prompt may show: only what came before."""

    example: Example
    summary: str
    shown: int  # the most recent items of the history


def positions(
    example: Example, catalogue: Sequence[str], targets: Targets
) -> list[tuple[int, Example]]:
    """Return (t, example) for the user's last positions: the item at t, given the t items before.

    The last one is the example itself. Others have as many negatives, drawn from the catalogue by a
    seed that the user and the position determine, so every run has the same. An item that the user
    has had before is no target, as in the datasets.
    """
    sequence, n = [*example.history, example.positive], len(example.history)
    found = []
    for t in range(max(1, n + 1 - targets.most), n):
        if sequence[t] in sequence[:t]:
            continue
        taken = set(sequence[: t + 1] if targets.past_only else sequence)
        negatives = draw(catalogue, taken, len(example.negatives), f"{example.user} {t}")
        past = replace(example, history=sequence[:t], positive=sequence[t], negatives=negatives)
        found.append((t, past))
    return [*found, (n, example)]


def draw(catalogue: Sequence[str], taken: set[str], n: int, seed: str) -> list[str]:
    """Return n different uniform items that are not taken; InputError if there are too few."""
    if len(catalogue) < n + len(taken) and len(set(catalogue) - taken) < n:
        raise InputError(f"{len(catalogue)} items are too few for {n} negatives at every position")
    return draw_distinct(seed, catalogue, range(1, len(catalogue) + 1), n, taken)


def every_block(
    paradigm: Callable[..., Summarization],
    items: list[str],
    domain: Domain,
    budget: Budget,
    block_size: int,
) -> Summarization:
    """Summarize the items before the end of each block, and then all of them.

    The root is the paradigm's, and its "before" lists [items, summary] of all blocks before the
    last. No prompt is asked twice.
    """
    known: dict[str, str] = {}
    roots = []
    for _, end in split_blocks(len(items), block_size) or [(0, 0)]:
        task, answers = paradigm(items[:end], domain, budget, block_size), None
        try:
            while True:
                asked = task.send(answers)
                if new := [prompt for prompt in dict.fromkeys(asked) if prompt not in known]:
                    known |= zip(new, (yield new), strict=True)
                answers = [known[prompt] for prompt in asked]
        except StopIteration as done:
            roots.append((end, done.value))
    before = [[end, root["summary"]] for end, root in roots[:-1]]
    return roots[-1][1] | {"before": before}


class EveryPosition(Prompts):
    """Each user's prompts of all positions, as one tree; every prompt ends with its answer.

    before: (items, summary) of the blocks before each user's last one, if there are summaries.
    catalogue: what negatives are drawn from, None for all items.
    """

    def __init__(
        self,
        recommender: Recommender,
        examples: list[Example],
        answers: tuple[int, int],
        targets: Targets,
        before: dict[str, list[tuple[int, str]]],
        catalogue: list[str] | None = None,
    ):
        super().__init__(recommender, examples, answers)
        self.targets, self.before = targets, before
        self.catalogue = catalogue or list(recommender.items)

    def make(self, user: Example, recommender: Recommender) -> Tree:
        """Return the tree of a user's prompts."""
        return make_deep_tree(self.rows(user, recommender.budget))

    def rows(self, example: Example, budget: Budget) -> list[list[int]]:
        """Return all prompts of a user as token ids, those of a position next to each other."""
        places = self.positions(example)
        return [ids for position in places for ids in self.prompts(position, budget)]

    def positions(self, example: Example) -> list[Position]:
        """Return the user's positions, each with what its prompt may show."""
        recommender, found = self.recommender, []
        for t, past in positions(example, self.catalogue, self.targets):
            summary, shown = recommender.summaries.get(example.user, ""), recommender.history_items
            if recommender.paradigm in SUMMARIZED and t < len(example.history):
                # The last summary that had seen nothing of what is to be told apart here.
                earlier = [(0, ""), *self.before[example.user]]
                items, summary = max(pair for pair in earlier if pair[0] <= t)
                shown = t - max(0, items - recommender.history_items)
            found.append(Position(past, summary, shown))
        return found

    def prompts(self, position: Position, budget: Budget) -> list[list[int]]:
        """Return the position's prompts as token ids, each with its answer."""
        example, (yes, no) = position.example, self.answers
        recommender = replace(
            self.recommender,
            budget=budget,
            summaries={example.user: position.summary},
            history_items=position.shown,
        )
        rows = recommender.prompt_ids(example, [example.positive, *example.negatives])
        return [[*ids, no if i else yes] for i, ids in enumerate(rows)]


def prompts_to_learn(
    recommender: Recommender,
    examples: list[Example],
    answers: tuple[int, int],
    targets: Targets,
    run: Path,
    catalogue: list[str] | None = None,
) -> Prompts:
    """Return what makes the examples' prompts with their answers, for each of their targets.

    run: the folder of the summaries. catalogue: what negatives of earlier positions are drawn from,
    None for all items. InputError if summaries of earlier blocks are missing.
    """
    if targets.most == 1:
        return Prompts.to_learn(recommender, examples, answers)
    summarized = recommender.paradigm in SUMMARIZED
    before = load_before(run, examples) if summarized else {}
    return EveryPosition(recommender, examples, answers, targets, before, catalogue)
