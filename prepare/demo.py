"""A synthetic shop by rule, from a seed alone: text-rich users for the demo and the tests, at any size.

    python -m prepare.demo --out data/demo                      # 1000 train, 100 val and 200 test users
    python -m prepare.demo --out data/large --users 12000 --items 20000 --seed 1

How users choose. Everyone has a taste that lasts: two favorite categories, two favorite brands, one color, one
material. A product fits the taste if it has at least two of three: a favorite brand, the color, the material.
Most purchases, nine in ten, fit the taste and are of a favorite category; the others are anything. Then something
new comes up: a need in a category that is no favorite. The last three purchases are of this category, bought in a
hurry, whatever their brand, color and material. The target is of the needed category too, but chosen with care: it
fits the taste. So the recent items tell the target's category alone, and the items before them tell the rest.

Negatives are the targets of imagined users, so neither their texts nor their popularity give them away: of 20, seven
are of a user with the same need and another taste, seven of one with the same taste and another need, and six of one
who shares neither. A taste counts as another if the product has nothing of the user's.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from launch.command import positive, run_main
from prepare.common import split_sizes
from prepare.dataset import save_dataset
from trsr import InputError, rank_of_positive

USERS = {"train": 1000, "val": 100, "test": 200}
SHORTEST, LONGEST, RECENT = (
    10,
    25,
    3,
)  # purchases before the target, and how many of them the need takes
LOYALTY = 0.9  # share of purchases before the need that fit the taste
KINDS = ("other taste",) * 7 + ("other need",) * 7 + ("neither",) * 6
ATTEMPTS = 100  # draws before a shop counts as too small

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary: texts spell categories, brands, colors and materials just so, and use these words for nothing else


CATEGORY_WORDS = {  # part made of the material, usual price, sizes from and to, what it is for, what it has
    "backpack": ("trim", 60, 14, 34, "litres", ("the daily commute", "a weekend away", "long days at college"),
        ("a laptop sleeve", "two side pockets", "a chest belt", "a rain cover", "padded shoulders")),
    "basket": ("lid", 30, 20, 60, "cm", ("laundry", "toys on the floor", "blankets by the sofa"),
        ("two carry loops", "a washable lining", "a flat bottom", "a name tag", "soft corners")),
    "clock": ("face", 35, 16, 44, "cm", ("the kitchen wall", "a quiet bedroom", "the mantelpiece"),
        ("a silent movement", "large numerals", "glowing hands", "a daily alarm", "one spare battery")),
    "journal": ("cover", 18, 14, 28, "cm", ("morning notes", "travel diaries", "lists and plans"),
        ("dotted pages", "a ribbon marker", "numbered pages", "a pocket at the back", "thick paper")),
    "lamp": ("shade", 45, 24, 68, "cm", ("the reading corner", "a bedside table", "late work at the desk"),
        ("a dimmer", "a long cord", "a warm bulb", "a touch switch", "a tilting neck")),
    "mirror": ("frame", 70, 30, 90, "cm", ("the hallway", "a small bathroom", "the dressing room"),
        ("two wall hooks", "a beveled edge", "a fold-out stand", "a coating against fog", "rounded corners")),
    "planter": ("sleeve", 25, 12, 40, "cm", ("herbs on the sill", "a tall fern", "the balcony"),
        ("a drip dish", "a drain hole", "a water gauge", "felt feet", "an inner pot")),
    "speaker": ("grille", 90, 10, 36, "cm", ("music in the kitchen", "parties on the terrace", "films at home"),
        ("a deep bass", "twelve hours of battery", "a splash guard", "a microphone", "stereo pairing")),
    "stool": ("seat", 50, 42, 76, "cm", ("the breakfast bar", "one more guest at dinner", "the workshop"),
        ("a foot rest", "screw-in legs", "a swivel", "rubber caps", "a carry slot")),
    "suitcase": ("handle", 110, 48, 78, "cm", ("cabin flights", "two weeks at the sea", "family visits"),
        ("four quiet wheels", "a number lock", "packing cubes", "a hard shell", "a zipped divider")),
    "tray": ("base", 22, 25, 55, "cm", ("breakfast in bed", "keys and letters", "tea in the garden"),
        ("a raised rim", "folding legs", "a surface that does not slip", "cut-out grips", "stacking feet")),
    "watch": ("strap", 120, 30, 46, "mm", ("the office day", "an evening out", "long hikes"),
        ("a date window", "a stop function", "scratch-proof glass", "a solar cell", "a second time zone")),
}  # fmt: skip
BRANDS = (
    "Alderon", "Brisby", "Calvero", "Dunmore", "Elvaton", "Fennick", "Galdera", "Harrowby",
    "Istrel", "Jorvane", "Kestwick", "Lumora", "Marlothe", "Nordahl", "Pellham", "Quillon",
)  # fmt: skip
COLORS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")
CARE = {  # material: how to look after it
    "bamboo": "a damp cloth is enough", "brass": "polish it with lemon and salt",
    "cork": "dust it with a dry brush", "cotton": "wash it by hand",
    "leather": "rub in a little balm", "linen": "steam out the creases",
    "oak": "oil it once a year", "rattan": "keep it out of the rain",
    "steel": "wipe off finger marks with vinegar", "wool": "air it instead of washing it",
}  # fmt: skip
CATEGORIES, MATERIALS = tuple(CATEGORY_WORDS), tuple(CARE)
MANNERS = ("compact", "handy", "light", "neat", "plain", "slim", "sturdy", "tidy")
LINES = (
    "Arc",
    "Bolt",
    "Cove",
    "Drift",
    "Echo",
    "Flint",
    "Grove",
    "Haven",
    "Loft",
    "Mesa",
    "Nova",
    "Pine",
    "Tide",
)
AUTHORS = (
    "Ada Bauer",
    "Ben Costa",
    "Clara Doyle",
    "David Ekman",
    "Ella Forster",
    "Frank Gray",
    "Grace Holt",
)
TITLES = (
    "{brand} {model} {category} in {color} with {material} {part}",
    "{model}, the {manner} {color} {category} by {brand}, {material} {part}",
    "{brand} {category} {model}, {color}, {material} {part}, {size}",
    "{model}: {manner} {category} in {color} and {material} from {brand}",
)
OPENINGS = (
    "This {manner} {category} from {brand} comes in {color} with its {part} in {material}.",
    "{brand} made the {model} in {color} and gave it a {part} of {material}.",
    "The {model} is a {manner} {category}: {color} all over, with {material} for the {part}.",
    "Here is a {category} in {color} whose {part} is of {material}.",
    "A {part} of {material} and a body in {color} make up this {category} by {brand}.",
    "Finished in {color} and fitted with a {part} of {material}, the {model} stays {manner}.",
    "{brand} keeps this {category} {manner}: the body is {color}, the {part} is {material}.",
    "Behind the name {model} is a {manner} {category} in {color}, with {material} on the {part}.",
)
SENTENCES = (  # on what it has, what it is for, how to look after it; a description takes two of the three
    ("It has {detail} and {other}.", "Among its details are {detail} and {other}.",
     "With {detail}, it also offers {other}.", "Besides {detail}, there is {other}.",
     "Buyers get {detail} as well as {other}.", "It comes with {detail}, and {other} is part of it too."),
    ("At {size}, it is right for {use}.", "Its size of {size} suits {use}.",
     "Made with {use} in mind, it comes at {size}.", "It is meant for {use} and comes in at {size}.",
     "Think of {use}: {size} will do.", "Good for {use}, it is listed at {size}."),
    ("As for care, {care}.", "Care is simple: {care}.", "For the {part}, {care}.",
     "When the {material} looks tired, {care}.", "To keep the {part} in shape, {care}.", "Hint: {care}."),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Products and the shop


def one_of(rng: random.Random, options: Sequence):
    """Return one of options; like every draw here it takes random() alone, the same in each version of Python."""
    return options[int(rng.random() * len(options))]


def some_of(rng: random.Random, options: Sequence, n: int) -> list:
    """Return n different ones of options in random order."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


@dataclass(frozen=True, eq=False)
class Product:
    """A product as it reads (attributes) and the facts behind it; appeal is its relative chance to be bought."""

    id: str
    attributes: dict[str, str]
    category: str
    brand: str
    color: str
    material: str
    appeal: float


def make_product(rng: random.Random, name: str) -> Product:
    """Return a product with the id name: facts drawn at random, and attributes that tell them."""
    category, brand, color, material = (
        one_of(rng, words) for words in (CATEGORIES, BRANDS, COLORS, MATERIALS)
    )
    part, price, low, high, unit, uses, details = CATEGORY_WORDS[category]
    model, size = (
        f"{one_of(rng, LINES)} {one_of(rng, range(100, 1000))}",
        f"{one_of(rng, range(low, high))} {unit}",
    )
    manner, use, (detail, other) = one_of(rng, MANNERS), one_of(rng, uses), some_of(rng, details, 2)
    words = {
        "category": category,
        "brand": brand,
        "color": color,
        "material": material,
        "model": model,
        "size": size,
    }
    words |= {
        "part": part,
        "care": CARE[material],
        "use": use,
        "detail": detail,
        "other": other,
        "manner": manner,
    }
    sentences = [
        one_of(rng, OPENINGS),
        *(one_of(rng, templates) for templates in some_of(rng, SENTENCES, 2)),
    ]
    dollars, cents = int(price * (0.6 + 0.8 * rng.random())), one_of(rng, ("00", "50", "90", "99"))
    attributes = {
        "Title": one_of(rng, TITLES).format(**words),
        "Price": f"{dollars}.{cents}",
        "Brand": brand,
    }
    attributes |= {"Color": color, "Size": size, "Model": model, "Material": material}
    attributes |= {"Author": one_of(rng, AUTHORS)} if category == "journal" else {}
    attributes["Description"] = " ".join(sentences).format(**words)
    return Product(
        name, attributes, category, brand, color, material, appeal=0.1 + 0.9 * rng.random() ** 3
    )


@dataclass(frozen=True)
class Taste:
    """What a user likes in the long run."""

    categories: tuple[str, ...]
    brands: tuple[str, ...]
    color: str
    material: str

    def matches(self, product: Product) -> int:
        """Return how many of brand, color and material are to the taste; two make the product fit."""
        return (
            (product.brand in self.brands)
            + (product.color == self.color)
            + (product.material == self.material)
        )


@dataclass(frozen=True)
class Shop:
    """All products, and the shelves where those of a category, or of a category and two more facts, stand."""

    products: dict[str, Product]
    shelves: dict[tuple[str, ...], list[Product]] = field(repr=False)

    def fitting(self, category: str, taste: Taste) -> list[Product]:
        """Return the category's products that fit the taste."""
        pairs = [(taste.color, taste.material)]
        pairs += [
            (brand, other) for brand in taste.brands for other in (taste.color, taste.material)
        ]
        return list(
            dict.fromkeys(p for pair in pairs for p in self.shelves.get((category, *pair), ()))
        )


def make_shop(seed: int, n_items: int) -> Shop:
    """Return a shop of n_items products with no two descriptions or titles alike."""
    products, shelves, texts = {}, {}, set()
    for number in range(1, n_items + 1):
        # A generator for each product lets a larger shop begin with the products of a smaller one.
        rng = random.Random(f"demo product {seed} {number}")
        product = make_product(rng, f"P{seed}-{number:05d}")
        while texts & {product.attributes["Title"], product.attributes["Description"]}:
            product = make_product(rng, product.id)
        texts |= {product.attributes["Title"], product.attributes["Description"]}
        products[product.id] = product
        pairs = [
            (product.brand, product.color),
            (product.brand, product.material),
            (product.color, product.material),
        ]
        for pair in [(), *pairs]:
            shelves.setdefault((product.category, *pair), []).append(product)
    return Shop(products, shelves)


# ---------------------------------------------------------------------------------------------------------------------
# Users: the rule of this file's docstring


@dataclass(frozen=True)
class User:
    """What a user bought, oldest first, and why; a recommender may see the history, and the others as candidates."""

    taste: Taste
    need: str
    history: list[Product]
    target: Product
    negatives: list[Product]


def make_taste(rng: random.Random) -> Taste:
    """Return a taste, all equally likely."""
    categories, brands = some_of(rng, CATEGORIES, 2), some_of(rng, BRANDS, 2)
    return Taste(tuple(categories), tuple(brands), one_of(rng, COLORS), one_of(rng, MATERIALS))


def pick(
    rng: random.Random, products: Sequence[Product], taken: Sequence[Product]
) -> Product | None:
    """Return one of the products that are not taken, by their appeal; None where all are."""
    if all(product in taken for product in products):
        return None
    while True:
        product = one_of(rng, products)
        if rng.random() < product.appeal and product not in taken:
            return product


def make_user(rng: random.Random, shop: Shop, n_negatives: int) -> User:
    """Return a user; InputError where the shop has too little for the tastes of its users."""
    for _ in range(ATTEMPTS):
        taste, length = make_taste(rng), one_of(rng, range(SHORTEST, LONGEST + 1))
        need = one_of(
            rng, [category for category in CATEGORIES if category not in taste.categories]
        )
        favorites = [
            product for category in taste.categories for product in shop.fitting(category, taste)
        ]
        # Candidates come first: a history drawn before them would leave them the less popular products.
        target = pick(rng, shop.fitting(need, taste), [])
        negatives = make_negatives(rng, shop, taste, need, n_negatives)
        history: list[Product] = []
        for i in range(length):
            category = need if i >= length - RECENT else one_of(rng, CATEGORIES)
            loyal = i < length - RECENT and rng.random() < LOYALTY
            shelf = favorites if loyal else shop.shelves.get((category,), ())
            history.append(pick(rng, shelf, [target, *negatives, *history]))
        if target and all(history) and len(negatives) == n_negatives:
            return User(taste, need, history, target, negatives)
    raise InputError(
        f"{len(shop.products)} items are too few for what the users look for; raise --items"
    )


def make_negatives(
    rng: random.Random, shop: Shop, taste: Taste, need: str, n: int
) -> list[Product]:
    """Return n products that imagined users chose, of the kinds that KINDS tells; fewer from too small a shop."""
    kinds = [kind for _ in range(0, n, len(KINDS)) for kind in some_of(rng, KINDS, len(KINDS))]
    others = some_of(
        rng, [category for category in CATEGORIES if category != need], len(CATEGORIES) - 1
    )
    negatives: list[Product] = []
    for attempt in range(n * ATTEMPTS):
        kind = kinds[len(negatives)]
        category = need if kind == "other taste" else others[attempt % len(others)]
        product = pick(
            rng,
            shop.fitting(category, taste if kind == "other need" else make_taste(rng)),
            negatives,
        )
        # Rejected after the pick: leaving such products out before it would favor the less popular ones.
        if product and (kind == "other need" or taste.matches(product) == 0):
            negatives.append(product)
        if len(negatives) == n:
            break
    return negatives


# ---------------------------------------------------------------------------------------------------------------------
# Oracles: what can be known from which part of the history


def inferred_taste(products: Sequence[Product]) -> Taste:
    """Return the taste that the products suggest: their most frequent categories, brands, color and material."""
    top = {
        name: [value for value, _ in Counter(getattr(p, name) for p in products).most_common(n)]
        for name, n in (("category", 2), ("brand", 2), ("color", 1), ("material", 1))
    }
    return Taste(tuple(top["category"]), tuple(top["brand"]), top["color"][0], top["material"][0])


def oracle_scores(shop: Shop, example: dict, counts: Counter) -> Iterator[dict[str, int]]:
    """Yield for each candidate, the positive first, its score by those who know the rule, and how often it sold."""
    history = [shop.products[i] for i in example["history"]]
    taste, need = inferred_taste(history[:-RECENT]), history[-1].category
    for product in (shop.products[i] for i in [example["positive"], *example["negatives"]]):
        needed, fit = int(product.category == need), taste.matches(product)
        # Who sees nothing of the need still knows that it is in no favorite category.
        new = int(product.category not in taste.categories)
        scores = {
            "full history": 4 * needed + fit,
            "recent items only": needed,
            "lasting taste only": 4 * new + fit,
        }
        yield scores | {"popularity": counts[product.id]}


def oracle_table(shop: Shop, train: Sequence[dict], test: Sequence[dict]) -> dict[str, float]:
    """Return the test split's Recall@3 of the three oracles, of popularity in train, and of a random order."""
    counts = Counter(i for example in train for i in [*example["history"], example["positive"]])
    hits: Counter = Counter()
    for example in test:
        rng = random.Random(f"demo ties {example['user']}")
        rows = list(oracle_scores(shop, example, counts))
        for name in rows[0]:
            # Scores are whole numbers, and ties count against the positive: a fraction puts equals in random order.
            hits[name] += rank_of_positive([row[name] + rng.random() for row in rows], 0) <= 3
    return {name: n / len(test) for name, n in hits.items()} | {"random order": 3 / len(rows)}


def make_split(shop: Shop, seed: int, split: str, n_users: int) -> Iterator[dict]:
    """Yield the split's examples as they are written; a user depends on shop, seed, split and number alone."""
    for number in range(1, n_users + 1):
        name = f"S{seed}-{split}-{number:05d}"
        rng = random.Random(f"demo user {name}")
        user = make_user(rng, shop, n_negatives=1 if split == "train" else 20)
        history, negatives = (
            [product.id for product in products] for products in (user.history, user.negatives)
        )
        yield {"user": name, "history": history, "positive": user.target.id, "negatives": negatives}


def main(argv: list[str] | None = None) -> None:
    """Generate the shop and its users, write the dataset and print what the oracles score on it."""
    parser = argparse.ArgumentParser(
        description="A demo shop.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/demo"), help="folder to write the dataset to"
    )
    parser.add_argument(
        "--items", type=positive, default=6000, help="products in the shop, from about 1500 on"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed has other items and other users"
    )
    flag = parser.add_argument_group("users").add_argument
    flag(
        "--users",
        type=positive,
        default=argparse.SUPPRESS,
        help="users in all, split 10 : 1 : 1, from 3 on",
    )
    for split, n in USERS.items():
        flag(
            f"--{split}-users",
            type=positive,
            default=argparse.SUPPRESS,
            help=f"{split} users ({n} without --users)",
        )
    args = parser.parse_args(argv)
    if getattr(args, "users", 3) < 3:
        raise InputError(f"--users {args.users}: at least 3 are needed, one for each split")
    sizes = split_sizes(args.users) if hasattr(args, "users") else USERS
    sizes = {split: getattr(args, f"{split}_users", n) for split, n in sizes.items()}
    users = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    print(
        f"A synthetic shop of {args.items:,} items and {users} users to {args.out} (products, seed {args.seed})"
    )
    shop = make_shop(args.seed, args.items)
    splits = {}
    for split, n in sizes.items():
        splits[split] = list(
            tqdm(make_split(shop, args.seed, split, n), split, n, disable=None, delay=1)
        )
    oracles = oracle_table(shop, splits["train"], splits["test"])
    meta = {
        "domain": "products",
        "seed": args.seed,
        "settings": {"items": args.items, "users": sizes},
        "sources": [],
    }
    meta |= {"dropped": {}, "oracles": {"split": "test", "metric": "Recall@3", **oracles}}
    items = (
        {"id": product.id, "attributes": product.attributes} for product in shop.products.values()
    )
    meta = save_dataset(args.out, splits, items, meta)
    print(
        "Recall@3 on the test split:",
        *(f"{name:<20} {value:.3f}" for name, value in oracles.items()),
        sep="\n  ",
    )
    print(
        f"{users} users; {meta['items']:,} items; mean history {meta['mean_history']}; written to {args.out}"
    )
    print(f"Next: python summarize.py --data {args.out}")


if __name__ == "__main__":
    run_main(main)
