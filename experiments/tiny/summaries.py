"""Summaries of imagined users' purchases, as training text: prompts, and answers by rule.

A summary first says what was bought, each word with a count (one, if no number follows), in
alphabetical order; then what stands out in that; then the latest product's category:

    Bought clock 4 lamp 5 tray watch 2, Alderon 4 Brisby 3 Quillon 2, black 8 red white 2, oak 7
    wool 2, likes clock lamp, Alderon Brisby, black, oak, now watch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import trsr
from prepare.domains import DOMAINS
from prepare.shop import (
    BRANDS,
    CATEGORIES,
    COLORS,
    MATERIALS,
    RECENT,
    Product,
    Shop,
    make_taste,
    one_of,
)

DOMAIN = DOMAINS["products"]
FACTS = ("category", "brand", "color", "material")
WORDS = dict(zip(FACTS, (CATEGORIES, BRANDS, COLORS, MATERIALS), strict=True))
LIKED = dict(zip(FACTS, (2, 2, 1, 1), strict=True))  # the most words of each fact after `likes`
BRIEF = ("Title", "Brand", "Color", "Material")  # the attributes that state the facts

Text = list[tuple[str, str]]  # turns: a prompt, which ends with the cue, and its answer


@cache
def text_of(product: Product, brief: bool = False) -> str:
    """Return the product's text as prompts show it; brief: only the BRIEF attributes."""
    shown = product.attributes.items()
    kept = {name: value for name, value in shown if not brief or name in BRIEF}
    return trsr.item_text(kept, DOMAIN)


def facts(product: Product) -> dict[str, str]:
    """Return the product's category, brand, color and material."""
    return {fact: getattr(product, fact) for fact in FACTS}


# ---- The rule


@dataclass(frozen=True)
class Memory:
    """What a summary holds: how often each fact's words occurred, and the latest category."""

    counts: dict[str, Counter]
    now: str

    @classmethod
    def of(cls, products: Sequence[Product]) -> "Memory":
        """Return what there is to remember of products, oldest first."""
        counts = {fact: Counter(getattr(p, fact) for p in products) for fact in FACTS}
        return cls(counts, products[-1].category)

    @classmethod
    def joined(cls, parts: Sequence["Memory"]) -> "Memory":
        """Return the sum of parts, oldest first.

        A word that occurred once is forgotten, unless it is in the latest part.
        """
        counts = {}
        for fact in FACTS:
            total = sum((part.counts[fact] for part in parts), Counter())
            latest = parts[-1].counts[fact]
            counts[fact] = Counter({w: n for w, n in total.items() if n > 1 or w in latest})
        return cls(counts, parts[-1].now)

    def liked(self) -> dict[str, list[str]]:
        """Return the words that stand out, by fact, at most as many as LIKED says.

        They occurred at least twice, and more often than all words that are left out. The latest
        category does not count.
        """
        liked = {}
        for fact, most in LIKED.items():
            words = self.counts[fact].most_common()
            ranked = [(w, n) for w, n in words if fact != "category" or w != self.now]
            bar = max(1, ranked[most][1] if len(ranked) > most else 0)
            liked[fact] = sorted(w for w, n in ranked[:most] if n > bar)
        return liked

    def __str__(self) -> str:
        bought = []
        for counts in self.counts.values():
            words = (w if n == 1 else f"{w} {n}" for w, n in sorted(counts.items()))
            bought.append(" ".join(words))
        liked = [" ".join(words) for words in self.liked().values() if words] or ["nothing yet"]
        return f"Bought {', '.join(bought)}, likes {', '.join(liked)}, now {self.now}."


# ---- Histories


def make_history(rng: random.Random, shop: Shop) -> list[Product]:
    """Return what an imagined user bought.

    Some are loyal to their taste and some are not; most have a new need at the end.
    """
    taste, length = make_taste(rng), 10 + int(rng.random() * 16)
    loyalty = one_of(rng, (0.5, 0.8, 0.9, 0.9))
    favorites = []
    for category in taste.categories:
        favorites += shop.fitting(category, taste)
    recent, need = one_of(rng, (0, RECENT, RECENT, RECENT)), one_of(rng, CATEGORIES)

    history = []
    for i in range(length):
        before_need = i < length - recent
        if before_need and favorites and rng.random() < loyalty:
            shelf = favorites
        else:
            category = one_of(rng, CATEGORIES) if before_need else need
            shelf = shop.shelves[(category,)]
        history.append(one_of(rng, shelf))
    return history


def some_blocks(rng: random.Random, shop: Shop) -> list[list[Product]]:
    """Return the blocks of a history that ends anywhere; most have five products."""
    history, size = make_history(rng, shop), one_of(rng, (5, 5, 5, 5, 5, 5, 2, 3, 4, 6, 8))
    bounds = trsr.split_blocks(1 + int(rng.random() * len(history)), size)
    return [history[start:end] for start, end in bounds]


# ---- Texts


def block_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a block to summarize, with its summary."""
    blocks = some_blocks(rng, shop)
    block = blocks[-1 if rng.random() < 0.5 else 0]
    texts = [text_of(product, brief) for product in block]
    prompt = trsr.block_prompt(texts, DOMAIN, _unlimited())
    return [(trsr.plain_turn(prompt), str(Memory.of(block)))]


def merge_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return several summaries of one user to merge, with the summary of all."""
    parts = [Memory.of(block) for block in several_blocks(rng, shop)]
    if len(parts) > 3 and rng.random() < 0.15:  # a merge of merges
        parts = [Memory.joined(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    summaries = [str(part) for part in parts]
    prompt = trsr.merge_prompt(summaries, DOMAIN, _unlimited())
    return [(trsr.plain_turn(prompt), str(Memory.joined(parts)))]


def update_text(rng: random.Random, shop: Shop, brief: bool) -> Text:
    """Return a summary to update with a block, with the updated summary."""
    first, *between, last = several_blocks(rng, shop)
    memory = Memory.of(first)
    for block in between:
        memory = Memory.joined([memory, Memory.of(block)])
    texts = [text_of(product, brief) for product in last]
    prompt = trsr.update_prompt(str(memory), texts, DOMAIN, _unlimited())
    return [(trsr.plain_turn(prompt), str(Memory.joined([memory, Memory.of(last)])))]


def several_blocks(rng: random.Random, shop: Shop) -> list[list[Product]]:
    """Return the blocks of a history that has at least two."""
    while len(blocks := some_blocks(rng, shop)) < 2:
        pass
    return blocks


def _unlimited() -> trsr.Budget:
    return trsr.Budget(1, lambda texts: [[] for _ in texts], Counter())
