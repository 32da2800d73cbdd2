"""Questions about products, profiles and shelves, as training text: yes or no, and a few open ones.

A scene has a profile, a shelf of products and some offers. A claim is about one offer: about its
own facts, or about what it has in common with the shelf or with the profile's taste.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import trsr
from experiments.tiny.summaries import (
    DOMAIN,
    FACTS,
    LIKED,
    WORDS,
    Memory,
    Text,
    facts,
    make_history,
    text_of,
)
from prepare.shop import CATEGORIES, Product, Shop, one_of, some_of

OFFERS, QUESTIONS = 16, 14  # offers in a scene, and the most questions about one of them

# ---- Scenes


@dataclass(frozen=True)
class Scene:
    """What questions are about."""

    profile: str
    liked: dict[str, list[str]]  # the words that the profile likes, by fact
    now: str | None  # the latest category, if the profile is a summary
    shelf: list[Product]
    offers: list[Product]  # a question is about one of them
    names: tuple[str, str, str]  # headers of profile, shelf and offer

    def sections(
        self, rng: random.Random, needed: tuple[str, ...], brief: bool
    ) -> list[tuple[str, str]]:
        """Return the sections that a question needs (profile, shelf), and others at random."""
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
        liked, now = make_wishes(rng), None
        words = [word for words in liked.values() for word in words]
        form = one_of(rng, ("Likes {}.", "{}", "Looks for {}.", "Would like {}."))
        profile = form.format(", ".join(words))
    shelf = history[-1 - int(rng.random() * 4) :]
    offers = make_offers(rng, shop, liked, shelf)
    names = (
        one_of(rng, ("Profile", "Customer", "Wish List", "Memo")),
        one_of(rng, ("Shelf", "Basket", "List", "Cart")),
        one_of(rng, ("Product", "Offer", "Article")),
    )
    return Scene(profile, liked, now, shelf, offers, names)


def make_wishes(rng: random.Random) -> dict[str, list[str]]:
    """Return random words to like, by fact, up to as many as a summary can like."""
    wishes = {}
    for fact, most in LIKED.items():
        n = 1 + int(rng.random() * most)
        wishes[fact] = sorted(some_of(rng, WORDS[fact], n))
    return wishes


def make_offers(
    rng: random.Random, shop: Shop, liked: dict[str, list[str]], shelf: list[Product]
) -> list[Product]:
    """Return offers, half of which share two or three facts with the profile."""
    wanted = [{f: one_of(rng, liked[f] or WORDS[f]) for f in FACTS} for _ in range(OFFERS)]
    kinds = [p.category for p in (*shelf, shelf[-1], shelf[-1])]
    kinds += [want["category"] for want in wanted[:3]]
    offers = []
    for want in wanted:
        category = one_of(rng, kinds if rng.random() < 0.75 else CATEGORIES)
        pair = some_of(rng, FACTS[1:], 2)
        key = (category,)
        if rng.random() < 0.5:
            key = (category, *(want[fact] for fact in FACTS if fact in pair))
        offers.append(one_of(rng, shop.shelves.get(key) or shop.shelves[(category,)]))
    return offers


# ---- Claims


class Claim(NamedTuple):
    """A statement about an offer."""

    words: str
    needs: tuple[str, ...]  # the sections that it refers to
    holds: Callable[[Product], bool]


def profile_claim(rng: random.Random, scene: Scene) -> Claim:
    """Return a claim about one fact of the offer and the profile."""
    who, fact = scene.names[0].lower(), one_of(rng, FACTS)
    if scene.now and rng.random() < 0.3:
        words = f"it is what the {who} tells of now"
        return Claim(words, ("profile",), lambda p: p.category == scene.now)
    subject = "its kind is" if fact == "category" else f"its {fact} is"
    words = f"{subject} one that the {who} likes"
    return Claim(words, ("profile",), lambda p: getattr(p, fact) in scene.liked[fact])


def taste_claim(rng: random.Random, scene: Scene) -> Claim:
    """Return a claim about how many facts of the offer the profile likes."""
    who, least = scene.names[0].lower(), one_of(rng, (1, 2, 2, 2, 3))
    forms = (
        "at least {} of brand, color and material are what the {who} likes",
        "{} or more of its brand, color and material are to the taste of the {who}",
        "it suits the {who} in {} or more of brand, color, material",
    )
    words = one_of(rng, forms).format(("one", "two", "three")[least - 1], who=who)

    def holds(p: Product) -> bool:
        return sum(getattr(p, fact) in scene.liked[fact] for fact in FACTS[1:]) >= least

    return Claim(words, ("profile",), holds)


def shelf_claim(rng: random.Random, scene: Scene) -> Claim:
    """Return a claim about the offer and the products on the shelf."""
    where, fact = scene.names[1].lower(), one_of(rng, ("category", "category", *FACTS))
    kind = "kind" if fact == "category" else fact
    which = one_of(rng, ("the last product", "any product", "most products", "all products"))
    same = [getattr(p, fact) for p in scene.shelf]
    least = {
        "any product": 1,
        "most products": len(same) // 2 + 1,
        "all products": len(same),
    }

    def holds(p: Product) -> bool:
        word = getattr(p, fact)
        if which == "the last product":
            return same[-1] == word
        return same.count(word) >= least[which]

    return Claim(f"it has the {kind} of {which} in the {where}", ("shelf",), holds)


def product_claim(rng: random.Random, scene: Scene) -> Claim:
    """Return a claim about the offer alone."""
    known = facts(one_of(rng, scene.offers))
    fact, other = some_of(rng, FACTS, 2)
    says = {
        "category": "it is a {}",
        "brand": "it is from {}",
        "color": "it is {}",
        "material": "it has some {}",
    }

    def has(p: Product, fact: str) -> bool:
        return getattr(p, fact) == known[fact]

    if rng.random() < 0.3:
        return Claim(f"the text mentions {known[fact]}", (), lambda p: has(p, fact))
    if rng.random() < 0.3:
        words = f"{says[fact].format(known[fact])} and {says[other].format(known[other])}"
        return Claim(words, (), lambda p: has(p, fact) and has(p, other))
    return Claim(says[fact].format(known[fact]), (), lambda p: has(p, fact))


def make_claim(rng: random.Random, scene: Scene) -> Claim:
    """Return a claim about the offer; one in four joins two.

    A claim about taste is never joined with another: that would be the rule by which the demo's
    users choose, which is left for train.py to find.
    """
    if rng.random() < 0.75:
        sorts = (profile_claim, taste_claim, shelf_claim, shelf_claim, product_claim)
        return one_of(rng, sorts)(rng, scene)
    sorts = [one_of(rng, (profile_claim, shelf_claim, product_claim)) for _ in range(2)]
    first, second = (sort(rng, scene) for sort in sorts)
    needs = first.needs + second.needs
    if rng.random() < 0.65:
        words = f"{first.words}, and {second.words}"
        return Claim(words, needs, lambda p: first.holds(p) and second.holds(p))
    words = f"{first.words}, or {second.words}"
    return Claim(words, needs, lambda p: first.holds(p) or second.holds(p))


# ---- Texts


def answer(truth: bool) -> str:
    """Return Yes or No."""
    return trsr.ANSWERS[not truth]


def balanced(rng: random.Random, options: list[tuple], n: int) -> list[tuple]:
    """Return up to n of options (..., truth), half of them true if there are enough, shuffled."""
    true = [o for o in some_of(rng, options, len(options)) if o[-1]]
    false = [o for o in some_of(rng, options, len(options)) if not o[-1]]
    half = [*true[: n // 2], *false[: n - n // 2]]
    return some_of(rng, half, len(half))


def turns(first: str, asked: list[tuple[str, str]], header: str) -> Text:
    """Return a conversation about the asked (text, answer) pairs.

    first: the prompt, with a `|` for the text. Later turns repeat only the header and the text.
    """
    beginning, end = first.split("|")
    starts = [beginning, *[f"\n\n[{header}]\n"] * (len(asked) - 1)]
    return [(start + text + end, said) for start, (text, said) in zip(starts, asked, strict=True)]


def offers_text(
    rng: random.Random, shop: Shop, brief: bool, make: Callable[..., Claim] = make_claim
) -> Text:
    """Return one question about several offers in turn; make: returns its claim."""
    scene = make_scene(rng, shop)
    claim = make(rng, scene)
    forms = (
        "Is it true that {}? Answer 'Yes' or 'No'.",
        "Tell 'Yes' or 'No': {}.",
        "{}? Yes or No.",
        "Decide whether {}. Answer 'Yes' or 'No'.",
        "Read the texts and check that {}.",
    )
    ask, header = one_of(rng, forms).format(claim.words), scene.names[2]
    sections = *scene.sections(rng, claim.needs, brief), (header, "|")
    first = trsr.plain_turn(trsr.build_prompt(ask, *sections))
    options = [(offer, claim.holds(offer)) for offer in dict.fromkeys(scene.offers)]
    chosen = balanced(rng, options, 8 if brief else 4)
    return turns(first, [(text_of(offer, brief), answer(truth)) for offer, truth in chosen], header)


def claims_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return several questions about one offer; two of them are open."""
    scene = make_scene(rng, shop)
    offer, (who, where, header) = scene.offers[0], map(str.lower, scene.names)
    made = [make_claim(rng, scene) for _ in range(2 * QUESTIONS)]
    drawn = {claim.words: claim.holds(offer) for claim in made}
    claims = balanced(rng, list(drawn.items()), QUESTIONS)
    asked = [(f"Is it true that {words}?", answer(truth)) for words, truth in claims]

    shared = [word for fact, word in facts(offer).items() if word in scene.liked[fact]]
    asked.append((f"What of it does the {who} like?", " ".join(shared) or "nothing"))
    same = [str(i) for i, p in enumerate(scene.shelf, 1) if p.category == offer.category]
    asked.append((f"Which in the {where} are of its kind?", " ".join(same) or "none"))
    sections = scene.sections(rng, ("profile", "shelf"), brief)
    sections += [(scene.names[2], text_of(offer, brief)), ("Question", "|")]
    ask = f"Answer the question about the {header}."
    first = trsr.plain_turn(trsr.build_prompt(ask, *sections))
    return turns(first, some_of(rng, asked, len(asked)), "Question")


def description_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a product to describe, or two descriptions of which one fits a title."""
    product, *others = (one_of(rng, shop.shelves[(one_of(rng, CATEGORIES),)]) for _ in range(3))
    if rng.random() < 0.4:
        known = {name: value for name, value in product.attributes.items() if name != "Description"}
        section = "Product", trsr.item_text(known, DOMAIN)
        ask = "Describe this product in a few sentences."
        prompt = trsr.plain_turn(trsr.build_prompt(ask, section))
        return [(prompt, product.attributes["Description"])]
    ask = "Does the description fit the product? Answer 'Yes' or 'No'."
    sections = [("Product", f"Title: {product.attributes['Title']}"), ("Description", "|")]
    pairs = some_of(rng, [(product, "Yes"), (one_of(rng, others), "No")], 2)
    asked = [(p.attributes["Description"], said) for p, said in pairs]
    first = trsr.plain_turn(trsr.build_prompt(ask, *sections))
    return turns(first, asked, "Description")
