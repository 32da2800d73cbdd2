"""What experiments.base learns from: questions and summaries about a dataset's training users."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import trsr
from experiments.rule import Rule
from prepare.dataset import load_dataset, popularity
from prepare.domains import DOMAINS

CONTEXT, BLOCK = 2048, 5  # tokens of the longest prompt, items per block
WRITINGS = ("block", "update", "merge")
FIXED_TEXTS = 20  # copies of the prompts' own words in the tokenizer's training text

# The paradigms of the questions, with their shares.
QUESTIONS = {"recent-only": 0.35, "whole-history": 0.15, "hierarchical": 0.25, "recurrent": 0.25}


@dataclass(frozen=True)
class Question:
    """Whether the user takes an item, and each of its negatives, given the items before it.

    The item is the one at `position` in the user's sequence.
    """

    user: int
    position: int
    paradigm: str
    negatives: list[str]


@dataclass(frozen=True)
class Writing:
    """A summary of the user's first n items.

    block: of that block alone; update: of that block and the summary before it; merge: of the
    summaries of all blocks.
    """

    kind: str  # of WRITINGS
    user: int
    n: int
    block: int


@dataclass(frozen=True)
class Corpus:
    """The training users' sequences (history and target), and the texts of all their items."""

    domain: trsr.Domain
    texts: dict[str, str]
    sequences: list[list[str]]
    rule: Rule

    @classmethod
    def load(cls, folder: str) -> "Corpus":
        """Return the corpus of a dataset's training split; no other split's file is opened."""
        domain, items, splits = load_dataset(folder, ("train",))
        named = set(popularity(splits["train"]))
        for example in splits["train"]:
            named.update(example.negatives)
        texts = {i: items[i] for i in sorted(named)}
        sequences = [[*example.history, example.positive] for example in splits["train"]]
        return cls(domain, texts, sequences, Rule.of(list(texts.values())))

    # -- Questions

    def positions(self) -> list[tuple[int, int]]:
        """Return the (user, position) of every positive.

        As in the dataset, no positive is in its own history.
        """
        found = []
        for user, sequence in enumerate(self.sequences):
            positions = range(1, len(sequence))
            found += [(user, i) for i in positions if sequence[i] not in sequence[:i]]
        return found

    def questions(self, negatives: int, seed: int) -> Iterator[Question]:
        """Yield all positives, epoch after epoch, each time reordered and with new negatives."""
        pool, positions = list(self.texts), self.positions()
        own = [set(sequence) for sequence in self.sequences]
        if len(pool) < negatives + max(map(len, own)):
            raise trsr.InputError(f"{len(pool)} items are too few for --negatives {negatives}")
        for epoch in itertools.count():
            rng = random.Random(f"questions {seed} {epoch}")
            for user, position in rng.sample(positions, len(positions)):
                (paradigm,) = rng.choices(list(QUESTIONS), list(QUESTIONS.values()))
                drawn: dict[str, None] = {}
                while len(drawn) < negatives:
                    if (item := rng.choice(pool)) not in own[user]:
                        drawn[item] = None
                yield Question(user, position, paradigm, list(drawn))

    def example(self, question: Question) -> tuple[trsr.Example, str]:
        """Return the question as a user of the dataset, and the summary to show."""
        sequence, i = self.sequences[question.user], question.position
        example = trsr.Example("", sequence[:i], sequence[i], question.negatives)
        if question.paradigm == "hierarchical":
            return example, self.merged(self.blocks(question.user, i))[1]
        if question.paradigm == "recurrent":
            return example, self.chained(self.blocks(question.user, i))
        return example, ""

    # -- Writings

    def writings(self, seed: int) -> Iterator[Writing]:
        """Yield all summaries of each user's first n items, epoch after epoch, shuffled.

        Each epoch draws a new n for each user.
        """
        for epoch in itertools.count():
            rng, found = random.Random(f"writings {seed} {epoch}"), []
            for user, sequence in enumerate(self.sequences):
                n = rng.randint(1, len(sequence))
                blocks = range(len(trsr.split_blocks(n, BLOCK)))
                found += [Writing("block", user, n, b) for b in blocks]
                found += [Writing("update", user, n, b) for b in blocks[1:]]
                if len(blocks) > 1:
                    found.append(Writing("merge", user, n, blocks[-1]))
            rng.shuffle(found)
            yield from found

    def written(self, writing: Writing, budget: trsr.Budget) -> tuple[str, str]:
        """Return the writing's message and its answer."""
        blocks = self.blocks(writing.user, writing.n)
        block = blocks[writing.block]
        if writing.kind == "block":
            return trsr.block_prompt(block, self.domain, budget), self.rule.summary(items=block)
        if writing.kind == "merge":
            leaves, summary = self.merged(blocks)
            return trsr.merge_prompt(leaves, self.domain, budget), summary
        before = self.chained(blocks[: writing.block])
        prompt = trsr.update_prompt(before, block, self.domain, budget)
        return prompt, self.rule.summary(items=block, summaries=[before])

    def blocks(self, user: int, n: int) -> list[list[str]]:
        """Return the texts of the user's first n items, block by block."""
        texts = [self.texts[i] for i in self.sequences[user][:n]]
        return [texts[start:end] for start, end in trsr.split_blocks(n, BLOCK)]

    def merged(self, blocks: list[list[str]]) -> tuple[list[str], str]:
        """Return each block's summary, and the summary of all."""
        leaves = [self.rule.summary(items=block) for block in blocks]
        return leaves, self.rule.summary(summaries=leaves) if len(leaves) > 1 else leaves[0]

    def chained(self, blocks: list[list[str]]) -> str:
        """Return the summary after an update with each block; it is empty without blocks."""
        summary = ""
        for i, block in enumerate(blocks):
            summary = self.rule.summary(items=block, summaries=[summary] if i else [])
        return summary

    # -- The tokenizer

    def summaries(self) -> list[str]:
        """Return every user's hierarchical summary."""
        pairs = enumerate(self.sequences)
        return [self.merged(self.blocks(u, len(sequence)))[1] for u, sequence in pairs]

    def tokenizer_lines(self) -> list[str]:
        """Return what the tokenizer is trained on: texts, summaries, and the prompts' own words."""
        fixed = []
        for domain in DOMAINS.values():
            for paradigm in QUESTIONS:
                fixed += trsr.recommendation_prompts(paradigm, domain, "x", ["x"], ["x"])
        budget = trsr.Budget(CONTEXT, lambda texts: [[] for _ in texts], Counter())
        for domain in DOMAINS.values():
            fixed.append(trsr.block_prompt(["x"], domain, budget))
            fixed.append(trsr.merge_prompt(["x", "x"], domain, budget))
            fixed.append(trsr.update_prompt("x", ["x"], domain, budget))
        fixed = [trsr.plain_turn(message) for message in fixed]
        lines = [*(f"1. {text}" for text in self.texts.values()), *self.summaries()]
        return lines + [line for text in fixed for line in text.splitlines()] * FIXED_TEXTS
