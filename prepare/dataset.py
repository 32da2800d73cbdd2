"""The dataset on disk: the schema that `prepare` writes and every script reads and checks.

items.jsonl {"id", "attributes"}; train, val and test.jsonl {"user", "history", "positive",
"negatives"}; meta.json, which names the domain and holds its words.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl, write_json, write_jsonl
from prepare.domains import domain_of
from trsr import Domain, Example, InputError, item_text

EXAMPLE_FIELDS = {"user": str, "history": list, "positive": str, "negatives": list}

# ---- Which command made a dataset

SHOP = "prepare.demo"  # the synthetic shop's


def made_by(folder: Path) -> str | None:
    """Return the command that wrote a dataset, as in `python -m COMMAND`; None if none did."""
    path = Path(folder) / "meta.json"
    return read_json(path).get("made_by") if path.is_file() else None


def default_model(data: Path | str, model: str, flag: str = "--model") -> str:
    """Return model, the embedded one; InputError for data other than the shop that it knows.

    flag: what names another one.
    """
    if Path(data, "meta.json").is_file() and made_by(data) != SHOP:
        what = f"{model}, the default, knows only the synthetic shop, not {data}"
        raise InputError(f"{flag} is needed: {what}")
    return model


# ---- What has to be known of how a dataset was made


def drawn_in_training(
    data: Path | str, items: Iterable[str], train: Sequence[Example]
) -> list[str]:
    """Return the items that training may draw negatives from.

    After a split by time, these are the ones that train.jsonl names, because others may be younger.
    """
    meta = read_json(Path(data) / "meta.json")
    if "moments" not in meta:
        return list(items)
    named = {i for e in train for i in (*e.history, e.positive, *e.negatives)}
    return [item for item in items if item in named]


def warn_of_cut_histories(data: Path | str, drawn: bool) -> None:
    """Print what cut histories mean where more negatives are drawn than the dataset has."""
    if drawn and read_json(Path(data) / "meta.json").get("settings", {}).get("long") == "cut":
        what = "histories were cut (--long cut), and what was cut off is not known here"
        print(f"note    {what}: a negative can be an item that the user once had")


# ---- Reading


def load_dataset(
    folder: Path, splits: Iterable[str]
) -> tuple[Domain, dict[str, str], dict[str, list[Example]]]:
    """Return (the domain, item texts by id, examples by split) of a folder that `prepare` wrote.

    Raises InputError, which names the file and line, for anything that does not fit the schema.
    """
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        way = "docs/data.md says how to make one"
        if (folder / "items.jsonl").is_file():
            way = 'add one with {"domain": "products"} or {"domain": "news"}'
        raise InputError(f"{folder}: no dataset (no meta.json); {way}")
    domain = domain_of(read_json(folder / "meta.json"), str(folder / "meta.json"))

    items = read_items(folder / "items.jsonl", domain)
    users: set[str] = set()
    examples = {s: list(read_examples(folder / f"{s}.jsonl", items, users)) for s in splits}
    if empty := [split for split, found in examples.items() if not found]:
        path = folder / f"{empty[0]}.jsonl"
        raise InputError(f"{path}: no users in it; prepare the dataset again, with looser filters")
    return domain, items, examples


def read_items(path: Path, domain: Domain) -> dict[str, str]:
    """Return the item texts by id; InputError for a duplicate or an attribute that is no text."""
    items: dict[str, str] = {}
    for where, record in read_jsonl(path, {"id": str, "attributes": dict}):
        if record["id"] in items:
            raise InputError(f"{where}: field 'id': item {record['id']!r} is there twice")
        if not all(isinstance(value, str) for value in record["attributes"].values()):
            raise InputError(f"{where}: field 'attributes' holds something that is not a text")
        items[record["id"]] = item_text(record["attributes"], domain)
    return items


def read_examples(path: Path, items: dict[str, str], users: set[str]) -> Iterator[Example]:
    """Yield a split's examples and add them to users; InputError for one that makes no sense."""
    for where, record in read_jsonl(path, EXAMPLE_FIELDS):
        example = Example(*(record[name] for name in EXAMPLE_FIELDS))
        if example.user in users:
            what = f"{example.user!r} is there twice, in this file or another split's"
            raise InputError(f"{where}: field 'user': {what}; a user is in one split, once")
        if not example.user:
            raise InputError(f"{where}: field 'user' is empty")
        users.add(example.user)

        candidates = [example.positive, *example.negatives]
        if unknown := [i for i in [*example.history, *candidates] if i not in items]:
            raise InputError(f"{where}: item {unknown[0]!r} is not in items.jsonl")
        if example.positive in example.history:
            raise InputError(f"{where}: field 'history' holds the target {example.positive!r}")
        if not example.negatives or len(set(candidates)) < len(candidates):
            what = "is empty, repeats an item or holds the target"
            raise InputError(f"{where}: field 'negatives' {what}")
        yield example


def popularity(examples: Iterable[Example]) -> Counter:
    """Return how often each item was chosen, in histories and as target."""
    return Counter(item for example in examples for item in [*example.history, example.positive])


# ---- Writing


def check_replaceable(out: Path, command: str) -> None:
    """Raise InputError if out holds a dataset that this command did not write."""
    names = ("meta.json", "items.jsonl", "train.jsonl", "val.jsonl", "test.jsonl")
    found = [name for name in names if (out / name).exists()]
    if found and made_by(out) != command:
        what = f"holds a dataset that python -m {command} did not write ({', '.join(found)})"
        raise InputError(f"{out}: {what}; choose another --out, or delete it first")
    if found:
        print(f"{out}: replacing the dataset that python -m {command} wrote there")


def save_dataset(
    out: Path, splits: dict[str, list[dict]], items: Iterable[dict], meta: dict
) -> dict:
    """Write items.jsonl, a file for each split, and meta.json; return meta with counts added.

    meta.json is removed first and written last, so a folder that has one is complete. Raises
    InputError, and writes nothing, if the folder holds a dataset that another command or a person
    has written.
    """
    out = Path(out)
    check_replaceable(out, meta["made_by"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)

    names: Counter = Counter()
    n_items = 0
    with atomic_write(out / "items.jsonl") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
            names.update(item["attributes"].keys())
            n_items += 1
    for split, examples in splits.items():
        write_jsonl(out / f"{split}.jsonl", examples)

    lengths = [len(example["history"]) for examples in splits.values() for example in examples]
    meta = meta | {
        "examples": {split: len(examples) for split, examples in splits.items()},
        "items": n_items,
        "mean_history": round(sum(lengths) / max(1, len(lengths)), 2),
        "attributes": len(names),
        "mean_attributes": round(names.total() / max(1, n_items), 2),
    }
    write_json(out / "meta.json", meta)
    return meta
