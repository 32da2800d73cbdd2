"""Show how a user's summary grows: the history's blocks, and what the model wrote about each.

python -m runfolder.show runs/demo                          # the run's first test user
python -m runfolder.show runs/demo --user S0-test-00007
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from files.jsonl import read_jsonl
from launch.command import Parser, run_main
from prepare.dataset import load_dataset
from state.settings import read_config
from state.summaries import FIELDS
from trsr import InputError, Node

WIDTH = 110


def steps(node: Node, depth: int = 0) -> Iterator[tuple[int, str, list[int], str]]:
    """Yield (depth, what was summarized, its items, summary) in the order they were written.

    The items are [first, last + 1], or [0, 0] for a merge of summaries.
    """
    for child in node.get("children", ()):
        yield from steps(child, depth + 1)
    if "previous" in node:
        yield from steps(node["previous"], depth)

    if "children" in node:
        yield depth, f"the {len(node['children'])} summaries together", [0, 0], node["summary"]
    else:
        first, end = node["items"]
        before = "the summary before and " if "previous" in node else ""
        yield depth, f"{before}items {first + 1} to {end}", node["items"], node["summary"]


def records_of(run: Path) -> dict[str, dict]:
    """Return the run's summaries by user; InputError if there are none."""
    path = run / "summaries.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no summaries; first run python summarize.py --run {run}")
    return {record["user"]: record for _, record in read_jsonl(path, FIELDS)}


def show(history: list[str], tree: Node) -> None:
    """Print a user's blocks and summaries."""
    for depth, what, span, summary in steps(tree):
        margin = "  " * depth
        print(f"\n{margin}{what}")
        for number in range(*span):
            line = f"{margin}  {number + 1:>2}. {history[number]}"
            print(line if len(line) <= WIDTH else line[: WIDTH - 4] + " ...")
        indent = {"initial_indent": f"{margin}  -> ", "subsequent_indent": f"{margin}     "}
        print(textwrap.fill(summary, WIDTH, **indent))


def main() -> None:
    """Print one user's blocks and summaries."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder, after summarize.py")
    parser.add_argument("--user", help="a user of the dataset (unset: the first of test.jsonl)")
    args = parser.parse_args()

    records, data = records_of(args.run), read_config(args.run)["summarize"]["data"]
    _, items, splits = load_dataset(data, ("train", "val", "test"))
    examples = [*splits["test"], *splits["val"], *splits["train"]]
    histories = {example.user: example.history for example in examples}
    user = args.user or examples[0].user
    if user not in histories:
        raise InputError(f"{data}: no user {user!r}; train, val and test.jsonl name the users")
    if user not in records:
        what = f"no summary of user {user!r}; {args.run}/summaries.jsonl names those who have one"
        raise InputError(f"{args.run}: {what}")
    history = [items[i] for i in histories[user]]
    print(f"{args.run}: {user}, {len(history)} items, {records[user]['paradigm']}")
    show(history, records[user]["tree"])


if __name__ == "__main__":
    run_main(main)
