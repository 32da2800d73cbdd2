"""Packs of users' prompts, yielded while later users are still being tokenized."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from batches.prompts import Batching, Prompts, Ranking, tokenize
from launch.processes import ranks, share_out
from ops.packs import Pack, Tree, pack_trees, stream_length

USERS_PACKED = 64  # users whose prompts are packed together


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

        # The last two packs are the emptiest: their users wait for others to fill them.
        waiting = [] if count == n else [p for p in packs[-2:] if not p.shared_prefix]
        for pack in packs[: len(packs) - len(waiting)]:
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
    # Candidates dominate the cost of a user, since the prefix is computed once.
    texts = ranking.recommender.items
    sizes = [sum(len(texts[i]) for i in items) for items in ranking.candidates]
    return user_packs(ranking, sorted(share_out(sizes, world)[rank]), batching, show)
