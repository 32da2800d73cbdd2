"""Summaries by rule, made only of what the prompt shows: what experiments.base learns to write.

    Category: news 3, sports 2; SubCategory: newsus 2, football_nfl 2; Words: Browns 2, Nasa

Facets are attributes with few different values, such as MIND's Category. For each, a summary lists
the most frequent values and how many items have them; among equals, the latest come first.
The words of all other attributes follow in the same way. A summary of summaries adds up the counts,
so it uses the same words as its parts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VALUES, WORDS = 3, 8  # most values of a facet, and most other words, in a summary
COMMON = 200  # most words that count as common; never more than a twentieth of all
NOTHING = "(none)"
Facts = dict[str, dict[str, int]]  # facet, or `Words` -> value -> how often

_WORD = re.compile(r"\b[^\W\d_]{4,}\b")
_VALUE = re.compile(r"[^,;:]*[^,;:\s\d]")  # what a summary can list and be read back from
_ENTRY = re.compile(r"(.+?)(?: (\d+))?")


def attributes_of(text: str) -> Iterable[tuple[str, str]]:
    """Yield the (name, value) pairs of an item's text."""
    for part in text.split("; "):
        name, colon, value = part.partition(": ")
        yield (name, value) if colon else ("", name)


@dataclass(frozen=True)
class Rule:
    """What a dataset's summaries count: its facets, and all words that are not common."""

    facets: tuple[str, ...]
    common: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Rule":
        """Return the rule for items with these texts.

        A facet is an attribute that at least half of the items have, with at most a tenth as many
        different values as there are items. Common words are the most frequent lower-case words of
        the other attributes: they are rarely names.
        """
        values: dict[str, list[str]] = {}
        for text in texts:
            for name, value in dict(attributes_of(text)).items():
                values.setdefault(name, []).append(value)
        frequent = {name: v for name, v in values.items() if name and len(v) >= len(texts) / 2}
        facets = tuple(n for n, v in frequent.items() if len(set(v)) <= len(texts) / 10)

        words: Counter = Counter()
        every_word = cls(facets, frozenset())
        for text in texts:
            words.update(word for word in every_word.facts(text)["Words"] if word.islower())
        most = words.most_common(min(COMMON, len(words) // 20))
        return cls(facets, frozenset(word for word, _ in most))

    @property
    def lists(self) -> tuple[str, ...]:
        """What a summary lists, in this order."""
        return *self.facets, "Words"

    def facts(self, text: str) -> Facts:
        """Return the facts in an item's text."""
        found: Facts = {name: {} for name in self.lists}
        for name, value in attributes_of(text):
            if name not in self.facets:
                words = [word for word in _WORD.findall(value) if word.lower() not in self.common]
                found["Words"] |= dict.fromkeys(words, 1)
            elif _VALUE.fullmatch(value):
                found[name][value] = 1
        return found

    def read(self, summary: str) -> Facts:
        """Return the facts in a summary; what does not follow the rule is skipped."""
        found: Facts = {name: {} for name in self.lists}
        for name, listed in attributes_of(summary):
            for entry in listed.split(", ") if name in found else ():
                if match := _ENTRY.fullmatch(entry):
                    found[name][match[1]] = int(match[2] or 1)
        return found

    def summary(self, items: Sequence[str] = (), summaries: Sequence[str] = ()) -> str:
        """Return the summary of earlier summaries and of later items, both oldest first."""
        parts = [self.read(text) for text in summaries] + [self.facts(text) for text in items]
        lists = []
        for name in self.lists:
            most = VALUES if name in self.facets else WORDS
            counts = ranked([part[name] for part in parts])[:most]
            if counts:
                entries = (f"{value} {n}" if n > 1 else value for value, n in counts)
                lists.append(f"{name}: {', '.join(entries)}")
        return "; ".join(lists) or NOTHING


def ranked(parts: Sequence[dict[str, int]]) -> list[tuple[str, int]]:
    """Return the values with their sums over parts, the greatest first.

    Of equal sums the latest part's values come first, in that part's order.
    """
    counts: Counter = Counter()
    places = {}
    for i, part in enumerate(parts):
        for j, (value, n) in enumerate(part.items()):
            counts[value] += n
            places[value] = -i, j
    return sorted(counts.items(), key=lambda pair: (-pair[1], places[pair[0]]))
