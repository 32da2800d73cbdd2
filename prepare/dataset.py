"""The dataset on disk: reading the schema that every `prepare` module writes, and checking it line by line."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from trsr import DOMAINS, Domain, Example, InputError, item_text, read_json, read_jsonl


def load_dataset(folder: Path, splits: Iterable[str]) -> tuple[Domain, dict[str, str], dict[str, list[Example]]]:
    """Return (the domain, item texts by id, examples by split) of a folder that `prepare` wrote."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise InputError(f"{folder}: no dataset (no meta.json); make one with python -m prepare.demo --out {folder}")
    domain = read_json(folder / "meta.json").get("domain")
    if domain not in DOMAINS:
        raise InputError(f"{folder / 'meta.json'}: field 'domain' is {domain!r}, expected one of {sorted(DOMAINS)}")
    items: dict[str, str] = {}
    for where, record in read_jsonl(folder / "items.jsonl", {"id": str, "attributes": dict}):
        if record["id"] in items:
            raise InputError(f"{where}: field 'id': item {record['id']!r} is there twice")
        if not all(isinstance(value, str) for value in record["attributes"].values()):
            raise InputError(f"{where}: field 'attributes' holds something that is not a text")
        items[record["id"]] = item_text(record["attributes"])
    users: set[str] = set()
    examples = {split: list(_load_examples(folder / f"{split}.jsonl", items, users)) for split in splits}
    return DOMAINS[domain], items, examples


def _load_examples(path: Path, items: dict[str, str], users: set[str]) -> Iterator[Example]:
    for where, record in read_jsonl(path, {"user": str, "history": list, "positive": str, "negatives": list}):
        example = Example(record["user"], record["history"], record["positive"], record["negatives"])
        if example.user in users:
            raise InputError(f"{where}: field 'user': {example.user!r} is there twice")
        users.add(example.user)
        candidates = [example.positive, *example.negatives]
        if unknown := next((i for i in [*example.history, *candidates] if i not in items), None):
            raise InputError(f"{where}: item {unknown!r} is not in items.jsonl")
        if example.positive in example.history:
            raise InputError(f"{where}: field 'history' holds the target {example.positive!r}")
        if not example.negatives or len(set(candidates)) < len(candidates):
            raise InputError(f"{where}: field 'negatives' is empty, repeats an item or holds the target")
        yield example


def popularity(examples: Iterable[Example]) -> Counter:
    """Return how often each item was chosen, in histories and as target."""
    return Counter(item for example in examples for item in [*example.history, example.positive])
