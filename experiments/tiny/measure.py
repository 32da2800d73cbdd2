"""Measure models/tiny on users it never saw: how well its summaries name their taste.

    python -m experiments.tiny.measure [--model models/tiny] [--users 300]

The users follow the rule of prepare/shop.py, in a shop that neither the demo nor the training text
uses. A user has seven tastes: two categories, two brands, a color and a material that last, and the
category of the last three purchases. A summary names the words after `likes` and `now`. A named
word that is no taste of the user counts as wrong, even if the history suggests it. `rule` is the
summary that the training text would have for the same blocks: the best that counting can do.

After that come the shares of right answers to several kinds of yes/no questions, each with the
share of the more frequent answer.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import trsr
from batches.tasks import Writer, run_tasks
from experiments.tiny.corpus import shop_of
from experiments.tiny.questions import (
    Claim,
    make_claim,
    offers_text,
    product_claim,
    profile_claim,
    shelf_claim,
    taste_claim,
)
from experiments.tiny.summaries import DOMAIN, Memory, text_of
from launch.command import option, parse_settings, run_main
from launch.numbers import positive
from llama import load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.shop import User, make_shop, make_user
from summarize import Generator

SHOP, BLOCK, NEW_TOKENS = 2001, 5, 150
PARADIGMS = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: Path = option(Path("models/tiny"), "model folder", Path)
    users: int = option(300, "users to summarize", positive)
    questions: int = option(200, "texts for each kind of question", positive)


# ---- Summaries


def make_users(n: int) -> list[User]:
    """Return n users of a shop that nothing else uses."""
    shop = make_shop(SHOP, 6000)
    return [make_user(random.Random(f"tiny measure {i}"), shop, 1) for i in range(n)]


def tastes(user: User) -> set[str]:
    """Return the user's seven tastes."""
    taste = user.taste
    return {*taste.categories, *taste.brands, taste.color, taste.material, user.need}


def named(summary: str) -> set[str]:
    """Return the words after `likes` and after `now`."""
    likes = summary.partition(", likes ")[2].replace(", now ", " ")
    return set(likes.rstrip(".").replace(",", "").split()) - {"nothing", "yet"}


def rule(user: User, paradigm: str) -> str:
    """Return the summary that the training text would have."""
    blocks = trsr.split_blocks(len(user.history), BLOCK)
    parts = [Memory.of(user.history[start:end]) for start, end in blocks]
    if paradigm == "hierarchical":
        return str(Memory.joined(parts) if len(parts) > 1 else parts[0])
    memory = parts[0]
    for part in parts[1:]:
        memory = Memory.joined([memory, part])
    return str(memory)


def summarize(folder: Path, users: list[User], paradigm: str, device: torch.device) -> list[str]:
    """Return the model's summary of each user's history, made as summarize.py makes it."""
    model = load_model(folder, device, torch.float32)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    context = model.config.max_position_embeddings
    form = Plain(tokenizer)
    budget = trsr.Budget(context - NEW_TOKENS, form.encode, Counter())
    tasks = []
    for i, user in enumerate(users):
        texts = [text_of(product) for product in user.history]
        tasks.append((i, PARADIGMS[paradigm](texts, DOMAIN, budget, BLOCK)))
    generator = Generator(model, 64, NEW_TOKENS, model.config.eos_token_id)
    roots = dict(run_tasks(tasks, Writer(generator, form)))
    return [roots[i]["summary"] for i in range(len(users))]


def shares(users: list[User], summaries: list[str]) -> tuple[float, float]:
    """Return the share of tastes that are named, and the share of named words that are wrong."""
    right = n_tastes = n_named = 0
    for user, summary in zip(users, summaries, strict=True):
        true, found = tastes(user), named(summary)
        right += len(true & found)
        n_tastes += len(true)
        n_named += len(found)
    return right / n_tastes, 1 - right / max(1, n_named)


def print_summaries(folder: Path, users: list[User], paradigm: str, device: torch.device) -> None:
    """Print one paradigm's figures and an example."""
    began = time.perf_counter()
    summaries = summarize(folder, users, paradigm, device)
    expected = [rule(user, paradigm) for user in users]
    found, wrong = shares(users, summaries)
    best, least = shares(users, expected)
    same = sum(a == b for a, b in zip(summaries, expected, strict=True)) / len(users)
    figures = {"paradigm": paradigm, "users": len(users), "named": found, "wrong": wrong}
    figures |= {"rule_named": best, "rule_wrong": least, "as_the_rule": same}
    print(json.dumps(figures | {"seconds": round(time.perf_counter() - began, 1)}))
    print(f"  for example: {summaries[0]}\n  by the rule: {expected[0]}")


# ---- Questions


@torch.inference_mode()
def answered(
    folder: Path, make: Callable[..., Claim], n: int, device: torch.device
) -> tuple[float, float]:
    """Return the share of right answers in n texts, and the share of the more frequent answer.

    make: makes the questions' claims.
    """
    model = load_model(folder, device, torch.float32)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    pair = list(trsr.answer_ids(Plain(tokenizer).encode, DOMAIN))
    right, yes = [], []
    for i in range(n):
        text = offers_text(random.Random(f"tiny question {i}"), shop_of(SHOP), False, make)
        pieces = [piece for turn in text for piece in turn]
        *starts, ids = tokenizer.encode(["".join(pieces[: j + 1]) for j in range(len(pieces))])
        ends = [len(start) - 1 for start in starts[::2]]  # the last token of each turn's prompt
        logits = model(torch.tensor([ids], device=device))[0, ends]
        said = [trsr.ANSWERS[k] for k in logits[:, pair].argmax(-1).tolist()]
        due = [answer for _, answer in text]
        yes += [answer == trsr.ANSWERS[0] for answer in due]
        right += [a == b for a, b in zip(said, due, strict=True)]
    share = sum(yes) / len(yes)
    return sum(right) / len(right), max(share, 1 - share)


# ---- The command


def main() -> None:
    """Print the figures of both paradigms, and those of each kind of question."""
    settings = parse_settings(Settings, __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    users = make_users(settings.users)
    for paradigm in PARADIGMS:
        print_summaries(settings.model, users, paradigm, device)
    for make in (product_claim, profile_claim, taste_claim, shelf_claim, make_claim):
        right, frequent = answered(settings.model, make, settings.questions, device)
        print(json.dumps({"questions": make.__name__, "right": right, "more_frequent": frequent}))


if __name__ == "__main__":
    run_main(main)
