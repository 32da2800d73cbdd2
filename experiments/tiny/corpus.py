"""The text that models/tiny learns from, generated from shops that the demo never uses.

A text is a prompt and its answer, or a conversation of several turns about the same things:

    summaries   the prompts of sections 4.1 and 4.2, as trsr.py builds them    summaries.py
    questions   mostly yes or no, about products, profiles and shelves         questions.py
    language    a product described from its attributes                        questions.py

The recommendation prompt is none of them: the model first meets it in train.py. A text depends only
on the seed and its number, and neither the shops nor the users here are those of prepare.demo.
"""

import random
from collections.abc import Iterator
from functools import cache

from experiments.tiny.questions import claims_text, description_text, offers_text
from experiments.tiny.summaries import Text, block_text, merge_text, update_text
from prepare.shop import Shop, make_shop, one_of

SHOPS = range(1001, 1009)  # seeds of the shops; the demo's is 0
ITEMS = 6000  # products per shop
SORTS = (  # of texts, with their shares
    (block_text, 4),
    (merge_text, 3),
    (update_text, 4),
    (offers_text, 8),
    (claims_text, 8),
    (description_text, 1),
)


@cache
def shop_of(seed: int) -> Shop:
    """Return the shop of a seed."""
    return make_shop(seed, ITEMS)


def texts(seed: int | str, brief: float = 0.0) -> Iterator[Text]:
    """Yield texts without end; brief: the share in which products have only a few attributes."""
    rng = random.Random(f"tiny text {seed}")
    sorts = [sort for sort, share in SORTS for _ in range(share)]
    while True:
        make, shop = one_of(rng, sorts), shop_of(one_of(rng, SHOPS))
        yield make(rng, shop, rng.random() < brief)
