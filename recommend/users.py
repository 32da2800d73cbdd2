"""Users from outside of the dataset, and items that came with their texts."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path

from batches.candidates import Others, read_lines
from files.jsonl import read_jsonl
from trsr import Domain, Example, InputError, content_hash, item_text

FIELDS = {"user", "history", "candidates"}
IGNORED = {"positive", "negatives"}  # so that a dataset's own users can be read
SHOWN = 100  # candidates that are encoded to see how much room they need


class Items:
    """The texts of the dataset's items, and of cold ones, which came with theirs."""

    def __init__(self, texts: dict[str, str], domain: Domain, source: Path | str):
        """source: where the texts are from, for messages."""
        self.texts, self.domain, self.source = dict(texts), domain, source
        self.catalogue = list(texts)

    def read(self, where: str, entries: object, once: bool = False) -> list[str]:
        """Return the ids of entries, and learn the texts of those that came with them.

        An entry is an id or {"id", "attributes"}. once: no item may be there twice. Raises
        InputError, which begins with `where`, for an item without a text, or with two.
        """
        if not isinstance(entries, list):
            raise InputError(f"{where} is a {type(entries).__name__}, expected a list of items")
        ids = [self._read_one(where, entry) for entry in entries]
        if once and len(set(ids)) < len(ids):
            twice = next(item for n, item in enumerate(ids) if item in ids[:n])
            raise InputError(f"{where}: item {twice!r} is there twice")
        return ids

    def _read_one(self, where: str, entry: object) -> str:
        known = isinstance(entry, dict) and entry.keys() <= {"id", "attributes"}
        item = entry.get("id") if known else entry
        if not isinstance(item, str):
            what = 'is neither an id in quotes nor {"id": ..., "attributes": {...}}'
            raise InputError(f"{where}: {repr(entry)[:80]} {what}")
        if not known or "attributes" not in entry:
            if item not in self.texts:
                what = f"is not in {self.source}; give it with its attributes"
                raise InputError(f"{where}: item {item!r} {what}")
            return item

        attributes = entry["attributes"]
        texts = isinstance(attributes, dict) and all(
            isinstance(value, str) for value in attributes.values()
        )
        if not texts or not any(value.strip() for value in attributes.values()):
            what = "'attributes' is no object with texts in it"
            raise InputError(f"{where}: item {item!r}: {what}")
        text = item_text(attributes, self.domain)
        if text == item_text({}, self.domain):
            raise InputError(f"{where}: item {item!r}: nothing is left of its text in a prompt")
        if self.texts.setdefault(item, text) != text:
            what = "has another text than before"
            raise InputError(f"{where}: item {item!r} {what} (here or in {self.source})")
        return item


@dataclass(frozen=True)
class User:
    """A user and what is to be ranked, as ids."""

    name: str
    history: list[str]  # oldest first
    candidates: Sequence[str]
    key: str  # a hash of the history's and the candidates' texts

    @property
    def example(self) -> Example:
        """The user as ranking takes one: it needs a positive, which here says nothing."""
        first = next(iter(self.candidates))
        others: Sequence[str]
        if isinstance(self.candidates, Others):  # a list that all users share stays one
            others = Others(self.candidates.items, Example("", self.history, first, []))
        else:
            others = self.candidates[1:]
        return Example(self.name, self.history, first, others)

    def shown(self, texts: dict[str, str]) -> Example:
        """Return the user with the longest candidates, for which a prompt has to leave room."""
        longest = nlargest(SHOWN, self.candidates, key=lambda item: len(texts[item]))
        return Example(self.name, self.history, longest[0], longest[1:])


@dataclass(frozen=True)
class Shared:
    """Candidates for all users who have none of their own; a user's history is left out."""

    items: list[str]
    key: str

    @classmethod
    def of(cls, ids: list[str], items: Items) -> "Shared":
        """Return the candidates with these ids."""
        return cls(ids, content_hash([[i, items.texts[i]] for i in ids]))

    def without(self, history: list[str]) -> Sequence[str]:
        """Return the candidates that are not in the history."""
        return Others(self.items, Example("", history, "", []))


def make_user(
    where: str, name: str, history: list[str], own: list[str] | None, shared: Shared | None, items
) -> User:
    """Return a user with candidates; InputError if there are none."""
    if own is None and shared is None:
        what = "is missing; add it, or --candidates FILE, or --catalogue"
        raise InputError(f"{where}: field 'candidates' {what}")
    candidates = shared.without(history) if own is None else own
    if not len(candidates):
        raise InputError(f"{where}: field 'candidates': no item to rank that is not in the history")
    ranked = shared.key if own is None else [[i, items.texts[i]] for i in own]
    key = content_hash([[items.texts[i] for i in history], history if own is None else [], ranked])
    return User(name, history, candidates, key)


def read_users(path: Path, items: Items, shared: Shared | None) -> list[User]:
    """Return the users of a file of lines {"user", "history", "candidates"}.

    Raises InputError, which names the line and the field, for what makes no sense.
    """
    users: dict[str, User] = {}
    for where, record in read_jsonl(path, {"user": str}):
        name = record["user"]
        if name in users:
            raise InputError(f"{where}: field 'user': {name!r} is there twice")
        if odd := sorted(record.keys() - FIELDS - IGNORED):
            raise InputError(f"{where}: field {odd[0]!r} is none of {', '.join(sorted(FIELDS))}")
        if "history" not in record:
            raise InputError(f"{where}: field 'history' is missing, expected a list of items")
        history = items.read(f"{where}: field 'history'", record["history"])
        own = None
        if "candidates" in record:
            field = f"{where}: field 'candidates'"
            own = items.read(field, record["candidates"], once=True)
        users[name] = make_user(where, name, history, own, shared, items)
    if not users:
        raise InputError(f"{path}: no users in it")
    return list(users.values())


def read_shared(path: Path, items: Items) -> Shared:
    """Return the candidates of a file: in each line an id, or an item with its attributes."""
    ids: dict[str, None] = {}
    for where, entry in read_lines(path):
        (item,) = items.read(where, [entry])
        if item in ids:
            raise InputError(f"{where}: item {item!r} is there twice")
        ids[item] = None
    if not ids:
        raise InputError(f"{path}: no candidates in it")
    return Shared.of(list(ids), items)


def parse_entries(words: Iterable[str]) -> list:
    """Return a command line's items: ids, or JSON objects with attributes."""
    entries = []
    for word in words:
        try:
            entries.append(json.loads(word) if word.lstrip().startswith("{") else word)
        except ValueError as error:
            raise InputError(f"--history: {word!r} is not JSON ({error})") from None
    return entries
