"""A user's prompts as a tree of token ids, made by worker processes while a GPU computes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from launch.bars import Bar
from launch.processes import host_workers
from ops.packs import Tree, make_tree
from trsr import Example, InputError, Recommender, shuffled_candidates


@dataclass(frozen=True)
class Batching:
    """How prompts are tokenized and packed: tokens of a pack, padding, and worker processes."""

    pack_tokens: int
    pad_to: int  # on GPUs all packs have one length, because kernels are compiled for each
    workers: int
    few_lengths: bool = False  # of an optimizer step's packs

    @classmethod
    def on(cls, device: torch.device, pack_tokens: int | None, on_gpus: int) -> "Batching":
        """Return the batching for a device; without pack_tokens, on_gpus or 4096 on CPUs."""
        gpu = device.type == "cuda"
        pack_tokens = pack_tokens or (on_gpus if gpu else 4096)
        return cls(pack_tokens, pack_tokens if gpu else 1, host_workers(device))


@dataclass(frozen=True)
class Ranking:
    """Users whose candidates are to be ranked, and what makes their prompts."""

    recommender: Recommender
    examples: Sequence[Example]
    candidates: Sequence[list[str]]  # in the order of the examples

    @classmethod
    def of(cls, recommender: Recommender, examples: Sequence[Example]) -> "Ranking":
        """Return the ranking of the examples' positives and negatives, in a seeded order."""
        return cls(recommender, examples, [shuffled_candidates(e) for e in examples])


def shown_prompt(recommender: Recommender, show: Callable[[str], str], example: Example) -> dict:
    """Return a user's whole prompt for the item that came next, as {"user", "prompt"}.

    show: makes the text that the model reads of a message (models/chat.py).
    """
    budget = replace(recommender.budget, trimmed=Counter())  # what is cut here counts elsewhere
    (message,), _ = replace(recommender, budget=budget).prompts(example, [example.positive])
    return {"user": example.user, "prompt": show(message)}


class PerUser(Dataset):
    """What `make` makes of each user, as (it, counts of what was trimmed)."""

    def __init__(self, recommender: Recommender, users: Sequence):
        self.recommender, self.users = recommender, users

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[object, dict]:
        # A counter of its own, because a worker process cannot add to the caller's.
        budget = replace(self.recommender.budget, trimmed=Counter())
        try:
            made = self.make(self.users[index], replace(self.recommender, budget=budget))
        except InputError as error:  # raised in a worker, it would come with a traceback
            return error, {}
        return made, dict(budget.trimmed)

    def make(self, user, recommender: Recommender) -> object:
        """Return what is made of one of the users; what the recommender trims is counted."""
        raise NotImplementedError


class Prompts(PerUser):
    """Each user's prompts for some items, as (tree, counts of what was trimmed).

    answers: the ids of Yes and No; with them, every prompt ends with its own answer.
    """

    def __init__(self, recommender: Recommender, users: list[tuple], answers=None):
        super().__init__(recommender, users)
        self.answers = answers

    @classmethod
    def to_learn(cls, recommender: Recommender, examples: list[Example], answers) -> "Prompts":
        """Return the prompts for each example's positive and negatives, with their answers."""
        users = [(example, [example.positive, *example.negatives]) for example in examples]
        return cls(recommender, users, answers)

    def make(self, user: tuple[Example, list[str]], recommender: Recommender) -> Tree:
        """Return the tree of a user's prompts."""
        example, items = user
        prompts = recommender.prompt_ids(example, items)
        if self.answers:
            yes, no = self.answers
            due = [yes if item == example.positive else no for item in items]
            prompts = [[*ids, answer] for ids, answer in zip(prompts, due, strict=True)]
        return make_tree(prompts)


def tokenize(prompts: PerUser, workers: int, show: bool) -> Iterator:
    """Return what the prompts make of each user, in order, and count what is trimmed.

    prompts: Prompts, which make trees, or alike. The work is done by worker processes.

    The processes start now rather than with the first tree, since they must not be forked from the
    thread that may ask for it.
    """
    ahead = 32 if workers else None
    loader = DataLoader(prompts, batch_size=None, num_workers=workers, prefetch_factor=ahead)
    made = iter(loader)

    def made_of_users() -> Iterator:
        for found, cut in Bar(made, "prompts", len(prompts), unit="user", disable=not show):
            if isinstance(found, InputError):
                # Raising `found` itself would tie it to this frame, and keep the workers alive.
                raise InputError(*found.args)
            prompts.recommender.budget.trimmed.update(cut)
            yield found

    return made_of_users()
