"""The text that models/tiny is trained on, generated from shops that the demo never sees. Text in, text out.

A text is a prompt and its answer, or a talk of several turns about the same things. There are three sorts:

    summaries   the prompts of section 4.1 and 4.2 as trsr.py builds them, answered by the rule of `Memory`
    questions   yes or no, and a few open ones, about products, profiles and shelves: what is what, what fits what
    language    a product described from its attributes

The recommendation prompt is none of them: the model meets it first in train.py. A text depends on the seed and its
number alone, and the shops' seeds (SHOPS) and the users drawn here are none of prepare.demo's.

The style of a summary. First it tells what was bought, each word with how often (once, if no number follows), in
alphabetical order; then what stands out in that; then the kind of the latest product:

    Bought clock 4 lamp 5 tray watch 2, Alderon 4 Brisby 3 Quillon 2, black 8 red white 2, oak 7 wool 2, likes clock
    lamp, Alderon Brisby, black, oak, now watch.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import trsr
from prepare.demo import (
    BRANDS,
    CATEGORIES,
    COLORS,
    MATERIALS,
    RECENT,
    Product,
    Shop,
    make_shop,
    make_taste,
    one_of,
    some_of,
)
from prepare.domains import DOMAINS

SHOPS = range(1001, 1009)  # seeds of the shops; the demo's is 0
ITEMS = 6000  # products a shop
DOMAIN = DOMAINS["products"]
FACTS = ("category", "brand", "color", "material")
OFFERS, QUESTIONS = 16, 14  # that a scene has, and that are asked at most
WORDS = dict(zip(FACTS, (CATEGORIES, BRANDS, COLORS, MATERIALS), strict=True))
BRIEF = ("Title", "Brand", "Color", "Material")
LIKED = dict(zip(FACTS, (2, 2, 1, 1), strict=True))  # how many of each a summary likes at most


Text = list[tuple[str, str]]  # turns: a prompt, which ends with the cue, and its answer


@cache
def shop_of(seed: int) -> Shop:
    """Return the shop of a seed."""
    return make_shop(seed, ITEMS)


@cache
def text_of(product: Product, brief: bool = False) -> str:
    """Return the product's text, as prompts show it; brief is without what tells little of it."""
    shown = product.attributes.items()
    return trsr.item_text({name: value for name, value in shown if not brief or name in BRIEF})


def facts(product: Product) -> dict[str, str]:
    """Return the product's category, brand, color and material."""
    return {fact: getattr(product, fact) for fact in FACTS}


# ---- Summaries


@dataclass(frozen=True)
class Memory:
    """What a summary holds: how often each word of each fact was seen, and the latest product's category."""

    counts: dict[str, Counter]
    now: str

    @classmethod
    def of(cls, products: Sequence[Product]) -> "Memory":
        """Return what there is to remember of products, oldest first."""
        return cls(
            {f: Counter(getattr(p, f) for p in products) for f in FACTS}, products[-1].category
        )

    @classmethod
    def joined(cls, parts: Sequence["Memory"]) -> "Memory":
        """Return the sum of parts, in order of time. A word seen once, and not in the latest part, is forgotten."""
        counts = {}
        for fact in FACTS:
            total = sum((part.counts[fact] for part in parts), Counter())
            counts[fact] = Counter(
                {w: n for w, n in total.items() if n > 1 or w in parts[-1].counts[fact]}
            )
        return cls(counts, parts[-1].now)

    def liked(self) -> dict[str, list[str]]:
        """Return the words that stand out: seen twice or more, and more often than all words that are not liked.

        At most two categories (the latest aside), two brands, one color and one material.
        """
        liked = {}
        for fact, most in LIKED.items():
            ranked = [
                (w, n)
                for w, n in self.counts[fact].most_common()
                if fact != "category" or w != self.now
            ]
            bar = max(1, ranked[most][1] if len(ranked) > most else 0)
            liked[fact] = sorted(w for w, n in ranked[:most] if n > bar)
        return liked

    def __str__(self) -> str:
        lists = [sorted(counts.items()) for counts in self.counts.values()]
        bought = ", ".join(
            " ".join(w if n == 1 else f"{w} {n}" for w, n in pairs) for pairs in lists
        )
        liked = (
            ", ".join(" ".join(words) for words in self.liked().values() if words) or "nothing yet"
        )
        return f"Bought {bought}, likes {liked}, now {self.now}."


def make_history(rng: random.Random, shop: Shop) -> list[Product]:
    """Return what an imagined user bought: some loyal to a taste, some not, most with something new at the end."""
    taste, length, loyalty = (
        make_taste(rng),
        10 + int(rng.random() * 16),
        one_of(rng, (0.5, 0.8, 0.9, 0.9)),
    )
    favorites = [
        product for category in taste.categories for product in shop.fitting(category, taste)
    ]
    recent, need = one_of(rng, (0, RECENT, RECENT, RECENT)), one_of(rng, CATEGORIES)
    history = []
    for i in range(length):
        loyal = i < length - recent and favorites and rng.random() < loyalty
        shelf = (
            favorites
            if loyal
            else shop.shelves[(need if i >= length - recent else one_of(rng, CATEGORIES),)]
        )
        history.append(one_of(rng, shelf))
    return history


def some_blocks(rng: random.Random, shop: Shop) -> list[list[Product]]:
    """Return the blocks of a history that ends anywhere; most blocks have five products."""
    history, size = make_history(rng, shop), one_of(rng, (5, 5, 5, 5, 5, 5, 2, 3, 4, 6, 8))
    return [
        history[start:end]
        for start, end in trsr.split_blocks(1 + int(rng.random() * len(history)), size)
    ]


def block_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a block to summarize, with its summary."""
    block = some_blocks(rng, shop)[-1 if rng.random() < 0.5 else 0]
    return [
        (
            trsr.block_prompt([text_of(p, brief) for p in block], DOMAIN, _unlimited()),
            str(Memory.of(block)),
        )
    ]


def merge_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return summaries of one user to merge, with the summary of them all."""
    while len(parts := [Memory.of(block) for block in some_blocks(rng, shop)]) < 2:
        pass
    if len(parts) > 3 and rng.random() < 0.15:  # a merge of merges
        parts = [Memory.joined(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return [
        (
            trsr.merge_prompt([str(p) for p in parts], DOMAIN, _unlimited()),
            str(Memory.joined(parts)),
        )
    ]


def update_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a summary to update with a block, with the summary after it."""
    while len(blocks := some_blocks(rng, shop)) < 2:
        pass
    memory = Memory.of(blocks[0])
    for block in blocks[1:-1]:
        memory = Memory.joined([memory, Memory.of(block)])
    prompt = trsr.update_prompt(
        str(memory), [text_of(p, brief) for p in blocks[-1]], DOMAIN, _unlimited()
    )
    return [(prompt, str(Memory.joined([memory, Memory.of(blocks[-1])])))]


def _unlimited() -> trsr.Budget:
    return trsr.Budget(1, lambda texts: [[] for _ in texts], Counter())


# ---- Questions about texts


@dataclass(frozen=True)
class Scene:
    """What questions are about: a profile (text and the words that it likes), products on a shelf, and headers."""

    profile: str
    liked: dict[str, list[str]]
    now: str | None  # of a profile that is a summary
    shelf: list[Product]
    offers: list[Product]  # of which one at a time is asked about
    names: tuple[str, str, str]  # headers of profile, shelf and offer

    def sections(self, rng: random.Random, needed: str, brief: bool) -> list[tuple[str, str]]:
        """Return the sections that a question needs ("profile", "shelf", both or none), and others at random."""
        shelf = trsr.numbered(text_of(p, brief) for p in self.shelf)
        all_of = {"profile": (self.names[0], self.profile), "shelf": (self.names[1], shelf)}
        kept = [section for name, section in all_of.items() if name in needed or rng.random() < 0.6]
        return kept[::-1] if rng.random() < 0.15 else kept


def make_scene(rng: random.Random, shop: Shop) -> Scene:
    """Return a scene in which yes and no are about equally common."""
    history = make_history(rng, shop)
    memory = Memory.of(history[:-1])
    liked, now, profile = memory.liked(), memory.now, str(memory)
    if rng.random() < 0.3:
        liked, now = (
            {
                f: sorted(some_of(rng, WORDS[f], 1 + int(rng.random() * n)))
                for f, n in LIKED.items()
            },
            None,
        )
        words = [word for words in liked.values() for word in words]
        profile = one_of(rng, ("Likes {}.", "{}", "Looks for {}.", "Would like {}.")).format(
            ", ".join(words)
        )
    shelf = history[-1 - int(rng.random() * 4) :]
    wanted = [{f: one_of(rng, liked[f] or WORDS[f]) for f in FACTS} for _ in range(OFFERS)]
    kinds = [p.category for p in (*shelf, shelf[-1], shelf[-1])] + [
        w["category"] for w in wanted[:3]
    ]
    offers = []
    for want in wanted:  # half of the offers have two or three facts of the profile's
        category = one_of(rng, kinds) if rng.random() < 0.75 else one_of(rng, CATEGORIES)
        pair = some_of(rng, FACTS[1:], 2)
        key = (
            (category, *(want[f] for f in FACTS if f in pair))
            if rng.random() < 0.5
            else (category,)
        )
        offers.append(one_of(rng, shop.shelves.get(key) or shop.shelves[(category,)]))
    names = (("Profile", "Customer", "Wish List", "Memo"), ("Shelf", "Basket", "List", "Cart"))
    names = (
        *(one_of(rng, options) for options in names),
        one_of(rng, ("Product", "Offer", "Article")),
    )
    return Scene(profile, liked, now, shelf, offers, names)


Condition = tuple[
    str, str, Callable[[Product], bool]
]  # a claim about the offer, the sections it needs, its truth


def profile_claim(rng: random.Random, scene: Scene) -> Condition:
    """Return a claim about one fact of the offer and the profile."""
    who, fact = scene.names[0].lower(), one_of(rng, FACTS)
    if scene.now and rng.random() < 0.3:
        return f"it is what the {who} tells of now", "profile", lambda p: p.category == scene.now
    words = "its kind is" if fact == "category" else f"its {fact} is"
    return (
        f"{words} one that the {who} likes",
        "profile",
        lambda p: getattr(p, fact) in scene.liked[fact],
    )


def taste_claim(rng: random.Random, scene: Scene) -> Condition:
    """Return a claim about how much of the offer is to the taste of the profile."""
    who, least = scene.names[0].lower(), one_of(rng, (1, 2, 2, 2, 3))
    several = one_of(rng, ("at least {} of brand, color and material are what the {who} likes",
        "{} or more of its brand, color and material are to the taste of the {who}",
        "it suits the {who} in {} or more of brand, color, material"))  # fmt: skip
    claim = several.format(("one", "two", "three")[least - 1], who=who)
    return (
        claim,
        "profile",
        lambda p: sum(getattr(p, f) in scene.liked[f] for f in FACTS[1:]) >= least,
    )


def shelf_claim(rng: random.Random, scene: Scene) -> Condition:
    """Return a claim about the offer and the products on the shelf."""
    where, fact = scene.names[1].lower(), one_of(rng, ("category", "category", *FACTS))
    words = "kind" if fact == "category" else fact
    which = one_of(rng, ("the last product", "any product", "most products", "all products"))
    same = [getattr(p, fact) for p in scene.shelf]

    def true(p: Product) -> bool:
        n = same.count(getattr(p, fact))
        least = {"any": 1, "most": len(same) // 2 + 1, "all": len(same)}.get(which.split()[0], 0)
        return same[-1] == getattr(p, fact) if which == "the last product" else n >= least

    return f"it has the {words} of {which} in the {where}", "shelf", true


def product_claim(rng: random.Random, scene: Scene) -> Condition:
    """Return a claim about the offer alone."""
    known = facts(one_of(rng, scene.offers))
    fact, other = some_of(rng, FACTS, 2)
    says = {
        "category": "it is a {}",
        "brand": "it is from {}",
        "color": "it is {}",
        "material": "it has some {}",
    }
    if rng.random() < 0.3:
        return f"the text mentions {known[fact]}", "", lambda p: getattr(p, fact) == known[fact]
    if rng.random() < 0.3:
        claim = f"{says[fact].format(known[fact])} and {says[other].format(known[other])}"
        return (
            claim,
            "",
            lambda p: getattr(p, fact) == known[fact] and getattr(p, other) == known[other],
        )
    return says[fact].format(known[fact]), "", lambda p: getattr(p, fact) == known[fact]


def make_claim(rng: random.Random, scene: Scene) -> Condition:
    """Return a claim about the offer; one in four joins two.

    How well something is to the taste is never joined with another claim: that would be the rule by which the demo's
    users choose, which is for train.py to find.
    """
    if rng.random() < 0.75:
        return one_of(rng, (profile_claim, taste_claim, shelf_claim, shelf_claim, product_claim))(
            rng, scene
        )
    draws = [one_of(rng, (profile_claim, shelf_claim, product_claim)) for _ in range(2)]
    (first, needed, true), (second, also_needed, also) = (draw(rng, scene) for draw in draws)
    if rng.random() < 0.65:
        return f"{first}, and {second}", needed + also_needed, lambda p: true(p) and also(p)
    return f"{first}, or {second}", needed + also_needed, lambda p: true(p) or also(p)


def balanced(rng: random.Random, options: list[tuple], n: int) -> list[tuple]:
    """Return up to n of options (..., truth) in random order, half of them true where there are enough."""
    true, false = (
        [o for o in some_of(rng, options, len(options)) if o[-1] is truth]
        for truth in (True, False)
    )
    half = [*true[: n // 2], *false[: n - n // 2]]
    return some_of(rng, half, len(half))


def turns(first: str, asked: list[tuple[str, str]], header: str) -> Text:
    """Return a talk: the prompt `first` with a `|` for the text asked about, which each turn has anew under header."""
    beginning, end = first.split("|")
    starts = [beginning, *[f"\n\n[{header}]\n"] * (len(asked) - 1)]
    return [
        (start + about + end, answer) for start, (about, answer) in zip(starts, asked, strict=True)
    ]


def offers_text(
    rng: random.Random, shop: Shop, brief: bool, make: Callable[..., Condition] = make_claim
) -> Text:
    """Return one question, by `make`, about several offers in turn."""
    scene = make_scene(rng, shop)
    claim, needed, true = make(rng, scene)
    ask = one_of(rng, ("Is it true that {}? Answer 'Yes' or 'No'.", "Tell 'Yes' or 'No': {}.", "{}? Yes or No.",
        "Decide whether {}. Answer 'Yes' or 'No'.", "Read the texts and check that {}."))  # fmt: skip
    header = scene.names[2]
    first = trsr.build_prompt(ask.format(claim), *scene.sections(rng, needed, brief), (header, "|"))
    chosen = balanced(rng, [(p, true(p)) for p in dict.fromkeys(scene.offers)], 8 if brief else 4)
    return turns(
        first, [(text_of(p, brief), trsr.ANSWERS[not truth]) for p, truth in chosen], header
    )


def claims_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return several questions about one offer, two of them open."""
    scene = make_scene(rng, shop)
    offer, (who, where, header) = scene.offers[0], map(str.lower, scene.names)
    drawn = {
        claim: true(offer)
        for claim, _, true in (make_claim(rng, scene) for _ in range(2 * QUESTIONS))
    }
    claims = balanced(rng, list(drawn.items()), QUESTIONS)
    asked = [(f"Is it true that {claim}?", trsr.ANSWERS[not truth]) for claim, truth in claims]
    shared = [facts(offer)[f] for f in FACTS if facts(offer)[f] in scene.liked[f]]
    asked.append((f"What of it does the {who} like?", " ".join(shared) or "nothing"))
    same = [str(i) for i, p in enumerate(scene.shelf, 1) if p.category == offer.category]
    asked.append((f"Which in the {where} are of its kind?", " ".join(same) or "none"))
    sections = [
        *scene.sections(rng, "profile shelf", brief),
        (scene.names[2], text_of(offer, brief)),
        ("Question", "|"),
    ]
    first = trsr.build_prompt(f"Answer the question about the {header}.", *sections)
    return turns(first, some_of(rng, asked, len(asked)), "Question")


def description_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a title to find the description of, or attributes to describe."""
    product, *others = (one_of(rng, shop.shelves[(one_of(rng, CATEGORIES),)]) for _ in range(3))
    if rng.random() < 0.4:
        known = {name: value for name, value in product.attributes.items() if name != "Description"}
        prompt = trsr.build_prompt(
            "Describe this product in a few sentences.", ("Product", trsr.item_text(known))
        )
        return [(prompt, product.attributes["Description"])]
    ask = "Does the description fit the product? Answer 'Yes' or 'No'."
    sections = [("Product", f"Title: {product.attributes['Title']}"), ("Description", "|")]
    about = some_of(rng, [(product, "Yes"), (one_of(rng, others), "No")], 2)
    return turns(
        trsr.build_prompt(ask, *sections),
        [(p.attributes["Description"], a) for p, a in about],
        "Description",
    )


SORTS = (
    (block_text, 4),
    (merge_text, 3),
    (update_text, 4),
    (offers_text, 8),
    (claims_text, 8),
    (description_text, 1),
)


def texts(seed: int | str, brief: float = 0.0) -> Iterator[Text]:
    """Yield texts without end; they depend on the seed alone, and on the share of those with brief products."""
    rng = random.Random(f"tiny text {seed}")
    sorts = [sort for sort, share in SORTS for _ in range(share)]
    while True:
        yield one_of(rng, sorts)(rng, shop_of(one_of(rng, SHOPS)), rng.random() < brief)
