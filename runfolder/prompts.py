"""Users to trees of token ids, made by worker processes while a GPU works, and to packs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.packs import Pack, Tree, make_tree, pack_trees, steady_length
from trsr import Example, InputError, Recommender

USERS_PACKED = 64  # whose prompts are packed together in scoring


class Prompts(Dataset):
    """Each user's prompts for some items as a tree, and what was trimmed; with answers, each ends with its own."""

    def __init__(self, recommender: Recommender, users: list[tuple[Example, list[str]]], answers=None):
        self.recommender, self.users, self.answers = recommender, users, answers

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[Tree | InputError, dict]:
        example, items = self.users[index]
        self.recommender.budget.trimmed.clear()
        try:
            prompts = self.recommender.prompt_ids(example, items)
        except InputError as error:  # raised in a worker it would come with a traceback
            return error, {}
        if self.answers:
            yes, no = self.answers
            prompts = [[*ids, yes if i == example.positive else no] for ids, i in zip(prompts, items, strict=True)]
        return make_tree(prompts), dict(self.recommender.budget.trimmed)


def tokenized(prompts: Prompts, args, show: bool) -> Iterator[Tree]:
    """Return the trees in order, made by args.workers processes; then the budget knows what all of them trimmed.

    The processes start now, not with the first tree, since they must not descend from the thread that may ask for it.
    """
    options = {"num_workers": args.workers} | ({"prefetch_factor": 32} if args.workers else {})
    made = iter(DataLoader(prompts, batch_size=None, **options))

    def trees() -> Iterator[Tree]:
        known = prompts.recommender.budget.trimmed
        trimmed = Counter(known)
        for tree, cut in tqdm(made, "prompts", len(prompts), unit="user", disable=not show):
            if isinstance(tree, InputError):
                raise InputError(*tree.args)  # `tree` itself would be a cycle with this frame, and its workers go on
            trimmed.update(cut)
            yield tree
        known.clear()
        known.update(trimmed)

    return trees()


def user_packs(recommender, examples, candidates, users: Sequence[int], args, show: bool) -> Iterator[Pack]:
    """Return packs with all prompts of these users (indices of examples), while workers tokenize the next ones."""
    trees = tokenized(Prompts(recommender, [(examples[u], candidates[u]) for u in users]), args, show)
    return stream_packs(zip(users, trees, strict=True), len(users), args)


def stream_packs(trees: Iterator[tuple[int, Tree]], n: int, args) -> Iterator[Pack]:
    """Yield packs of n (number, tree) pairs as they come; a pack's leaves are (number, branch)."""
    held, length = [], None
    for start, end in pairwise([0, *range(USERS_PACKED // 2, n, USERS_PACKED), n]) if n else ():
        held += islice(trees, end - start)
        ready = [tree for _, tree in held]
        length = length or (args.pack_tokens if args.pad_to == 1 else steady_length(ready, args.pack_tokens))
        packs = pack_trees(ready, length, min(length, args.pad_to))
        # The last two packs are the emptiest; their users wait for others to fill them.
        waiting = [pack for pack in packs[-2:] if end < n and not pack.known]
        for pack in packs[: len(packs) - len(waiting)]:
            yield replace(pack, leaves={(held[t][0], b): row for (t, b), row in pack.leaves.items()})
        held = [held[t] for t in dict.fromkeys(t for pack in waiting for t, _ in pack.leaves)]
    next(trees, None)  # its last words
