"""Measure models/tiny's summaries of users whom it never saw: how much of their taste they name, and how much is wrong.

    python -m experiments.tiny.measure [--model models/tiny] [--users 300]

The users follow prepare.demo's rule, in a shop that neither the demo nor the training text uses. A user has seven
tastes: two categories, two brands, one color and one material that last, and the category that the last three
purchases are of. Named is what a summary puts after `likes` and `now`. Every named word that is no taste of the user
is wrong, whatever the history looks like. `rule` is what experiments.tiny.corpus would have written for the same blocks:
the tastes that a count of the purchases can tell. Then the share of yes/no questions answered right, by what they are
about, beside the share of the more frequent answer.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import trsr
from experiments.tiny.corpus import (
    DOMAIN,
    Condition,
    Memory,
    make_claim,
    offers_text,
    product_claim,
    profile_claim,
    shelf_claim,
    shop_of,
    taste_claim,
    text_of,
)
from launch.command import positive, run_main
from llama import load_model
from models.tokenizer import Tokenizer
from prepare.demo import User, make_shop, make_user
from summarize import Generator

SHOP, BLOCK = 2001, 5
PARADIGMS = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}


def make_users(n: int) -> list[User]:
    """Return n users of the measure's own shop."""
    shop = make_shop(SHOP, 6000)
    return [make_user(random.Random(f"tiny measure {i}"), shop, 1) for i in range(n)]


def tastes(user: User) -> set[str]:
    """Return the user's seven tastes (six, where the need had one's words already: it never does)."""
    return {
        *user.taste.categories,
        *user.taste.brands,
        user.taste.color,
        user.taste.material,
        user.need,
    }


def named(summary: str) -> set[str]:
    """Return the words after `likes` and after `now`."""
    words = (
        summary.partition(", likes ")[2].replace(", now ", " ").rstrip(".").replace(",", "").split()
    )
    return set(words) - {"nothing", "yet"}


def rule(user: User, paradigm: str) -> str:
    """Return the summary by the corpus's rule."""
    parts = [
        Memory.of(user.history[start:end])
        for start, end in trsr.split_blocks(len(user.history), BLOCK)
    ]
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
    budget = trsr.Budget(model.config.max_position_embeddings - 150, tokenizer.encode, Counter())

    generator = Generator(model, 64, 150, model.config.eos_token_id)

    def submit(prompts: list[tuple], first: bool) -> None:
        generator.submit([(key, tokenizer.encode([prompt])[0]) for key, prompt in prompts], first)

    def finished() -> list[tuple]:
        return [(key, tokenizer.decode(ids)) for key, ids in generator.step()]

    histories = ([text_of(product) for product in user.history] for user in users)
    tasks = [
        (i, PARADIGMS[paradigm](texts, DOMAIN, budget, BLOCK)) for i, texts in enumerate(histories)
    ]
    roots = dict(trsr.run_tasks(tasks, lambda: len(generator.waiting) < 64, submit, finished))
    return [roots[i]["summary"] for i in range(len(users))]


def shares(users: list[User], summaries: list[str]) -> tuple[float, float]:
    """Return the share of the users' tastes that their summaries name, and the share of the named that are wrong."""
    pairs = [(tastes(user), named(summary)) for user, summary in zip(users, summaries, strict=True)]
    right = sum(len(true & told) for true, told in pairs)
    return right / sum(len(true) for true, _ in pairs), 1 - right / max(
        1, sum(len(told) for _, told in pairs)
    )


@torch.inference_mode()
def answered(
    folder: Path, make: Callable[..., Condition], n: int, device: torch.device
) -> tuple[float, float]:
    """Return the share of right answers to n texts' questions by `make`, and the more frequent answer's share."""
    model = load_model(folder, device, torch.float32)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    pair = list(trsr.answer_ids(tokenizer.encode, DOMAIN))
    right, yes = [], []
    for i in range(n):
        text = offers_text(random.Random(f"tiny question {i}"), shop_of(SHOP), False, make)
        pieces = [piece for turn in text for piece in turn]
        *parts, ids = tokenizer.encode(["".join(pieces[: j + 1]) for j in range(len(pieces))])
        logits = model(torch.tensor([ids], device=device))[
            0, [len(part) - 1 for part in parts[::2]]
        ]
        said = logits[:, pair].argmax(-1).tolist()
        yes += [answer == trsr.ANSWERS[0] for _, answer in text]
        right += [trsr.ANSWERS[k] == answer for k, (_, answer) in zip(said, text, strict=True)]
    share = sum(yes) / len(yes)
    return sum(right) / len(right), max(share, 1 - share)


def main() -> None:
    """Print the two shares for both paradigms, and that of right answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--users", type=positive, default=300)
    parser.add_argument("--questions", type=positive, default=200, help="texts a kind of question")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    users = make_users(args.users)
    for paradigm in PARADIGMS:
        began = time.perf_counter()
        summaries, expected = (
            summarize(args.model, users, paradigm, device),
            [rule(user, paradigm) for user in users],
        )
        found, wrong = shares(users, summaries)
        best, least = shares(users, expected)
        same = sum(a == b for a, b in zip(summaries, expected, strict=True)) / len(users)
        figures = {"paradigm": paradigm, "users": len(users), "named": found, "wrong": wrong}
        figures |= {"rule_named": best, "rule_wrong": least, "as_the_rule": same}
        print(json.dumps(figures | {"seconds": round(time.perf_counter() - began, 1)}))
        print(f"  for example: {summaries[0]}\n  by the rule: {expected[0]}")
    for make in (product_claim, profile_claim, taste_claim, shelf_claim, make_claim):
        right, frequent = answered(args.model, make, args.questions, device)
        print(json.dumps({"questions": make.__name__, "right": right, "more_frequent": frequent}))


if __name__ == "__main__":
    run_main(main)
