"""prepare/shop.py: texts that tell the truth, and users who follow the rule."""

import random
import re
from collections import Counter

import pytest

from prepare.shop import (
    BRANDS,
    CATEGORIES,
    COLORS,
    LINES,
    MATERIALS,
    RECENT,
    make_shop,
    make_user,
)


@pytest.fixture(scope="module")
def shop():
    return make_shop(0, 6000)


# ---- The texts


def test_texts_do_not_repeat_and_have_the_length_meant(shop):
    every = [product.attributes for product in shop.products.values()]
    for name in ("Title", "Description"):
        assert len({attributes[name] for attributes in every}) == 6000
    texts = [" ".join(f"{name} {text}" for name, text in a.items()) for a in every]
    lengths = [len(text.split()) for text in texts]
    assert 40 <= min(lengths) <= max(lengths) <= 75
    # Many sentence forms, not one: even with all facts blotted out, no form makes up a hundredth
    # of the shop.
    blot = re.compile("|".join([*BRANDS, *COLORS, *MATERIALS, *CATEGORIES, *LINES, r"\d+"]))
    forms = Counter(blot.sub("_", attributes["Description"]) for attributes in every)
    assert forms.most_common(1)[0][1] < 60


def test_texts_name_the_facts_and_no_others(shop):
    values = {"category": CATEGORIES, "brand": BRANDS, "color": COLORS, "material": MATERIALS}
    distinct = {value for options in values.values() for value in options}
    assert len(distinct) == sum(map(len, values.values())) == 48
    for product in shop.products.values():
        title = set(re.findall(r"\w+", product.attributes["Title"]))
        everything = set(re.findall(r"[\w-]+", " ".join(product.attributes.values())))
        for name, options in values.items():
            fact = getattr(product, name)
            assert fact in title
            assert everything & set(options) == {fact}


# ---- The rule


def test_users_follow_the_rule(shop):
    long_fit, recent_fit = [], []
    for number in range(300):
        user = make_user(random.Random(f"rule {number}"), shop, 20)
        taste, before, recent = user.taste, user.history[:-RECENT], user.history[-RECENT:]
        assert user.need not in taste.categories
        assert user.target.category == user.need
        assert taste.matches(user.target) >= 2
        assert {product.category for product in recent} == {user.need}
        long_fit += [taste.matches(p) >= 2 and p.category in taste.categories for p in before]
        recent_fit += [taste.matches(product) for product in recent]
        kinds = Counter((p.category == user.need, taste.matches(p) >= 2) for p in user.negatives)
        assert kinds == {(True, False): 7, (False, True): 7, (False, False): 6}
    assert sum(long_fit) / len(long_fit) == pytest.approx(0.90, abs=0.02)
    # The last purchases ignore the taste: 2 of 16 brands, 1 of 10 colors, 1 of 10 materials.
    chance = 2 / 16 + 1 / 10 + 1 / 10
    assert sum(recent_fit) / len(recent_fit) == pytest.approx(chance, abs=0.06)
