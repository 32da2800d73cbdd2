"""Users to trees of token ids, made by worker processes while a GPU works."""

from collections import Counter
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.packs import Tree, make_tree
from trsr import Example, InputError, Recommender


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
                raise tree
            trimmed.update(cut)
            yield tree
        known.clear()
        known.update(trimmed)

    return trees()
