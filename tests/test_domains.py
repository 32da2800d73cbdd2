"""prepare/domains.py: the words of each domain, and all prompts with placeholders."""

import pytest

import trsr
from prepare.domains import DOMAINS, wording


@pytest.mark.parametrize("name", DOMAINS)
def test_the_wording_is_every_prompt_with_placeholders(name):
    domain = DOMAINS[name]
    words = wording("hierarchical", domain)

    def prompt(*parts):
        return trsr.plain_turn(trsr.build_prompt(*parts))

    assert words["block"] == prompt(domain.summarize, (domain.history, "1. ITEM"))
    assert words["merge"] == prompt(domain.merge, (trsr.MERGED, "1. SUMMARY"))
    previous, recent = ("Previous Preference Summary", "SUMMARY"), (domain.recent, "1. ITEM")
    assert words["update"] == prompt(domain.update, previous, recent)
    assert domain.recommend in words["recommend"]
    sections = "[Preference Summary]\nSUMMARY\n\n[Historical Items]\n1. ITEM\n\n"
    assert f"{sections}[Next Item]\nCANDIDATE\n\n### Assistant:\n" in words["recommend"]
    other = wording("hierarchical", domain, show=lambda message: f"<{message}>")
    assert {trsr.plain_turn(text[1:-1]) for text in other.values()} == set(words.values())


def test_the_domains_are_those_of_the_paper():
    assert set(DOMAINS) == {"products", "news"}
