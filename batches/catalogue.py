"""Prompts for many candidates of a user: what is the same for all users is encoded only once.

A user's prompts agree up to the candidate, so they are a beginning of the user's own and a tail of
the item's own, such as

    ... [Next Item] Title:   |   amber kettle; Color: blue  ### Assistant:

The tails of all items are encoded once, behind a short beginning that every user's ends with. That
is exact where the tokenizer puts no token across the boundary. Each user's whole prompts for the
positive and for some other items are encoded too, and compared; where any differs, all of the
user's prompts are encoded whole. The items that are checked go around, so that over all users every
item is.

The beginning is the one that the user's own candidates in the dataset leave room for: what a prompt
shows of the user does not depend on how many items are ranked. An item for which it leaves no room
is cut at its end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

import trsr
from batches.prompts import Batching, PerUser, Ranking
from launch.bars import Bar
from ops.packs import Pack, Tree, common_prefix, rounded_up
from trsr import Example, Recommender

CHECKED = 16  # items that are checked for a user, or more if there are few users
BATCH = 1024  # items that are encoded at once
CUT = "candidates cut to the room that their user's prompts leave"


@dataclass(frozen=True)
class Tails:
    """The token ids with which the prompts for each item end, whoever the user is."""

    ids: list[np.ndarray]
    places: dict[str, int]  # of each item in ids

    @classmethod
    def of(cls, recommender: Recommender, items: Sequence[str], show: bool = False) -> "Tails":
        """Return the tails of the items, encoded behind the beginning without any user."""
        texts = [recommender.items[item] for item in items]
        messages = trsr.recommendation_prompts("none", recommender.domain, "", [], texts)
        encoded: list[list[int]] = []
        with Bar(total=len(texts), desc="items", unit="item", disable=not show) as bar:
            for first in range(0, len(texts), BATCH):
                encoded += recommender.budget.encode(messages[first : first + BATCH])
                bar.update(len(encoded) - first)
        shared = min(common_prefix(encoded), min(map(len, encoded)) - 1)
        ids = [np.array(row[shared:], dtype=np.int64) for row in encoded]
        return cls(ids, {item: place for place, item in enumerate(items)})

    def places_of(self, candidates: Sequence[str]) -> np.ndarray:
        """Return the places of some items."""
        return np.array([self.places[item] for item in candidates])

    @cached_property
    def mean_length(self) -> float:
        """Return the mean number of tokens."""
        return sum(map(len, self.ids)) / len(self.ids)


@dataclass(frozen=True)
class Beginning:
    """A user's beginning, and the tails that are this user's own."""

    prefix: list[int]
    own: dict[int, list[int]]  # by the candidate's place: what is cut, or all of them

    def tails(self, tails: Tails, candidates: Sequence[str]) -> list[np.ndarray]:
        """Return the tail of each of the user's candidates."""
        if len(self.own) == len(candidates):
            found: list = [None] * len(candidates)
        else:
            found = [tails.ids[place] for place in tails.places_of(candidates)]
        for place, ids in self.own.items():
            found[place] = np.array(ids, dtype=np.int64)
        return found


class Candidates(Sequence):
    """The candidates of each example, the positive first, made when they are asked for."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, user: int) -> list[str]:
        return [self.examples[user].positive, *self.examples[user].negatives]


@dataclass(frozen=True)
class CatalogueRanking(Ranking):
    """Users whose candidates are other ones than the dataset's own."""

    tails: Tails
    shown: Sequence[Example]  # the examples with the dataset's own negatives

    @classmethod
    def among(
        cls,
        recommender: Recommender,
        shown: Sequence[Example],
        ranked: Sequence[Example],
        show: bool = False,
    ) -> "CatalogueRanking":
        """Return the ranking of each example's positive among the negatives in `ranked`.

        show: a bar while the items are encoded.
        """
        wanted = {item for example in ranked for item in example.negatives}
        wanted.update(example.positive for example in ranked)
        items = [item for item in recommender.items if item in wanted]
        tails = Tails.of(recommender, items, show)
        return cls(recommender, ranked, Candidates(ranked), tails, shown)

    def tokens(self, user: int) -> float:
        """Return about how many tokens a user's candidates have."""
        return (1 + len(self.examples[user].negatives)) * self.tails.mean_length


class Beginnings(PerUser):
    """Some users' beginnings, as (Beginning, counts of what was trimmed).

    users: indices of the ranking's examples.
    """

    def __init__(self, ranking: CatalogueRanking, users: Sequence[int]):
        super().__init__(ranking.recommender, users)
        self.ranking = ranking
        self.tails, self.names = ranking.tails, list(ranking.tails.places)
        self.checked = max(CHECKED, -(-len(self.names) // len(ranking.examples)))

    def make(self, user: int, recommender: Recommender) -> Beginning:
        """Return the user's beginning."""
        example, candidates = self.ranking.shown[user], self.ranking.candidates[user]
        budget, items = recommender.budget, recommender.items
        messages, _ = recommender.prompts(example, [example.positive, *example.negatives])
        # An item's text is on one line, so the last line is the candidate's.
        start = messages[0][: messages[0].rindex("\n") + 1]

        # What is checked: the positive, and the next few of all items.
        n, first = len(self.names), user * self.checked
        sample = [example.positive, *(self.names[(first + i) % n] for i in range(self.checked))]
        whole = budget.encode([start + items[item] for item in sample])
        tails = [self.tails.ids[place].tolist() for place in self.tails.places_of(sample)]
        prefix = whole[0][: len(whole[0]) - len(tails[0])]
        if any(ids != prefix + tail for ids, tail in zip(whole, tails, strict=True)):
            return self._whole(recommender, start, candidates)

        room = budget.tokens - len(prefix)
        places = self.tails.places_of(candidates)
        long = [c for c, place in enumerate(places) if len(self.tails.ids[place]) > room]
        cut = fitting(budget, start, [items[candidates[c]] for c in long])
        own = {c: ids[len(prefix) :] for c, ids in zip(long, cut, strict=True)}
        # What is cut must still begin alike, such as with the first word of all items.
        if any(ids[: len(prefix)] != prefix or len(ids) <= len(prefix) for ids in cut):
            return self._whole(recommender, start, candidates)
        budget.trimmed.update({CUT: len(long)} if long else {})
        return Beginning(prefix, own)

    def _whole(self, recommender: Recommender, start: str, candidates: Sequence[str]) -> Beginning:
        """Return the beginning of prompts that are encoded whole, one by one."""
        budget, texts = recommender.budget, [recommender.items[item] for item in candidates]
        encoded = budget.encode([start + text for text in texts])
        long = [c for c, ids in enumerate(encoded) if len(ids) > budget.tokens]
        for c, ids in zip(long, fitting(budget, start, [texts[c] for c in long]), strict=True):
            encoded[c] = ids
        budget.trimmed.update({CUT: len(long)} if long else {})
        shared = min(common_prefix(encoded), min(map(len, encoded)) - 1)
        return Beginning(encoded[0][:shared], {c: ids[shared:] for c, ids in enumerate(encoded)})


def fitting(budget: trsr.Budget, start: str, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of the longest prompts within the budget for texts that are cut at the end."""

    def encode(text: str, end: int) -> list[list[int]]:
        return budget.encode([start + trsr.cut([text], end)[0]])

    found = []
    for text in texts:
        end = trsr.greatest(len(text), lambda n, text=text: budget.fits(encode(text, n)))
        found += encode(text, end)
    return found


# ---- Packs


def distinct(tails: list[np.ndarray]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Return each tail once, in order, and the places of each."""
    places: dict[bytes, list[int]] = {}
    for place, ids in enumerate(tails):
        places.setdefault(ids.tobytes(), []).append(place)
    groups = list(places.values())
    return [tails[group[0]] for group in groups], groups


def spread(leaves: dict, groups: dict[int, list[list[int]]]) -> dict[tuple[int, int], int]:
    """Return the row of each candidate: leaves has that of each group of them, by user."""
    return {
        (user, place): row for (user, group), row in leaves.items() for place in groups[user][group]
    }


def tree_of(beginning: Beginning, tails: list[np.ndarray]) -> Tree:
    """Return a user's prompts as a tree."""
    return Tree(beginning.prefix, [ids.tolist() for ids in tails])


def split_packs(
    user: int, prefix: list[int], tails: list[np.ndarray], batching: Batching, longest: int
) -> Iterator[Pack]:
    """Yield packs of a user's tails, each up to the batching's tokens, behind the prefix.

    longest: of a prefix, in tokens. On GPUs, every pack begins with so many rows: kernels are
    compiled for each length.
    """
    rows = rounded_up(longest) if batching.pad_to > 1 else len(prefix)
    lengths = np.array([len(ids) for ids in tails])
    ends = lengths.cumsum()
    first = 0
    while first < len(tails):
        done = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, done + batching.pack_tokens, "right")))
        places = range(first, end)
        yield branch_pack(user, prefix, tails[first:end], places, (rows, batching.pad_to))
        first = end


def branch_pack(
    user: int, prefix: list[int], tails: list[np.ndarray], places: range, pad: tuple[int, int]
) -> Pack:
    """Return the pack of some tails of a user, which are the candidates at these places.

    pad: the rows of the prefix with padding, and the multiple to which the rest is padded. Padding
    is seen by itself alone.
    """
    rows, multiple = pad
    lengths = np.array([len(ids) for ids in tails])
    after = lengths.cumsum()  # within the branches, the row after each
    starts, n = after - lengths, int(after[-1])
    length = rows + -(-n // multiple) * multiple

    ids, positions = np.zeros(length, np.int64), np.zeros(length, np.int64)
    ends = np.arange(1, length + 1, dtype=np.int32)
    ids[: len(prefix)] = prefix
    positions[: len(prefix)] = range(len(prefix))
    ends[: len(prefix)] = length
    ids[rows : rows + n] = np.concatenate(tails)
    positions[rows : rows + n] = len(prefix) + np.arange(n) - starts.repeat(lengths)
    ends[rows : rows + n] = rows + after.repeat(lengths)

    none = torch.zeros(0, dtype=torch.long)  # nothing is learned here
    last = (rows + after - 1).tolist()
    return Pack(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        ends=torch.from_numpy(ends),
        rows=none,
        next_ids=none,
        weights=none.float(),
        leaves={(user, place): row for place, row in zip(places, last, strict=True)},
        tokens=len(prefix) + n,
        shared_prefix=rows,
    )
