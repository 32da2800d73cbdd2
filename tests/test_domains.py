"""prepare/domains.py: the words of each domain, and all prompts with placeholders."""

import json
import sys
from dataclasses import asdict

import pytest

import trsr
from prepare import table
from prepare.domains import DOMAINS, domain_of, find_domain, wording
from trsr import InputError

WORDS = asdict(DOMAINS["products"])


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


# ---- Domains as files


def test_a_file_is_a_domain_of_its_own_name(tmp_path):
    path = tmp_path / "movies.json"
    path.write_text(json.dumps(WORDS | {"history": "Watched Films"}))
    name, domain = find_domain(str(path))
    assert (name, domain.history) == ("movies", "Watched Films")
    assert find_domain("news") == ("news", DOMAINS["news"])
    assert wording("none", domain) != wording("none", DOMAINS["products"])


def test_a_file_cannot_change_what_a_name_of_the_project_means(tmp_path):
    path = tmp_path / "news.json"
    path.write_text(json.dumps(asdict(DOMAINS["news"])))
    assert find_domain(str(path)) == ("news", DOMAINS["news"])
    path.write_text(json.dumps(WORDS))
    with pytest.raises(InputError, match=r"news\.json: news is a domain of the project, with oth"):
        find_domain(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"m\.json:1: not JSON"),
        (
            "[]",
            r"m\.json: no object with the fields history, recent, summarize, merge, update, rec",
        ),
        ('{"merge": "x", "merge": "y"}', r"m\.json: field 'merge' is there twice"),
        (WORDS | {"merge": ...}, r"m\.json: field 'merge' is missing; .*--print-domain shows them"),
        (WORDS | {"merge": 3}, r"m\.json: field 'merge' is a int, expected a text"),
        (WORDS | {"merge": " "}, r"m\.json: field 'merge' is empty"),
        (WORDS | {"histroy": "x"}, r"m\.json: unknown field 'histroy'; known are history, recent"),
        (
            WORDS | {"history": "[Films]"},
            r"field 'history' is '\[Films\]'; a header has no brackets",
        ),
        (WORDS | {"recent": "next item"}, r"field 'recent' is 'next item', a header that all prom"),
        (WORDS | {"recent": "a\nb"}, r"field 'recent' must be one line, .* look at 'a\\nb'"),
        (WORDS | {"update": "Read.\n\nWrite"}, r"field 'update' must be one line"),
        (WORDS | {"update": "Read. ### User"}, r"field 'update' must be one line"),
        (
            WORDS | {"update": "See [Next Item]."},
            r"field 'update' must .* look at 'See \[Next Item",
        ),
        (WORDS | {"update": "<|im_end|>"}, r"field 'update' must be one line"),
        (WORDS | {"update": "a "}, r"field 'update' must be one line"),
        (WORDS | {"update": "\ud800"}, r"field 'update' holds half of a character"),
    ],
)
def test_bad_words_are_named(tmp_path, text, message):
    if isinstance(text, dict):
        text = json.dumps({name: value for name, value in text.items() if value is not ...})
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        find_domain(str(tmp_path / "m.json"))
    assert "\n" not in str(error.value)


def test_what_is_no_text_is_named(tmp_path):
    (tmp_path / "m.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"m\.json: not UTF-8 text"):
        find_domain(str(tmp_path / "m.json"))


def test_a_dataset_tells_its_words_or_a_known_name():
    assert domain_of({"domain": "news"}, "meta.json") is DOMAINS["news"]
    words = WORDS | {"recommend": "Will it be watched?"}
    assert domain_of({"domain": "movies", "words": words}, "").recommend == "Will it be watched?"
    for meta, message in (
        ({"domain": "movies"}, r"m: field 'domain' is 'movies', expected one of .*'words'"),
        ({"domain": 3}, r"m: field 'domain' is 3, expected a name"),
        ({"words": words}, r"m: field 'domain' is None, expected a name"),
        ({"domain": "a", "words": {}}, r"m: field 'words': field 'history' is missing"),
        ({"domain": "a", "words": []}, r"m: field 'words': no object with the fields"),
    ):
        with pytest.raises(InputError, match=message):
            domain_of(meta, "m")


@pytest.mark.parametrize("name", DOMAINS)
def test_a_printed_domain_can_be_read_again(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["table", "--print-domain", name])
    with pytest.raises(SystemExit) as end:
        table.main()
    assert end.value.code == 0
    (tmp_path / "mine.json").write_text(capsys.readouterr().out)
    assert find_domain(str(tmp_path / "mine.json")) == ("mine", DOMAINS[name])
    monkeypatch.setattr(sys, "argv", ["table", "--print-domain", "films"])
    with pytest.raises(SystemExit):
        table.main()
    assert "--print-domain films: expected products or news" in capsys.readouterr().err
