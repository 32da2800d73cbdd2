"""Which users make an optimizer step, and their packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batches.prompts import Batching
from launch.processes import ranks, share_out
from ops.packs import Pack, Tree, pack_length, pack_trees
from trsr import Example, InputError


@dataclass(frozen=True)
class Step:
    """One optimizer step: all its users, and this process's packs of them."""

    users: list[int]
    packs: list[Pack]
    tokens: int  # of the whole step, on all processes
    targets: int  # likewise; 0 if this process has no share and its packs are not to count


def check_batch_size(batch_size: int, train: list[Example], targets: int) -> None:
    """Raise InputError unless all users have equally many examples, and a step whole users.

    With more targets than the last item, users may differ, and a step takes what it has room for.
    """
    if targets != 1:
        return
    n = 1 + len(train[0].negatives)
    if odd := [example.user for example in train if 1 + len(example.negatives) != n]:
        what = f"users {train[0].user!r} and {odd[0]!r} differ in their number of negatives"
        raise InputError(f"train.jsonl: {what}; give all users equally many")
    if batch_size % n:
        what = f"not a multiple of the {n} examples of a user; choose {max(1, batch_size // n) * n}"
        raise InputError(f"--batch-size {batch_size}: {what}")


def target_count(tree: Tree, loss: str) -> int:
    """Return how many next-token targets the tree's examples have, counted separately."""
    sequences = tree.sequences()
    return len(sequences) if loss == "answer" else sum(map(len, sequences)) - len(sequences)


def step_batches(sizes: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the users of each step of an epoch, in an order that seed and epoch determine.

    sizes: each user's examples. A step has whole users, as many as batch_size has room for, but at
    least one.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)
    batches, room = [], 0
    for user in torch.randperm(len(sizes), generator=generator).tolist():
        if sizes[user] > room or not batches:
            batches.append([])
            room = batch_size
        batches[-1].append(user)
        room -= sizes[user]
    return batches


def make_step(trees: list[Tree], users: list[int], loss: str, batching: Batching) -> Step:
    """Return the step of these users, shared out evenly over the processes."""
    rank, world = ranks()
    together = [trees[u] for u in users]
    mine = [together[i] for i in share_out([tree.size for tree in together], world)[rank]]
    held = mine or together[:1]  # FSDP needs a pack from every process
    length, pad_to = batching.pack_tokens, batching.pad_to
    if pad_to > 1:
        length = pack_length(held, length, batching.few_lengths)
    packs = pack_trees(held, length, min(length, pad_to), last_only=loss == "answer")
    targets = sum(target_count(tree, loss) for tree in together) if mine else 0
    return Step(users, packs, sum(tree.size for tree in together), targets)
