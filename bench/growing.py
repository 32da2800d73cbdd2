"""Count the prompts that a history's three new items cost: asked before, and asked after.

    python -m bench.growing                                  # 1,000 users of the synthetic shop
    python -m bench.growing --users 50 --new 1 --paradigms recurrent

Each user's last items are left out at first, and what is left is summarized; then all are, with the
answers that are known. The prompts are those that summarize.py would ask: its own summarizer with
models/tiny answers them, in a temporary run folder.
"""

import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import trsr
from batches.tasks import Writer, run_tasks
from launch.command import option, parse_settings
from launch.embedded import MODEL
from launch.numbers import natural, positive, seed_number
from launch.processes import run_script
from prepare.domains import DOMAINS
from prepare.shop import make_shop, make_user
from state.answers import Answers, collect_answers
from summarize import Settings as Summarizing
from summarize import Summarizer
from trsr import InputError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """The flags."""

    users: int = option(1000, "users of the shop", positive)
    new: int = option(3, "items that are new in each history", natural)
    paradigms: tuple[str, ...] = option(
        ("hierarchical", "recurrent"), "which to count", choices=tuple(trsr.SUMMARIZED), nargs="+"
    )
    batch_size: int = option(64, "prompts decoded together", positive)
    seed: int = option(0, "of the shop and its users", seed_number)


def histories(settings: Settings) -> dict[str, list[str]]:
    """Return the item texts of each user of a shop."""
    shop = make_shop(settings.seed, 6000)
    found = {}
    for n in range(settings.users):
        user = make_user(random.Random(f"growing {settings.seed} {n}"), shop, n_negatives=1)
        attributes = [product.attributes for product in user.history]
        found[f"u{n}"] = [trsr.item_text(a, DOMAINS["products"]) for a in attributes]
    if min(map(len, found.values())) <= settings.new:
        raise InputError(f"--new {settings.new}: a user has no more items than that")
    return found


def count(run: Path, summarizer: Summarizer, generator, texts: dict[str, list[str]]) -> Counter:
    """Summarize, and return how many prompts were asked and how many were known."""
    collect_answers(run)
    writer = Writer(generator, summarizer.form, answers=Answers(run, summarizer.recorded))
    tasks = ((user, summarizer.task(items, Counter())) for user, items in texts.items())
    for _ in run_tasks(tasks, writer):
        pass
    return writer.counts


def main() -> None:
    """Print a line for each paradigm."""
    settings = parse_settings(Settings, __doc__)
    whole = histories(settings)
    before = {user: items[: len(items) - settings.new] for user, items in whole.items()}
    mean = sum(map(len, whole.values())) / len(whole)
    what = f"{len(whole)} users, {mean:.1f} items each, of which {settings.new} are new"
    print(f"{what}; prompts asked of {MODEL}")
    print("paradigm         before     after   without the answers   seconds")
    for paradigm in settings.paradigms:
        flags = Summarizing(
            data="", model=MODEL, paradigm=paradigm, dtype="fp32", batch_size=settings.batch_size
        )
        summarizer = Summarizer.of(flags, DOMAINS["products"])
        generator = summarizer.generator(whole.values(), CPU)
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            first = count(Path(folder), summarizer, generator, before)
            middle = time.monotonic()
            then = count(Path(folder), summarizer, generator, whole)
            times = f"{middle - began:.0f} + {time.monotonic() - middle:.0f}"
        row = f"{first['asked']:>9} {then['asked']:>9} {then.total():>21}"
        print(f"{paradigm:<13} {row}   {times:>7}", flush=True)


if __name__ == "__main__":
    run_script(main)
