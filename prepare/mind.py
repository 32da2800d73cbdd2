"""MIND, the news dataset of the paper (section 5.1), to the project's schema.

    python -m prepare.mind --raw MINDlarge_train --out data/mind
    python -m prepare.mind --raw MINDlarge_train --out data/mind-impressions --target impressions

The folder holds news.tsv and behaviors.tsv as published. By default a user's first row is taken as the authors take
it: the history's last article is the target, the impressions are not used. With --target impressions, the target is
the first article clicked in the impression, and the negatives were shown beside it and not clicked.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from launch.command import run_main
from prepare.common import Item, Session, Table, attributes, prepare, script_parser
from trsr import InputError

NEWS = (
    "id",
    "category",
    "subcategory",
    "title",
    "abstract",
    "url",
    "title entities",
    "abstract entities",
)
BEHAVIORS = ("impression id", "user", "time", "history", "impressions")
ATTRIBUTES = {
    "Category": "category",
    "SubCategory": "subcategory",
    "Title": "title",
    "Abstract": "abstract",
}
NO_CLICK, TOO_FEW = "rows without a click", "rows with too few shown and unclicked"


def read_news(table: Table) -> Iterator[Item]:
    """Yield the articles."""
    for where, row in table:
        yield (
            where,
            row["id"],
            attributes((name, row[column]) for name, column in ATTRIBUTES.items()),
        )


def read_behaviors(table: Table, target: str, dropped: Counter) -> Iterator[Session]:
    """Yield the rows as sessions; with target `impressions`, those with a click, else the impressions go unread."""
    for where, row in table:
        history, clicked, shown = row["history"].split(), None, None
        if target == "impressions":
            clicks, shown = split_impressions(row["impressions"], where)
            if not clicks:
                dropped[NO_CLICK] += 1
                continue
            clicked, shown = clicks[0], [item for item in shown if item not in clicks]
        yield Session([where], row["user"], history, clicked, shown)


def split_impressions(text: str, where: str) -> tuple[list[str], list[str]]:
    """Return (the articles clicked, those not clicked) of `N1-0 N2-1`; InputError for a token of another form."""
    found: dict[str, list[str]] = {"1": [], "0": []}
    for token in text.split():
        item, _, label = token.rpartition("-")
        if not item or label not in found:
            raise InputError(
                f"{where}: column 'impressions': {token!r} does not end in -0 or -1; is the file whole?"
            )
        found[label].append(item)
    return found["1"], found["0"]


def main(argv: list[str] | None = None) -> None:
    """Read MIND and write the dataset."""
    parser = script_parser("MIND to the project's schema.", "users")
    flag = parser.add_argument_group("MIND").add_argument
    flag(
        "--raw",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder with news.tsv and behaviors.tsv",
    )
    flag(
        "--target",
        choices=["history", "impressions"],
        default="history",
        help="where target and negatives are from",
    )
    args = parser.parse_args(argv)
    if args.target == "impressions" and args.negatives == "popular":
        raise InputError(
            "--negatives popular has no use with --target impressions, whose negatives were shown"
        )
    news = Table(args.raw / "news.tsv", NEWS, header=False)
    behaviors = Table(args.raw / "behaviors.tsv", BEHAVIORS, header=False)
    prepare(
        args,
        "news",
        [news, behaviors],
        lambda: read_news(news),
        lambda dropped: read_behaviors(behaviors, args.target, dropped),
        [NO_CLICK, "unknown ids shown", TOO_FEW] if args.target == "impressions" else [],
    )


if __name__ == "__main__":
    run_main(main)
