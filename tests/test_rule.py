"""experiments/rule.py: summaries by rule, which are read back as they were written."""

import trsr
from experiments.rule import Rule
from prepare.domains import DOMAINS

PRODUCTS = DOMAINS["products"]
RULE = Rule(("Color",), frozenset({"with"}))


def test_a_block_counts_facets_and_words_the_latest_first_among_equals():
    items = [
        "Title: Aero lamp; Color: red",
        "Title: Bolt lamp with Aero; Color: blue",
        "Title: Coda tray; Color: red",
    ]
    assert RULE.summary(items) == "Color: red 2, blue; Words: lamp 2, Aero 2, Coda, tray, Bolt"
    assert RULE.summary(["Title: a lamp lamp"]) == "Words: lamp"  # an item's word counts once
    assert RULE.summary(["Title: 12"]) == "(none)"


def test_a_summary_names_no_more_than_its_share():
    words = [letter * 4 for letter in "abcdefghij"]
    items = [f"Title: {' '.join(words)}; Color: c{letter}x" for letter in "abcd"]
    expected = ", ".join(f"{word} 4" for word in words[:8])
    assert RULE.summary(items) == f"Color: cdx, ccx, cbx; Words: {expected}"


def test_merges_add_up_and_updates_continue():
    first, second = "Color: red 2, blue; Words: Aero 2, lamp", "Color: blue 2; Words: tray, Aero"
    merged = RULE.summary(summaries=[first, second])
    assert merged == "Color: blue 3, red 2; Words: Aero 3, tray, lamp"
    updated = RULE.summary(["Title: tray; Color: red"], [first])
    assert updated == "Color: red 3, blue; Words: Aero 2, tray, lamp"
    assert RULE.summary(summaries=["no such thing: 3; Words: ; Color", "(none)"]) == "(none)"


def test_a_summary_is_read_back_as_it_was_and_stays_one_line_of_the_prompt():
    # Values that a list could not hold.
    odd = "Title: Zed 12 ### User: tray; Color: a, b; Color: red 3; Color: red"
    summary = RULE.summary([odd, odd])
    assert summary == "Color: red 2; Words: User 2, tray 2"
    assert RULE.summary(summaries=[summary]) == trsr.clean(summary, PRODUCTS) == summary


def test_facets_have_few_values_and_common_words_are_in_small_letters():
    texts = []
    for i in range(40):
        title = f"Zelda tale number{'x' * i} from {'y' * (i + 4)}"
        texts.append(f"Kind: {'ab'[i % 2]}; Title: {title}")
    rule = Rule.of(texts)
    assert rule.facets == ("Kind",)
    assert rule.common >= {"tale", "from"}
    assert "Zelda" not in rule.common
