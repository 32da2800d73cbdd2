"""Summaries by rule, of what stands in the prompt alone: what experiments.base learns to write.

    Category: news 3, sports 2; SubCategory: newsus 2, football_nfl 2, newsworld; Words: Browns 2, Nasa, shuttle

Facets are attributes of few different values, such as MIND's Category. Each stands with its most frequent values and
how many items have them, the latest first among equals; then the words of all other attributes, in the same order. A
summary of summaries adds the counts up, so it is made of the same words as its parts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VALUES, WORDS = 3, 8  # of a facet, and of the other words, that a summary names at most
COMMON = 200  # words too frequent to tell anything, at most; never more than a twentieth of all
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
    """What a dataset's summaries count: its facets, and which words say too little."""

    facets: tuple[str, ...]
    common: frozenset[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Rule":
        """Return the rule for items with these texts.

        A facet is an attribute that half of the items have, with a tenth as many different values at most. Common are
        the other attributes' most frequent words in small letters, which are seldom names.
        """
        values: dict[str, list[str]] = {}
        for text in texts:
            for name, value in dict(attributes_of(text)).items():
                values.setdefault(name, []).append(value)
        few = (
            n
            for n, v in values.items()
            if n and len(v) >= len(texts) / 2 and len(set(v)) <= len(texts) / 10
        )
        rule = cls(tuple(few), frozenset())
        words = Counter(
            word for text in texts for word in rule.facts(text)["Words"] if word.islower()
        )
        most = words.most_common(min(COMMON, len(words) // 20))
        return cls(rule.facets, frozenset(word for word, _ in most))

    def facts(self, text: str) -> Facts:
        """Return what an item's text tells."""
        found: Facts = {name: {} for name in (*self.facets, "Words")}
        for name, value in attributes_of(text):
            if name in self.facets:
                found[name] |= {value: 1} if _VALUE.fullmatch(value) else {}
            else:
                found["Words"] |= {
                    word: 1 for word in _WORD.findall(value) if word.lower() not in self.common
                }
        return found

    def read(self, summary: str) -> Facts:
        """Return what a summary tells; what does not look like one by this rule is passed over."""
        found: Facts = {name: {} for name in (*self.facets, "Words")}
        for name, listed in attributes_of(summary):
            for entry in listed.split(", ") if name in found else ():
                if match := _ENTRY.fullmatch(entry):
                    found[name][match[1]] = int(match[2] or 1)
        return found

    def summary(self, items: Sequence[str] = (), summaries: Sequence[str] = ()) -> str:
        """Return the summary of earlier summaries and of the items that came since, both oldest first."""
        parts = [self.read(text) for text in summaries] + [self.facts(text) for text in items]
        lists = []
        for name in (*self.facets, "Words"):
            counts = ranked([part[name] for part in parts])[
                : VALUES if name in self.facets else WORDS
            ]
            entries = [f"{value} {n}" if n > 1 else value for value, n in counts]
            lists += [f"{name}: {', '.join(entries)}"] if entries else []
        return "; ".join(lists) or NOTHING


def ranked(parts: Sequence[dict[str, int]]) -> list[tuple[str, int]]:
    """Return the values and their sums over parts, the greatest first; of equals the latest part's, in its order."""
    counts: Counter = Counter()
    places = {}
    for i, part in enumerate(parts):
        for j, (value, n) in enumerate(part.items()):
            counts[value] += n
            places[value] = -i, j
    return sorted(counts.items(), key=lambda pair: (-pair[1], places[pair[0]]))
