"""Convert MIND, the paper's news dataset (section 5.1), to the project's schema.

    python -m prepare.mind --raw MINDlarge_train --out data/mind
    python -m prepare.mind --raw MINDlarge_train --out data/mind-impressions --target impressions

The raw folder holds news.tsv and behaviors.tsv as published. By default only a user's first row is
used, and the last article in its history is the target, as in the authors' code; impressions are
ignored. With --target impressions, the target is the first article clicked in the impression, and
the negatives are articles that were shown with it and not clicked.
"""

from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.command import option, parse_settings, run_main
from prepare.common import Item, Options, Session, Source, prepare
from prepare.domains import domain_option, find_domain
from prepare.tables import Table, attributes
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
# The published files have no header, but programs that save them again may add one.
NEWS_HEADERS = ("id", "news id", "newsid", "nid", "0")
BEHAVIOR_HEADERS = ("id", "impression id", "impressionid", "0")
NO_CLICK, TOO_FEW = "rows without a click", "rows with too few shown and unclicked"


@dataclass(frozen=True)
class Settings(Options):
    """The flags."""

    raw: Path = option(
        SUPPRESS, "folder with news.tsv and behaviors.tsv", Path, "MIND", required=True
    )
    domain: str = domain_option("news")
    target: str = option(
        "history",
        "where the target and the negatives come from",
        choices=("history", "impressions"),
    )


def read_news(table: Table) -> Iterator[Item]:
    """Yield the articles."""
    for where, row in table:
        texts = attributes((name, row[column]) for name, column in ATTRIBUTES.items())
        yield where, row["id"], texts


def read_behaviors(table: Table, target: str, dropped: Counter) -> Iterator[Session]:
    """Yield the rows as sessions: all of them, or with target `impressions` those with a click."""
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
    """Return (articles clicked, articles not clicked) of `N1-0 N2-1`; InputError if malformed."""
    found: dict[str, list[str]] = {"1": [], "0": []}
    for token in text.split():
        item, _, label = token.rpartition("-")
        if not item or label not in found:
            what = f"{token!r} does not end in -0 or -1; is the file whole?"
            raise InputError(f"{where}: column 'impressions': {what}")
        found[label].append(item)
    return found["1"], found["0"]


def main() -> None:
    """Read MIND and write the dataset."""
    settings = parse_settings(Settings, __doc__)
    impressions = settings.target == "impressions"
    if impressions and settings.negatives == "popular":
        why = "whose negatives are those that were shown"
        raise InputError(f"--negatives popular has no use with --target impressions, {why}")
    news = Table(settings.raw / "news.tsv", NEWS, header=False, header_words=NEWS_HEADERS)
    behaviors = Table(
        settings.raw / "behaviors.tsv", BEHAVIORS, header=False, header_words=BEHAVIOR_HEADERS
    )
    source = Source(
        "prepare.mind",
        *find_domain(settings.domain),
        news,
        behaviors,
        items=lambda: read_news(news),
        sessions=lambda dropped: read_behaviors(behaviors, settings.target, dropped),
        filters=[NO_CLICK, "unknown ids shown", TOO_FEW] if impressions else [],
    )
    prepare(settings, source)


if __name__ == "__main__":
    run_main(main)
