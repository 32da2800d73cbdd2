"""A dataset of this project as RecBole's atomic files, with the candidates to score beside them.

    python -m prepare.to_recbole --data data/games --out recbole/games

Writes NAME.train.inter, NAME.valid.inter and NAME.test.inter (one session per line: its items,
oldest first, and the next item), NAME.item (ids and texts) and NAME.candidates.jsonl. The last has
the items to score for each validation and test user. With a list of scores added to each line, it
is what evaluate.py --scores reads. In RecBole, set benchmark_filename: [train, valid, test]. A file
to_recbole.json says that the folder may be replaced; one that holds other files is refused.
"""

from argparse import SUPPRESS
from dataclasses import dataclass
from pathlib import Path

from files.atomic import atomic_write
from files.folders import check_out
from files.jsonl import write_json, write_jsonl
from launch.command import option, parse_settings, run_main
from prepare.dataset import load_dataset
from trsr import Example, InputError, shuffled_candidates

SPLITS = {"train": "train", "val": "valid", "test": "test"}  # ours and RecBole's
COMMAND, ORIGIN = "prepare.to_recbole", "to_recbole.json"


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: Path = option(SUPPRESS, "dataset folder made by prepare", Path, required=True)
    out: Path = option(SUPPRESS, "folder for RecBole's files; it names them", Path, required=True)


def check_ids(splits: dict[str, list[Example]]) -> None:
    """Raise InputError for an id that RecBole's files cannot hold: they separate by white space."""
    for examples in splits.values():
        for example in examples:
            items = [*example.history, example.positive, *example.negatives]
            if bad := [i for i in items if i.split() != [i]]:
                what = "has white space in it, or nothing else; RecBole's lists cannot hold it"
                raise InputError(f"item {bad[0]!r} of user {example.user!r}: the id {what}")
            if set(example.user) & set("\t\r\n"):
                what = "has a tab or line break in it; RecBole's files cannot hold it"
                raise InputError(f"user {example.user!r}: the id {what}")


def write_sessions(path: Path, examples: list[Example]) -> None:
    """Write a split's .inter file."""
    with atomic_write(path) as file:
        file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
        for example in examples:
            file.write(f"{example.user}\t{' '.join(example.history)}\t{example.positive}\n")


def write_items(path: Path, items: dict[str, str]) -> None:
    """Write the .item file."""
    with atomic_write(path) as file:
        file.write("item_id:token\ttext:token_seq\n")
        file.writelines(f"{item}\t{text}\n" for item, text in items.items())


def main() -> None:
    """Write the files."""
    settings = parse_settings(Settings, __doc__)
    out = settings.out
    _, items, splits = load_dataset(settings.data, SPLITS)
    check_ids(splits)
    names = [f"{out.name}.{theirs}.inter" for theirs in SPLITS.values()]
    names += [f"{out.name}.item", f"{out.name}.candidates.jsonl"]
    check_out(out, COMMAND, ORIGIN, set(names), "files")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / ORIGIN, {"made_by": COMMAND, "data": str(settings.data), "files": names})
    for split, theirs in SPLITS.items():
        write_sessions(out / f"{out.name}.{theirs}.inter", splits[split])
    write_items(out / f"{out.name}.item", items)

    lines = []
    for split in ("val", "test"):
        for example in splits[split]:
            line = {"split": split, "user": example.user}
            lines.append(line | {"candidates": shuffled_candidates(example)})
    write_jsonl(out / f"{out.name}.candidates.jsonl", lines)
    users = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    print(f"wrote   {out}: {users} users, {len(items)} items")


if __name__ == "__main__":
    run_main(main)
