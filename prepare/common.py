"""What the readers of raw data share: tables, filters, splits, negatives, and writing a dataset (section 5.1).

A reader (mind, amazon_m2, recbole) turns raw rows into items and `Session`s; `prepare` here does all the rest. Memory
holds the ids of the catalogue and the chosen users. Item texts are read twice and never kept. It knows no raw format.
"""

import argparse
import hashlib
import heapq
import html
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

from tqdm import tqdm

from launch.command import positive
from prepare.dataset import save_dataset
from trsr import InputError

Item = tuple[str, str, dict[str, str]]  # (`file:line`, id, attributes)


@dataclass(frozen=True)
class Session:
    """One user's raw row or rows.

    where: `file:line` of the session, or one for each item of the history. target: None where the data name none, so
    that the last known item of the history is it. shown: what was shown with the target and not chosen, if recorded.
    """

    where: Sequence[str]
    user: str
    history: list[str]
    target: str | None
    shown: list[str] | None = None


def split_tabs(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of tab-separated lines; a quote is a sign like any other."""
    for number, line in enumerate(lines, 1):
        yield number, line.rstrip("\r\n").split("\t")


class Table:
    """A raw file with columns; iterating yields (`file:line`, {column: text}) and counts `rows`.

    Raises InputError for a missing file or column at once, for a broken row when it is reached. header: the first line
    has the names of the columns, which must include columns. split: lines to (number of the first line, columns).
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] = (),
        header: bool = True,
        split: Callable = split_tabs,
    ):
        self.path, self.columns, self.header, self.split, self.rows = (
            path,
            columns,
            header,
            split,
            0,
        )
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if header:
            _, self.columns = next(split(self._lines(), path), (1, []))
            if missing := [name for name in columns if name not in self.columns]:
                found = ", ".join(self.columns) or "an empty file"
                raise InputError(
                    f"{path}:1: no column {missing[0]!r}; expected {', '.join(columns)}, found {found}"
                )
            if len(set(self.columns)) < len(self.columns):
                raise InputError(
                    f"{path}:1: two columns of one name among {', '.join(self.columns)}"
                )

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        self.rows = 0
        records = self.split(self._lines(), self.path)
        if self.header:
            next(records)
        for number, fields in records:
            where = f"{self.path}:{number}"
            if len(fields) != len(self.columns):
                expected = f"{len(self.columns)} ({', '.join(self.columns)})"
                raise InputError(
                    f"{where}: {len(fields)} columns, expected {expected}; is the file whole?"
                )
            self.rows += 1
            yield where, dict(zip(self.columns, fields, strict=True))

    def _lines(self) -> Iterator[str]:
        size = self.path.stat().st_size
        with (
            open(self.path, "rb") as file,
            tqdm(
                total=size, desc=self.path.name, unit="B", unit_scale=True, disable=None, delay=1
            ) as bar,
        ):
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise InputError(f"{self.path}:{number}: not UTF-8 text") from None

    def source(self) -> dict:
        """Return what meta.json tells of the file: name, sha256, rows of the last reading."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": digest, "rows": self.rows}


def attributes(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the (name, raw text) pairs with HTML entities decoded, without the empty ones."""
    return {name: text for name, raw in pairs if (text := html.unescape(raw)).strip()}


def read_catalogue(path: Path, items: Iterable[Item]) -> dict[str, bool]:
    """Return {id: whether it has any text} in catalogue order; InputError for a duplicate, an empty id, no items."""
    known: dict[str, bool] = {}
    for where, item, texts in items:
        if not item or item in known:
            raise InputError(
                f"{where}: item {item!r} " + ("is there twice" if item else "is no id")
            )
        known[item] = bool(texts)
    if not any(known.values()):
        raise InputError(f"{path}: no item with a text in it")
    return known


BEYOND = "users beyond --users"
FILTERS = (
    "rows of a user already taken",
    "unknown ids in histories",
    "unknown targets",
    "history too short",
    "history too long",
    "target already in history",
)


def eligible(
    sessions: Iterable[Session], known: dict[str, bool], args: argparse.Namespace, dropped: Counter
) -> Iterator[Session]:
    """Yield the sessions that pass every filter, with unknown ids gone and a target; count in dropped.

    An item without text counts as unknown. Raises InputError for an unknown id unless args.drop_unknown. What passes
    is counted as BEYOND, from which the caller takes the users that it keeps.
    """
    taken = set()

    def resolve(session: Session, items: list[str], what: str) -> list[str]:
        found = [item for item in items if known.get(item)]
        if len(found) < len(items) and not args.drop_unknown:
            position, item = next((n, item) for n, item in enumerate(items) if not known.get(item))
            where = session.where[min(position, len(session.where) - 1)]
            reason = "has no text in the catalogue" if item in known else "is not in the catalogue"
            raise InputError(f"{where}: item {item!r} {reason}; --drop-unknown drops such items")
        dropped[what] += len(items) - len(found)
        return found

    for session in sessions:
        if session.user in taken:
            dropped["rows of a user already taken"] += 1
            continue
        if (
            session.shown is None
        ):  # with impressions, a user's next row has another target and may pass
            taken.add(session.user)
        history = resolve(session, session.history, "unknown ids in histories")
        if session.target is None:
            *history, target = history or [""]
        elif not resolve(session, [session.target], "unknown targets"):
            continue
        else:
            target = session.target
        shown = session.shown
        if shown is not None:
            others = resolve(session, shown, "unknown ids shown")
            shown = [
                item for item in dict.fromkeys(others) if item != target and item not in history
            ]
        if len(history) < args.min_history:
            dropped["history too short"] += 1
        elif len(history) > args.max_history:
            dropped["history too long"] += 1
        elif target in history:
            dropped["target already in history"] += 1
        elif shown is not None and len(shown) < max(args.eval_negatives, args.train_negatives):
            dropped["rows with too few shown and unclicked"] += 1
        else:
            taken.add(session.user)
            dropped[BEYOND] += 1
            yield replace(session, history=history, target=target, shown=shown)


def choose(sessions: Iterable[Session], limit: int, seed: int) -> list[Session]:
    """Return at most limit sessions in a seeded random order that does not depend on the order of sessions."""

    def key(session: Session) -> bytes:
        return hashlib.sha256(f"{seed}\0{session.user}".encode()).digest()

    return heapq.nsmallest(limit, sessions, key)  # holds limit sessions, however many go through


def split_sizes(n_users: int) -> dict[str, int]:
    """Return the number of users in each split, 10 : 1 : 1; InputError below 3 users."""
    if n_users < 3:
        raise InputError(f"{n_users} users left, at least 3 are needed, one a split")
    part = max(1, n_users // 12)
    return {"train": n_users - 2 * part, "val": part, "test": part}


def draw_negatives(
    seed: int, session: Session, items: Sequence[str], cumulative: Sequence[int], n: int
) -> list[str]:
    """Return n distinct items, each drawn by its weight, none of them the session's target or in its history.

    cumulative: the running sum of the items' weights, all of them above 0. Raises InputError where items are too few.
    """
    excluded = {*session.history, session.target}
    free = len(items) - (
        0 if session.shown else len(excluded)
    )  # whatever is excluded is among the items
    if free < n:
        raise InputError(
            f"user {session.user!r}: only {free} items can be negatives, {n} are needed; "
            "lower --train-negatives and --eval-negatives, or take a larger catalogue"
        )
    rng = random.Random(f"{seed} {session.user}")
    negatives: dict[str, None] = {}
    while len(negatives) < n:
        # Only random() is promised to give the same numbers in every version of Python.
        item = items[bisect_right(cumulative, rng.random() * cumulative[-1])]
        if item not in excluded:
            negatives[item] = None
    return list(negatives)


def make_splits(
    sessions: list[Session], known: dict[str, bool], args: argparse.Namespace
) -> dict[str, list[dict]]:
    """Return the examples of each split, as they are written, with their negatives."""
    if args.negatives == "popular":
        weights = Counter(
            item for session in sessions for item in [*session.history, session.target]
        )
    else:
        weights = dict.fromkeys((item for item, has_text in known.items() if has_text), 1)
    items = [item for item in known if item in weights]
    cumulative = list(accumulate(weights[item] for item in items))
    splits, rest = {}, iter(sessions)
    for split, size in split_sizes(len(sessions)).items():
        n = args.train_negatives if split == "train" else args.eval_negatives
        splits[split] = []
        for session in islice(rest, size):
            pool = (
                (session.shown, range(1, len(session.shown) + 1))
                if session.shown
                else (items, cumulative)
            )
            example = {"user": session.user, "history": session.history, "positive": session.target}
            splits[split].append(
                example | {"negatives": draw_negatives(args.seed, session, *pool, n)}
            )
    return splits


def script_parser(description: str, users: str) -> argparse.ArgumentParser:
    """Return an argument parser with the flags that all readers share; users says whom the readers find."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument_group("files").add_argument
    flag(
        "--out",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="folder to write the dataset to",
    )
    flag = parser.add_argument_group("users").add_argument
    flag(
        "--users",
        type=positive,
        default=12000,
        help=f"most {users} to keep, split 10 : 1 : 1; a seeded choice",
    )
    flag(
        "--seed",
        type=int,
        default=0,
        help="seed of the choice of users, their splits and their negatives",
    )
    flag("--min-history", type=positive, default=10, help="fewest items before the target")
    flag("--max-history", type=positive, default=25, help="most items before the target")
    flag(
        "--drop-unknown",
        action="store_true",
        help="drop ids that the catalogue lacks or has no text of",
    )
    flag = parser.add_argument_group("negatives").add_argument
    flag("--train-negatives", type=positive, default=1, help="negatives of a training user")
    flag(
        "--eval-negatives", type=positive, default=20, help="negatives of a validation or test user"
    )
    flag(
        "--negatives",
        choices=["uniform", "popular"],
        default="uniform",
        help="popular: by how often users chose it",
    )
    return parser


def prepare(
    args: argparse.Namespace,
    domain: str,
    tables: Sequence[Table],
    items: Callable[[], Iterable[Item]],
    sessions: Callable[[Counter], Iterable[Session]],
    filters: Sequence[str] = (),
) -> None:
    """Read, filter, split, draw and write a dataset, and print what is done; InputError for what a user can mend.

    tables: the catalogue's and the sessions'. items and sessions start a reading of them; sessions counts in the given
    counter what the reader itself leaves out. filters: names of what this reader drops besides FILTERS.
    """
    if args.min_history > args.max_history:
        raise InputError(
            f"--min-history {args.min_history} is above --max-history {args.max_history}"
        )
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: not a folder")
    catalogue, raw = (table.path for table in tables)
    print(f"Items from {catalogue}, users from {raw}, to {args.out} ({domain}, seed {args.seed})")
    print(
        f"At most {args.users} users with {args.min_history} to {args.max_history} items before the target; ",
        end="",
    )
    print(
        f"negatives: {args.train_negatives} in train, {args.eval_negatives} in val and test",
        flush=True,
    )
    known = read_catalogue(catalogue, items())
    dropped = Counter(dict.fromkeys([*filters, *FILTERS, BEYOND], 0))
    chosen = choose(eligible(sessions(dropped), known, args, dropped), args.users, args.seed)
    dropped[BEYOND] -= len(chosen)
    if len(chosen) < 3:
        counts = ", ".join(f"{name} {n}" for name, n in dropped.items() if n) or "nothing dropped"
        raise InputError(
            f"{raw}: {len(chosen)} users left, at least 3 are needed ({counts}); loosen the filters"
        )
    splits = make_splits(chosen, known, args)
    kept = (example for examples in splits.values() for example in examples)
    mentioned = {item for e in kept for item in [*e["history"], e["positive"], *e["negatives"]]}
    settings = {
        name: value
        for name, value in vars(args).items()
        if name != "seed" and not isinstance(value, Path)
    }
    meta = {"domain": domain, "seed": args.seed, "settings": settings}
    meta |= {"sources": [table.source() for table in tables], "dropped": dict(dropped)}
    texts = (
        {"id": item, "attributes": attributes}
        for _, item, attributes in items()
        if item in mentioned
    )
    meta = save_dataset(args.out, splits, texts, meta)
    print(
        f"Read {' and '.join(f'{table.rows:,} rows of {table.path.name}' for table in tables)}; dropped:"
    )
    for name, n in dropped.items():
        print(f"  {n:>9,}  {name}")
    print(", ".join(f"{n:,} {split}" for split, n in meta["examples"].items()), end="")
    print(
        f" users; {meta['items']:,} items; mean history {meta['mean_history']}; written to {args.out}"
    )
    print(
        f"Next: python summarize.py --data {args.out} --model DIR_OR_HUB_ID --run runs/{args.out.name}"
    )
