"""From logits to ranked candidates, user by user as they come, so that few logits are held."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

import trsr
from trsr import InputError

BEST = 100  # candidates that are kept of a user with other ones than the dataset's own


@dataclass(frozen=True)
class Ranked:
    """What came out for a user."""

    rank: int  # of the positive, from 1; ties count against it
    candidates: list[str]  # all of them, or the best
    scores: list[float]  # their probabilities of Yes
    positive_score: float
    number: int  # of all candidates
    prompt_tokens: int  # of the longest prompt
    best_first: bool  # and the others may be left out
    mass: float  # the sum over all candidates of the probability that Yes and No have together


class Tally:
    """Ranks each user once all of the user's candidates have their logits.

    candidates: of each example, the positive among them. best: keep only so many, the best first;
    None keeps all, in their order.
    """

    def __init__(self, examples: Sequence, candidates: Sequence[list[str]], best: int | None):
        self.examples, self.candidates, self.best = examples, candidates, best
        self.ranked: dict[int, Ranked] = {}
        self.open: dict[int, tuple[list[str], np.ndarray]] = {}
        self.left: Counter = Counter()  # candidates without logits
        self.longest: Counter = Counter()

    def add(
        self, leaves: Iterable[tuple[int, int]], logits: Sequence[list[float]], lengths: list[int]
    ) -> None:
        """Add some candidates' logits.

        leaves: (user, candidate). logits: Yes, No, and the log of the sum of exp(logit) over the
        vocabulary. lengths: the prompts' tokens.
        """
        rows = zip(leaves, logits, lengths, strict=True)
        for user, group in groupby(rows, key=lambda row: row[0][0]):
            found = list(group)
            if user not in self.open:
                names = self.candidates[user]
                self.open[user] = names, np.full((len(names), 3), np.nan)
                self.left[user] = len(names)
            self.open[user][1][[leaf[1] for leaf, _, _ in found]] = [row for _, row, _ in found]
            self.longest[user] = max(self.longest[user], *(length for *_, length in found))
            self.left[user] -= len(found)
            if self.left[user] == 0:
                self.ranked[user] = self._rank(user, *self.open.pop(user))

    def _rank(self, user: int, names: list[str], logits: np.ndarray) -> Ranked:
        """Return what came out for a user; InputError for a score that is not finite."""
        example = self.examples[user]
        yes, no = logits[:, 0], logits[:, 1]
        positive = names.index(example.positive)
        # The difference of the logits orders as the probability does, but never saturates at 1.
        try:
            rank = trsr.rank_of_positive(yes - no, positive)
        except InputError as error:
            raise InputError(f"user {example.user!r}: {error}") from None

        scores = trsr.yes_probability(yes, no)
        order = np.arange(len(names))
        if self.best is not None:
            # The positive comes last of those with its score, as in its rank.
            order = np.lexsort((order == positive, no - yes))[: self.best]
        return Ranked(
            rank=rank,
            candidates=[names[place] for place in order],
            scores=scores[order].tolist(),
            positive_score=float(scores[positive]),
            number=len(names),
            prompt_tokens=self.longest[user],
            best_first=self.best is not None,
            mass=float(np.exp(logits[:, :2] - logits[:, 2:]).sum()),
        )


def answer_mass(ranked: Sequence[Ranked]) -> float:
    """Return the mean probability, 0 to 1, that Yes and No have together."""
    return sum(user.mass for user in ranked) / sum(user.number for user in ranked)
