"""Packs of users' prompts, yielded while later users are still being tokenized."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from batches.catalogue import (
    Beginning,
    Beginnings,
    CatalogueRanking,
    distinct,
    split_packs,
    spread,
    tree_of,
)
from batches.prompts import Batching, Prompts, Ranking, tokenize
from launch.processes import ranks, share_out
from ops.packs import Pack, Tree, pack_trees, stream_length

USERS_PACKED = 64  # users whose prompts are packed together
FULL = 0.95  # of a pack's length: it waits for no more users


def stream_packs(trees: Iterable[tuple[int, Tree]], n: int, batching: Batching) -> Iterator[Pack]:
    """Yield packs of n (number, tree) pairs as they come; a pack's leaves are (number, branch)."""
    held: list[tuple[int, Tree]] = []
    length = None
    for count, pair in enumerate(trees, 1):
        held.append(pair)
        # The first packs come after half as many users, so that the GPU can start early.
        if count < n and (count - USERS_PACKED // 2) % USERS_PACKED:
            continue

        ready = [tree for _, tree in held]
        if length is None:
            padded = batching.pad_to > 1
            length = stream_length(ready, batching.pack_tokens) if padded else batching.pack_tokens
        packs = pack_trees(ready, length, min(length, batching.pad_to))

        # The last two packs are the emptiest: unless they are full, their users wait for others.
        last, waiting = len(packs) - 2 if count < n else len(packs), []
        for i, pack in enumerate(packs):
            if i >= last and not pack.shared_prefix and pack.tokens < FULL * length:
                waiting.append(pack)
                continue
            leaves = {(held[t][0], branch): row for (t, branch), row in pack.leaves.items()}
            yield replace(pack, leaves=leaves)
        left = dict.fromkeys(t for pack in waiting for t, _ in pack.leaves)
        held = [held[t] for t in left]


def user_packs(
    ranking: Ranking, users: Sequence[int], batching: Batching, show: bool
) -> Iterator[Pack]:
    """Return packs with all prompts of these users, which are indices of the ranking's.

    Worker processes start to tokenize at once.
    """
    chosen = [(ranking.examples[u], ranking.candidates[u]) for u in users]
    trees = tokenize(Prompts(ranking.recommender, chosen), batching.workers, show)
    return stream_packs(zip(users, trees, strict=True), len(users), batching)


def own_packs(ranking: Ranking, batching: Batching, show: bool) -> Iterator[Pack]:
    """Return the packs of this process's users, shared out by the length of their candidates."""
    rank, world = ranks()
    if isinstance(ranking, CatalogueRanking):
        sizes = [round(ranking.tokens(user)) for user in range(len(ranking.examples))]
        mine = sorted(share_out(sizes, world)[rank])
        return catalogue_packs(ranking, mine, batching, show)
    # Candidates dominate the cost of a user, since the prefix is computed once.
    texts = ranking.recommender.items
    sizes = [sum(len(texts[i]) for i in items) for items in ranking.candidates]
    return user_packs(ranking, sorted(share_out(sizes, world)[rank]), batching, show)


def catalogue_packs(
    ranking: CatalogueRanking, users: Sequence[int], batching: Batching, show: bool
) -> Iterator[Pack]:
    """Return packs with all prompts of these users, who have many candidates each.

    Users who fill packs have packs of their own, in which the prefix is computed once.
    """
    begun = tokenize(Beginnings(ranking, users), batching.workers, show)
    groups: dict[int, list[list[int]]] = {}  # the places of equal tails, by user
    small = max(map(ranking.tokens, users), default=0) < batching.pack_tokens / 2

    def tails_of() -> Iterator[tuple[int, Beginning, list]]:
        for user, beginning in zip(users, begun, strict=True):
            if not small:  # all packs of the user before are made
                groups.clear()
            tails = beginning.tails(ranking.tails, ranking.candidates[user])
            tails, groups[user] = distinct(tails)
            yield user, beginning, tails

    if small:
        trees = ((user, tree_of(beginning, tails)) for user, beginning, tails in tails_of())
        packs = stream_packs(trees, len(users), batching)
    else:
        longest = ranking.recommender.budget.tokens
        packs = (
            pack
            for user, beginning, tails in tails_of()
            for pack in split_packs(user, beginning.prefix, tails, batching, longest)
        )
    # Items with the same text have one row, so that they tie.
    return (replace(pack, leaves=spread(pack.leaves, groups)) for pack in packs)
