"""A synthetic shop as a dataset, at any size: text-rich users for the demo and the tests.

    python -m prepare.demo --out data/demo                 # 1000 train, 100 val, 200 test users
    python -m prepare.demo --out data/large --users 12000 --items 20000 --seed 1

prepare/shop.py has the rule by which users choose. Its point: the recent items reveal the target's
category, the earlier items reveal which product of it, and only both together rank the target
first. The oracles here measure that, and meta.json records their Recall@3.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.bars import Bar
from launch.command import option, parse_settings, run_main, tell_next
from launch.numbers import positive, seed_number
from prepare.common import split_sizes
from prepare.dataset import save_dataset
from prepare.domains import DOMAINS, named
from prepare.shop import RECENT, Product, Shop, Taste, make_shop, make_user
from trsr import InputError, rank_of_positive

USERS = {"train": 1000, "val": 100, "test": 200}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    out: Path = option(Path("data/demo"), "folder for the dataset", Path)
    items: int = option(6000, "products in the shop; about 1500 are the fewest that work", positive)
    seed: int = option(0, "another seed has other items and other users", seed_number)
    users: int | None = option(
        None, "users in all, at least 3, split 10 : 1 : 1 (unset: 1300)", positive, "users"
    )
    train_users: int | None = option(
        None, "training users (unset: --users' share, else 1000)", positive
    )
    val_users: int | None = option(
        None, "validation users (unset: --users' share, else 100)", positive
    )
    test_users: int | None = option(None, "test users (unset: --users' share, else 200)", positive)


def sizes_of(settings: Settings) -> dict[str, int]:
    """Return the number of users in each split."""
    sizes = USERS
    if settings.users is not None:
        if settings.users < 3:
            what = "at least 3 are needed, one for each split"
            raise InputError(f"--users {settings.users}: {what}")
        sizes = split_sizes(settings.users)
    return {split: getattr(settings, f"{split}_users") or n for split, n in sizes.items()}


def make_split(shop: Shop, seed: int, split: str, n_users: int) -> Iterator[dict]:
    """Yield the split's examples as they are written.

    A user depends only on the shop, the seed, the split and the user's number.
    """
    for number in range(1, n_users + 1):
        name = f"S{seed}-{split}-{number:05d}"
        rng = random.Random(f"demo user {name}")
        user = make_user(rng, shop, n_negatives=1 if split == "train" else 20)
        history = [product.id for product in user.history]
        negatives = [product.id for product in user.negatives]
        yield {"user": name, "history": history, "positive": user.target.id, "negatives": negatives}


# ---- Oracles: what each part of the history reveals to those who know the rule


def inferred_taste(products: Sequence[Product]) -> Taste:
    """Return the taste that the products suggest: their most frequent facts."""

    def top(fact: str, n: int) -> list[str]:
        counts = Counter(getattr(product, fact) for product in products)
        return [word for word, _ in counts.most_common(n)]

    categories, brands = tuple(top("category", 2)), tuple(top("brand", 2))
    return Taste(categories, brands, top("color", 1)[0], top("material", 1)[0])


def oracle_scores(shop: Shop, example: dict, counts: Counter) -> Iterator[dict[str, int]]:
    """Yield each candidate's scores by the oracles and by popularity, the positive's first."""
    history = [shop.products[i] for i in example["history"]]
    taste, need = inferred_taste(history[:-RECENT]), history[-1].category
    for product in (shop.products[i] for i in [example["positive"], *example["negatives"]]):
        needed, fit = int(product.category == need), taste.matches(product)
        # Even without the need, it is known that the target's category is no favorite.
        new = int(product.category not in taste.categories)
        yield {
            "full history": 4 * needed + fit,
            "recent items only": needed,
            "lasting taste only": 4 * new + fit,
            "popularity": counts[product.id],
        }


def oracle_table(shop: Shop, train: Sequence[dict], test: Sequence[dict]) -> dict[str, float]:
    """Return the test users' Recall@3 of the oracles, of popularity in train, and by chance."""
    counts = Counter(i for example in train for i in [*example["history"], example["positive"]])
    hits: Counter = Counter()
    for example in test:
        rng = random.Random(f"demo ties {example['user']}")
        rows = list(oracle_scores(shop, example, counts))
        for name in rows[0]:
            # Scores are whole numbers, so a random fraction only breaks ties.
            scores = [row[name] + rng.random() for row in rows]
            hits[name] += rank_of_positive(scores, 0) <= 3
    return {name: n / len(test) for name, n in hits.items()} | {"random order": 3 / len(rows)}


# ---- The command


def main() -> None:
    """Generate the shop and its users, write the dataset, and print what the oracles score."""
    settings = parse_settings(Settings, __doc__)
    out, seed, sizes = settings.out, settings.seed, sizes_of(settings)
    users = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    what = f"A synthetic shop of {settings.items:,} items and {users} users"
    print(f"{what} to {out} (products, seed {seed})")

    shop = make_shop(seed, settings.items)
    splits = {}
    for split, n in sizes.items():
        made = Bar(make_split(shop, seed, split, n), split, n, disable=None, delay=1)
        splits[split] = list(made)
    oracles = oracle_table(shop, splits["train"], splits["test"])

    kept = {"items": settings.items, "users": sizes}
    meta = {
        "made_by": "prepare.demo",
        **named("products", DOMAINS["products"]),
        "seed": seed,
        "settings": kept,
        "sources": [],
        "dropped": {},
    }
    meta |= {"oracles": {"split": "test", "metric": "Recall@3", **oracles}}
    products = shop.products.values()
    items = ({"id": product.id, "attributes": product.attributes} for product in products)
    meta = save_dataset(out, splits, items, meta)

    scores = (f"{name:<20} {value:.3f}" for name, value in oracles.items())
    what = "What the shop's rules reach without any model, by what is known (Recall@3, test split):"
    print(what, *scores, sep="\n  ")
    size = f"{meta['items']:,} items; mean history {meta['mean_history']}"
    print(f"{users} users; {size}; written to {out}")
    tell_next(f"python summarize.py --data {out}")


if __name__ == "__main__":
    run_main(main)
