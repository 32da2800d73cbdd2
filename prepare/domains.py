"""The domains that the project knows: their words, one file per domain in prepare/words/."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import trsr
from trsr import Domain

WORDS = Path(__file__).parent / "words"


def read_domain(path: Path) -> Domain:
    """Return the domain whose words are in a JSON file."""
    return Domain(**json.loads(path.read_text("utf-8")))


DOMAINS = {path.stem: read_domain(path) for path in sorted(WORDS.glob("*.json"), reverse=True)}


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
