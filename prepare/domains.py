"""Domains: the words of the prompts about one kind of item. They are data, not code.

Those of the project are files in prepare/words/; anybody can write another one. A dataset carries
the words of its domain in its meta.json.
"""

import json
import re
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import trsr
from files.jsonl import unique
from launch.command import option
from trsr import Domain, InputError

WORDS = Path(__file__).parent / "words"
HEADERS = ("history", "recent")  # the fields that stand in brackets above a list

# ---- Reading and checking


def read_domain(path: Path) -> Domain:
    """Return the domain whose words are in a JSON file; InputError that names a bad field."""
    try:
        words = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except ValueError as error:  # of unique
        raise InputError(f"{path}: {error}") from None
    return make_domain(words, str(path))


def make_domain(words: object, where: str) -> Domain:
    """Return the domain of these words by field; InputError, which starts with where, if bad."""
    names = [field.name for field in fields(Domain)]
    if not isinstance(words, dict):
        raise InputError(f"{where}: no object with the fields {', '.join(names)}")
    if missing := [name for name in names if name not in words]:
        way = "python -m prepare.table --print-domain shows them all"
        raise InputError(f"{where}: field {missing[0]!r} is missing; {way}")
    if unknown := [name for name in words if name not in names]:
        raise InputError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(names)}")
    for name, text in words.items():
        if not isinstance(text, str):
            what = f"is a {type(text).__name__}, expected a text"
            raise InputError(f"{where}: field {name!r} {what}")

    domain = Domain(**words)
    for name in names:
        if fault := fault_of(name, domain):
            raise InputError(f"{where}: field {name!r} {fault}")
    return domain


def fault_of(name: str, domain: Domain) -> str | None:
    """Return what is wrong with the text in a domain's field, if anything."""
    text = getattr(domain, name)
    if not text.strip():
        return "is empty"
    if re.search("[\ud800-\udfff]", text):
        return "holds half of a character (\\ud800 to \\udfff)"
    if name in HEADERS and ("[" in text or "]" in text):
        return f"is {text!r}; a header has no brackets, the prompts put it in brackets"
    if name in HEADERS and text.strip().lower() in map(str.lower, trsr.HEADERS):
        return f"is {text!r}, a header that all prompts have already; choose another one"

    # What cleaning would change could pass for the structure of a prompt.
    if (cleaned := trsr.clean(text, domain)) != text:
        pairs = enumerate(zip(text, cleaned, strict=False))
        at = next((n for n, (old, new) in pairs if old != new), len(cleaned))
        what = "must be one line, without blanks at its ends, two blanks in a row, ###, headers in"
        return f"{what} brackets or control tokens; look at {text[max(0, at - 12) : at + 12]!r}"
    return None


DOMAINS = {path.stem: read_domain(path) for path in sorted(WORDS.glob("*.json"), reverse=True)}


# ---- Naming a domain


def find_domain(text: str) -> tuple[str, Domain]:
    """Return (name, domain) of what --domain says: a name of the project's, or a JSON file.

    A file's domain is named like the file, without .json. Raises InputError for anything else, and
    for a file with the name of one of the project's domains and other words.
    """
    if text in DOMAINS:
        return text, DOMAINS[text]
    path = Path(text)
    if not path.is_file():
        known = " nor ".join(DOMAINS)
        way = "python -m prepare.table --print-domain writes a file to edit"
        raise InputError(f"--domain {text}: neither {known} nor a JSON file; {way}")
    name, domain = path.stem, read_domain(path)
    if DOMAINS.get(name, domain) != domain:
        what = f"{name} is a domain of the project, with other words; rename the file"
        raise InputError(f"{path}: {what}")
    return name, domain


def domain_of(meta: dict, where: str) -> Domain:
    """Return the domain that a dataset's meta.json names: its own words, else the project's.

    Raises InputError, which starts with where, if the words are bad, or if a foreign domain has
    none.
    """
    name = meta.get("domain")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: field 'domain' is {name!r}, expected a name such as 'products'")
    if "words" in meta:
        return make_domain(meta["words"], f"{where}: field 'words'")
    if name not in DOMAINS:
        what = f"field 'domain' is {name!r}, expected one of {sorted(DOMAINS)}"
        way = "add the domain's own words as the field 'words'"
        raise InputError(f"{where}: {what}; or {way}")
    return DOMAINS[name]


def named(name: str, domain: Domain) -> dict:
    """Return what meta.json says of a domain: its name and its words."""
    return {"domain": name, "words": asdict(domain)}


# ---- Flags


def domain_option(default: object = SUPPRESS, **more):
    """Return the field that is the flag --domain; it is required unless there is a default."""
    if default is SUPPRESS:
        more["required"] = True
    known = ", ".join(DOMAINS)
    return option(default, f"what the items are: {known}, or a JSON file of a domain", **more)


class PrintDomain(Action):
    """Prints a domain's words as JSON, to be edited, and ends the command."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, name: str, option_string: str | None
    ) -> None:
        """Print the words of the domain called name."""
        if name not in DOMAINS:
            parser.error(f"--print-domain {name}: expected {' or '.join(DOMAINS)}")
        print(json.dumps(asdict(DOMAINS[name]), ensure_ascii=False, indent=2))
        parser.exit()


# ---- Words in prompts


def wording(
    paradigm: str, domain: Domain, show: Callable[[str], str] = trsr.plain_turn
) -> dict[str, str]:
    """Return every prompt with placeholders for the texts: what a run's results depend on.

    show: makes a message a prompt, in the form that the model reads.
    """
    room = trsr.Budget(1, lambda texts: [[] for _ in texts], Counter())
    question = trsr.recommendation_prompts(paradigm, domain, "SUMMARY", ["ITEM"], ["CANDIDATE"])
    messages = {
        "block": trsr.block_prompt(["ITEM"], domain, room),
        "merge": trsr.merge_prompt(["SUMMARY"], domain, room),
        "update": trsr.update_prompt("SUMMARY", ["ITEM"], domain, room),
        "recommend": question[0],
    }
    return {name: show(message) for name, message in messages.items()}
