"""The domains that the project knows: their words, one file per domain in prepare/words/."""

import json
from pathlib import Path

from trsr import Domain

WORDS = Path(__file__).parent / "words"


def read_domain(path: Path) -> Domain:
    """Return the domain whose words are in a JSON file."""
    return Domain(**json.loads(path.read_text("utf-8")))


DOMAINS = {path.stem: read_domain(path) for path in sorted(WORDS.glob("*.json"), reverse=True)}
