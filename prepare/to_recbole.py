"""A dataset of this project as RecBole's atomic files, with the frozen candidates beside them.

    python -m prepare.to_recbole --data data/games --out recbole/games

Writes NAME.train.inter, NAME.valid.inter and NAME.test.inter (a session a line: its items oldest first, and the next),
NAME.item (id and text), and NAME.candidates.jsonl: for each validation and test user the items to score, in the form
that evaluate.py --scores reads once a list of scores is added. In RecBole: benchmark_filename: [train, valid, test].
"""

import argparse
import json
from pathlib import Path

from files.atomic import atomic_write
from launch.command import run_main
from prepare.dataset import load_dataset
from trsr import shuffled_candidates

SPLITS = {"train": "train", "val": "valid", "test": "test"}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    _, items, splits = load_dataset(args.data, SPLITS)
    name = args.out.name
    args.out.mkdir(parents=True, exist_ok=True)
    for split, theirs in SPLITS.items():
        with atomic_write(args.out / f"{name}.{theirs}.inter") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for example in splits[split]:
                file.write(f"{example.user}\t{' '.join(example.history)}\t{example.positive}\n")
    with atomic_write(args.out / f"{name}.item") as file:
        file.write("item_id:token\ttext:token_seq\n")
        file.writelines(f"{item}\t{text}\n" for item, text in items.items())
    with atomic_write(args.out / f"{name}.candidates.jsonl") as file:
        for split in ("val", "test"):
            for example in splits[split]:
                line = {
                    "split": split,
                    "user": example.user,
                    "candidates": shuffled_candidates(example),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(
        f"wrote   {args.out}: {', '.join(f'{len(splits[s])} {s}' for s in SPLITS)} users, {len(items)} items"
    )


if __name__ == "__main__":
    run_main(main)
