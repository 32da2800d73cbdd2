"""What experiments.base learns from: the recommendation questions and the summaries of a dataset's training users."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import trsr
from experiments.rule import Rule
from prepare.dataset import load_dataset, popularity
from prepare.domains import DOMAINS

CONTEXT, BLOCK = 2048, 5  # longest prompt in tokens, items a block
QUESTIONS = {
    "recent-only": 0.35,
    "whole-history": 0.15,
    "hierarchical": 0.25,
    "recurrent": 0.25,
}  # shares
WRITINGS = ("block", "update", "merge")
FIXED_TEXTS = 20  # times that the tokenizer's trainer reads what stands in every prompt


@dataclass(frozen=True)
class Question:
    """Whether a user takes item `position` of the user's sequence, and the negatives, after the items before it."""

    user: int
    position: int
    paradigm: str
    negatives: list[str]


@dataclass(frozen=True)
class Writing:
    """The summary of a block of the user's first n items alone, of all blocks' summaries, or of the chain up to it."""

    kind: str  # of WRITINGS
    user: int
    n: int
    block: int


@dataclass(frozen=True)
class Corpus:
    """The training users' sequences, history and target, and the texts of the items in them and of their negatives."""

    domain: trsr.Domain
    texts: dict[str, str]
    sequences: list[list[str]]
    rule: Rule

    @classmethod
    def load(cls, folder: str) -> "Corpus":
        """Return the corpus of a dataset's training split; no other split's file is opened."""
        domain, items, splits = load_dataset(folder, ("train",))
        named = popularity(splits["train"]).keys() | {
            i for example in splits["train"] for i in example.negatives
        }
        texts = {i: items[i] for i in sorted(named)}
        sequences = [[*example.history, example.positive] for example in splits["train"]]
        return cls(domain, texts, sequences, Rule.of(list(texts.values())))

    def positions(self) -> list[tuple[int, int]]:
        """Return the (user, position) of every positive. As in the dataset, none is an item of its own history."""
        return [
            (u, i)
            for u, s in enumerate(self.sequences)
            for i in range(1, len(s))
            if s[i] not in s[:i]
        ]

    def questions(self, negatives: int, seed: int) -> Iterator[Question]:
        """Yield every positive with new negatives in a new order, epoch after epoch."""
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

    def writings(self, seed: int) -> Iterator[Writing]:
        """Yield all summaries of the users' first items, of each user another number in every epoch, in mixed order."""
        for epoch in itertools.count():
            rng, found = random.Random(f"writings {seed} {epoch}"), []
            for user, sequence in enumerate(self.sequences):
                n = rng.randint(1, len(sequence))
                blocks = range(len(trsr.split_blocks(n, BLOCK)))
                found += [Writing("block", user, n, b) for b in blocks]
                found += [Writing("update", user, n, b) for b in blocks[1:]]
                found += [Writing("merge", user, n, blocks[-1])] if blocks[1:] else []
            rng.shuffle(found)
            yield from found

    def blocks(self, user: int, n: int) -> list[list[str]]:
        """Return the texts of the user's first n items, block by block."""
        texts = [self.texts[i] for i in self.sequences[user][:n]]
        return [texts[start:end] for start, end in trsr.split_blocks(n, BLOCK)]

    def merged(self, blocks: list[list[str]]) -> tuple[list[str], str]:
        """Return each block's summary, and that of all."""
        leaves = [self.rule.summary(items=block) for block in blocks]
        return leaves, self.rule.summary(summaries=leaves) if len(leaves) > 1 else leaves[0]

    def summaries(self) -> list[str]:
        """Return every user's summary, hierarchical."""
        return [
            self.merged(self.blocks(u, len(sequence)))[1]
            for u, sequence in enumerate(self.sequences)
        ]

    def chained(self, blocks: list[list[str]]) -> str:
        """Return the summary that is updated with one block after the other; of no blocks, an empty one."""
        summary = ""
        for i, block in enumerate(blocks):
            summary = self.rule.summary(items=block, summaries=[summary] if i else [])
        return summary

    def example(self, question: Question) -> tuple[trsr.Example, str]:
        """Return the question as a user of the dataset, and the summary to show."""
        sequence, i = self.sequences[question.user], question.position
        example = trsr.Example("", sequence[:i], sequence[i], question.negatives)
        if question.paradigm not in trsr.SUMMARIZED:
            return example, ""
        blocks = self.blocks(question.user, i)
        return example, self.merged(blocks)[
            1
        ] if question.paradigm == "hierarchical" else self.chained(blocks)

    def written(self, writing: Writing, budget: trsr.Budget) -> tuple[str, str]:
        """Return the writing's prompt and its answer."""
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

    def tokenizer_lines(self) -> list[str]:
        """Return what the tokenizer is trained on: texts, their users' summaries, and the prompts' fixed texts."""
        lines = [*(f"1. {text}" for text in self.texts.values()), *self.summaries()]
        domains, budget = (
            DOMAINS.values(),
            trsr.Budget(CONTEXT, lambda texts: [[] for _ in texts], Counter()),
        )
        fixed = [
            p
            for d in domains
            for k in QUESTIONS
            for p in trsr.recommendation_prompts(k, d, "x", ["x"], ["x"])
        ]
        for d in domains:
            fixed += [trsr.block_prompt(["x"], d, budget), trsr.merge_prompt(["x", "x"], d, budget)]
            fixed += [trsr.update_prompt("x", ["x"], d, budget)]
        return lines + [line for text in fixed for line in text.splitlines()] * FIXED_TEXTS
