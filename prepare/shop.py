"""A synthetic shop and its users, by rule and from a seed alone: what prepare.demo writes.

How users choose. Everyone has a lasting taste: two favorite categories, two favorite brands, one
color, one material. A product fits the taste if it has at least two of three: a favorite brand, the
color, the material. Nine in ten purchases fit the taste and are of a favorite category; the others
are anything. Then a need comes up, in a category that is no favorite. The last three purchases are
of this category, bought in a hurry, whatever their brand, color and material. The target is of the
needed category too, but chosen with care: it fits the taste. So the recent items say only which
category comes next, and the items before them say the rest.

Negatives are the targets of imagined users, so neither their texts nor their popularity give them
away. Of 20, seven are from a user with the same need and another taste, seven from one with the
same taste and another need, and six from one who shares neither. A taste counts as another if the
product has nothing that the user likes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from trsr import InputError

SHORTEST, LONGEST, RECENT = 10, 25, 3  # purchases before the target; the need takes the last three
LOYALTY = 0.9  # share of the purchases before the need that fit the taste
KINDS = ("other taste",) * 7 + ("other need",) * 7 + ("neither",) * 6
ATTEMPTS = 100  # draws before a shop counts as too small

# ---- Vocabulary
#
# Texts spell categories, brands, colors and materials exactly like this, and use these words for
# nothing else.

# By category: the part made of the material, the usual price, the least and the largest size, its
# unit, what the product is for, and what it has.
CATEGORY_WORDS = {
    "backpack": ("trim", 60, 14, 34, "litres",
        "the daily commute, a weekend away, long days at college",
        "a laptop sleeve, two side pockets, a chest belt, a rain cover, padded shoulders"),
    "basket": ("lid", 30, 20, 60, "cm",
        "laundry, toys on the floor, blankets by the sofa",
        "two carry loops, a washable lining, a flat bottom, a name tag, soft corners"),
    "clock": ("face", 35, 16, 44, "cm",
        "the kitchen wall, a quiet bedroom, the mantelpiece",
        "a silent movement, large numerals, glowing hands, a daily alarm, one spare battery"),
    "journal": ("cover", 18, 14, 28, "cm",
        "morning notes, travel diaries, lists and plans",
        "dotted pages, a ribbon marker, numbered pages, a pocket at the back, thick paper"),
    "lamp": ("shade", 45, 24, 68, "cm",
        "the reading corner, a bedside table, late work at the desk",
        "a dimmer, a long cord, a warm bulb, a touch switch, a tilting neck"),
    "mirror": ("frame", 70, 30, 90, "cm",
        "the hallway, a small bathroom, the dressing room",
        "two wall hooks, a beveled edge, a fold-out stand, a coating against fog, rounded corners"),
    "planter": ("sleeve", 25, 12, 40, "cm",
        "herbs on the sill, a tall fern, the balcony",
        "a drip dish, a drain hole, a water gauge, felt feet, an inner pot"),
    "speaker": ("grille", 90, 10, 36, "cm",
        "music in the kitchen, parties on the terrace, films at home",
        "a deep bass, twelve hours of battery, a splash guard, a microphone, stereo pairing"),
    "stool": ("seat", 50, 42, 76, "cm",
        "the breakfast bar, one more guest at dinner, the workshop",
        "a foot rest, screw-in legs, a swivel, rubber caps, a carry slot"),
    "suitcase": ("handle", 110, 48, 78, "cm",
        "cabin flights, two weeks at the sea, family visits",
        "four quiet wheels, a number lock, packing cubes, a hard shell, a zipped divider"),
    "tray": ("base", 22, 25, 55, "cm",
        "breakfast in bed, keys and letters, tea in the garden",
        "a raised rim, folding legs, a surface that does not slip, cut-out grips, stacking feet"),
    "watch": ("strap", 120, 30, 46, "mm",
        "the office day, an evening out, long hikes",
        "a date window, a stop function, scratch-proof glass, a solar cell, a second time zone"),
}  # fmt: skip
BRANDS = (
    "Alderon", "Brisby", "Calvero", "Dunmore", "Elvaton", "Fennick", "Galdera", "Harrowby",
    "Istrel", "Jorvane", "Kestwick", "Lumora", "Marlothe", "Nordahl", "Pellham", "Quillon",
)  # fmt: skip
COLORS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")
CARE = {  # by material
    "bamboo": "a damp cloth is enough", "brass": "polish it with lemon and salt",
    "cork": "dust it with a dry brush", "cotton": "wash it by hand",
    "leather": "rub in a little balm", "linen": "steam out the creases",
    "oak": "oil it once a year", "rattan": "keep it out of the rain",
    "steel": "wipe off finger marks with vinegar", "wool": "air it instead of washing it",
}  # fmt: skip
CATEGORIES, MATERIALS = tuple(CATEGORY_WORDS), tuple(CARE)

MANNERS = ("compact", "handy", "light", "neat", "plain", "slim", "sturdy", "tidy")
LINES = (
    "Arc", "Bolt", "Cove", "Drift", "Echo", "Flint", "Grove", "Haven", "Loft", "Mesa", "Nova",
    "Pine", "Tide",
)  # fmt: skip
AUTHORS = (
    "Ada Bauer", "Ben Costa", "Clara Doyle", "David Ekman", "Ella Forster", "Frank Gray",
    "Grace Holt",
)  # fmt: skip
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
# On what a product has, what it is for, and how to look after it; a description has two of these.
SENTENCES = (
    (
        "It has {detail} and {other}.",
        "Among its details are {detail} and {other}.",
        "With {detail}, it also offers {other}.",
        "Besides {detail}, there is {other}.",
        "Buyers get {detail} as well as {other}.",
        "It comes with {detail}, and {other} is part of it too.",
    ),
    (
        "At {size}, it is right for {use}.",
        "Its size of {size} suits {use}.",
        "Made with {use} in mind, it comes at {size}.",
        "It is meant for {use} and comes in at {size}.",
        "Think of {use}: {size} will do.",
        "Good for {use}, it is listed at {size}.",
    ),
    (
        "As for care, {care}.",
        "Care is simple: {care}.",
        "For the {part}, {care}.",
        "When the {material} looks tired, {care}.",
        "To keep the {part} in shape, {care}.",
        "Hint: {care}.",
    ),
)

# ---- Products


def one_of(rng: random.Random, options: Sequence):
    """Return one of options.

    Every draw here uses random() alone, which gives the same numbers in each version of Python.
    """
    return options[int(rng.random() * len(options))]


def some_of(rng: random.Random, options: Sequence, n: int) -> list:
    """Return n different ones of options in random order."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(n)]


@dataclass(frozen=True, eq=False)
class Product:
    """A product: its texts (attributes), and the facts behind them."""

    id: str
    attributes: dict[str, str]
    category: str
    brand: str
    color: str
    material: str
    appeal: float  # its relative chance to be bought


def make_product(rng: random.Random, name: str) -> Product:
    """Return a product with the id name: facts drawn at random, and texts that state them."""
    kinds = (CATEGORIES, BRANDS, COLORS, MATERIALS)
    category, brand, color, material = facts = [one_of(rng, words) for words in kinds]
    part, price, low, high, unit, uses, details = CATEGORY_WORDS[category]
    model = f"{one_of(rng, LINES)} {one_of(rng, range(100, 1000))}"
    size = f"{one_of(rng, range(low, high))} {unit}"
    manner, use = one_of(rng, MANNERS), one_of(rng, uses.split(", "))
    detail, other = some_of(rng, details.split(", "), 2)

    words = {"category": category, "brand": brand, "color": color, "material": material}
    words |= {"model": model, "size": size, "part": part, "care": CARE[material], "use": use}
    words |= {"detail": detail, "other": other, "manner": manner}
    opening = one_of(rng, OPENINGS)
    sentences = [opening, *(one_of(rng, forms) for forms in some_of(rng, SENTENCES, 2))]

    dollars, cents = int(price * (0.6 + 0.8 * rng.random())), one_of(rng, ("00", "50", "90", "99"))
    attributes = {"Title": one_of(rng, TITLES).format(**words), "Price": f"{dollars}.{cents}"}
    attributes |= {"Brand": brand, "Color": color, "Size": size, "Model": model}
    attributes |= {"Material": material}
    if category == "journal":
        attributes["Author"] = one_of(rng, AUTHORS)
    attributes["Description"] = " ".join(sentences).format(**words)
    return Product(name, attributes, *facts, appeal=0.1 + 0.9 * rng.random() ** 3)


# ---- The shop


@dataclass(frozen=True)
class Taste:
    """What a user likes in the long run."""

    categories: tuple[str, ...]
    brands: tuple[str, ...]
    color: str
    material: str

    def matches(self, product: Product) -> int:
        """Return how many of brand, color and material are to the taste; with two, it fits."""
        same = product.color == self.color, product.material == self.material
        return (product.brand in self.brands) + sum(same)


@dataclass(frozen=True)
class Shop:
    """All products, and the shelves that hold them by category, or by category and two facts."""

    products: dict[str, Product]
    shelves: dict[tuple[str, ...], list[Product]] = field(repr=False)

    def fitting(self, category: str, taste: Taste) -> list[Product]:
        """Return the category's products that fit the taste."""
        pairs = [(taste.color, taste.material)]
        for brand in taste.brands:
            pairs += [(brand, taste.color), (brand, taste.material)]
        found: dict[Product, None] = {}
        for pair in pairs:
            found |= dict.fromkeys(self.shelves.get((category, *pair), ()))
        return list(found)


def make_shop(seed: int, n_items: int) -> Shop:
    """Return a shop of n_items products, whose titles and descriptions all differ."""
    products, shelves, texts = {}, {}, set()
    for number in range(1, n_items + 1):
        # One generator per product, so a larger shop starts with the products of a smaller one.
        rng = random.Random(f"demo product {seed} {number}")
        product = make_product(rng, f"P{seed}-{number:05d}")
        while texts & {product.attributes["Title"], product.attributes["Description"]}:
            product = make_product(rng, product.id)
        texts |= {product.attributes["Title"], product.attributes["Description"]}
        products[product.id] = product

        brand, color, material = product.brand, product.color, product.material
        for pair in [(), (brand, color), (brand, material), (color, material)]:
            shelves.setdefault((product.category, *pair), []).append(product)
    return Shop(products, shelves)


# ---- Users: the rule of this file's docstring


@dataclass(frozen=True)
class User:
    """What a user bought, oldest first, and why.

    A recommender may see the history, and the target and negatives as candidates.
    """

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
    """Return a product that is not taken, drawn by appeal; None if all are taken."""
    if all(product in taken for product in products):
        return None
    while True:
        product = one_of(rng, products)
        if rng.random() < product.appeal and product not in taken:
            return product


def make_user(rng: random.Random, shop: Shop, n_negatives: int) -> User:
    """Return a user; InputError if the shop has too little for its users' tastes."""
    for _ in range(ATTEMPTS):
        taste, length = make_taste(rng), one_of(rng, range(SHORTEST, LONGEST + 1))
        need = one_of(rng, [name for name in CATEGORIES if name not in taste.categories])
        # Candidates come first: drawn after a history, they would be the less popular products.
        target = pick(rng, shop.fitting(need, taste), [])
        negatives = make_negatives(rng, shop, taste, need, n_negatives)
        history = make_history(rng, shop, taste, need, length, [target, *negatives])
        if target and all(history) and len(negatives) == n_negatives:
            return User(taste, need, history, target, negatives)
    what = f"{len(shop.products)} items are too few for what the users look for"
    raise InputError(f"{what}; raise --items")


def make_history(
    rng: random.Random, shop: Shop, taste: Taste, need: str, length: int, taken: list
) -> list[Product | None]:
    """Return what a user buys before the target; None in it if a shelf has nothing left.

    taken: products that are not to be bought.
    """
    favorites = []
    for category in taste.categories:
        favorites += shop.fitting(category, taste)
    history: list[Product | None] = []
    for i in range(length):
        before_need = i < length - RECENT
        category = one_of(rng, CATEGORIES) if before_need else need
        loyal = before_need and rng.random() < LOYALTY
        shelf = favorites if loyal else shop.shelves.get((category,), ())
        history.append(pick(rng, shelf, [*taken, *history]))
    return history


def make_negatives(
    rng: random.Random, shop: Shop, taste: Taste, need: str, n: int
) -> list[Product]:
    """Return n products that imagined users chose, of the KINDS; fewer if the shop is too small."""
    kinds = []
    for _ in range(0, n, len(KINDS)):
        kinds += some_of(rng, KINDS, len(KINDS))
    others = some_of(rng, [name for name in CATEGORIES if name != need], len(CATEGORIES) - 1)
    negatives: list[Product] = []
    for attempt in range(n * ATTEMPTS):
        kind = kinds[len(negatives)]
        category = need if kind == "other taste" else others[attempt % len(others)]
        wanted = taste if kind == "other need" else make_taste(rng)
        product = pick(rng, shop.fitting(category, wanted), negatives)
        # Rejected after the pick: leaving them out before would favor the less popular products.
        if product and (kind == "other need" or taste.matches(product) == 0):
            negatives.append(product)
        if len(negatives) == n:
            break
    return negatives
