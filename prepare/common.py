"""From raw sessions to a dataset: filters, users, splits and negatives (section 5.1).

A reader (mind, amazon_m2, recbole, table) turns raw rows into items and `Session`s. `prepare` does
the rest, without knowing any raw format. It keeps the catalogue's ids and the chosen users in
memory, but not the item texts, which can be gigabytes: it reads those twice.
"""

import hashlib
import heapq
import random
from argparse import SUPPRESS
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol

from launch.command import option
from launch.numbers import positive, seed_number
from prepare.dataset import save_dataset
from prepare.domains import named
from trsr import Domain, InputError

SPLITS = ("train", "val", "test")

# ---- The flags, and what a reader provides


@dataclass(frozen=True)
class Options:
    """The flags that all readers share; a reader adds its own."""

    out: Path = option(SUPPRESS, "folder for the dataset", Path, "files", required=True)
    users: int = option(12000, "most users to keep, chosen by the seed", positive, "users")
    val_users: int | None = option(
        None, "users to validate on (unset: a twelfth of those kept)", positive
    )
    test_users: int | None = option(
        None, "users to test on (unset: a twelfth of those kept)", positive
    )
    seed: int = option(0, "of the choice of users, their splits and their negatives", seed_number)
    min_history: int = option(10, "fewest items before the target", positive)
    max_history: int = option(25, "most items before the target", positive)
    long: str = option(
        "drop", "longer histories; cut: to their last --max-history items", choices=("drop", "cut")
    )
    drop_unknown: bool = option(False, "drop ids that the catalogue lacks or has no text for")
    train_negatives: int = option(1, "negatives per training user", positive, "negatives")
    eval_negatives: int = option(20, "negatives per validation or test user", positive)
    negatives: str = option(
        "uniform", "popular: by how often users chose an item", choices=("uniform", "popular")
    )


Item = tuple[str, str, dict[str, str]]  # (`file:line`, id, attributes)


@dataclass(frozen=True)
class Session:
    """One user's raw row or rows.

    where: `file:line` of the session, or one for each item of the history.
    target: None if the data does not name it; the last known item of the history is then used.
    shown: what was shown with the target and not chosen, if the data records it.
    earlier: the items before the history, where it was cut; they are no negatives either.
    periods: the number of the split, in the order of SPLITS, in whose time each item of the history
    lies; only if one moment divides all users (prepare/periods.py).
    """

    where: Sequence[str]
    user: str
    history: list[str]
    target: str | None
    shown: list[str] | None = None
    earlier: Sequence[str] = ()
    periods: Sequence[int] = ()


class File(Protocol):
    """A raw file: prepare/tables.py and prepare/rows.py have two kinds."""

    path: Path
    rows: int  # of the last reading

    def source(self) -> dict:
        """Return what meta.json records of the file."""


@dataclass(frozen=True)
class Source:
    """A raw dataset, and how to read it. `items` and `sessions` read from the beginning each time.

    sessions: takes a counter for what the reader itself drops.
    filters: the reader's names in that counter.
    divide: makes splits of the sessions, as `divide` below does, which is the default.
    used: if only items that somebody has chosen by the end of a split's time can be its negatives:
    returns them for a split.
    more: what else meta.json tells; the reader may add to it until all is read.
    """

    made_by: str  # the reader, as in `python -m prepare.mind`
    domain: str
    words: Domain
    catalogue: File
    raw: File
    items: Callable[[], Iterable[Item]]
    sessions: Callable[[Counter], Iterable[Session]]
    filters: Sequence[str] = ()
    divide: Callable[..., dict[str, list[Session]]] | None = None
    used: Callable[[str], Iterable[str]] | None = None
    more: dict = field(default_factory=dict)


# ---- Filters

BEYOND = "users beyond --users"
CUT = "items cut from the beginning of long histories"  # with --long cut alone
FILTERS = (
    "rows of a user already taken",
    "unknown ids in histories",
    "unknown targets",
    "history too short",
    "history too long",
    "target already in history",
)


def read_catalogue(path: Path, items: Iterable[Item]) -> dict[str, bool]:
    """Return {id: whether it has any text} in catalogue order.

    Raises InputError for a duplicate or empty id, and for a catalogue without texts.
    """
    known: dict[str, bool] = {}
    for where, item, texts in items:
        if not item or item in known:
            what = "is there twice" if item else "is no id"
            raise InputError(f"{where}: item {item!r} {what}")
        known[item] = bool(texts)
    if not any(known.values()):
        raise InputError(f"{path}: no item with a text in it")
    return known


def eligible(
    sessions: Iterable[Session], known: dict[str, bool], options: Options, dropped: Counter
) -> Iterator[Session]:
    """Yield the sessions that pass every filter, without unknown ids and with a target.

    Counts what it drops, and counts what passes as BEYOND; the caller subtracts the users that it
    keeps. Raises InputError for an unknown id unless options.drop_unknown.
    """
    taken = set()
    for session in sessions:
        if session.user in taken:
            dropped["rows of a user already taken"] += 1
            continue
        # With impressions, every row has its own target, so a user's next row may still pass.
        if session.shown is None:
            taken.add(session.user)

        resolved = resolve(session, known, options.drop_unknown, dropped)
        if resolved is None:
            continue
        if reason := reason_to_drop(resolved, options):
            dropped[reason] += 1
            continue
        taken.add(session.user)
        dropped[BEYOND] += 1
        yield shortened(resolved, options, dropped)


def resolve(
    session: Session, known: dict[str, bool], drop_unknown: bool, dropped: Counter
) -> Session | None:
    """Return the session without unknown ids and with a target; None if its target is unknown."""

    def kept(items: list[str], what: str) -> list[str]:
        found = [item for item in items if known.get(item)]
        if len(found) < len(items) and not drop_unknown:
            raise InputError(unknown_id(session, items, known))
        dropped[what] += len(items) - len(found)
        return found

    history, target = kept(session.history, "unknown ids in histories"), session.target
    if target is None:
        *history, target = history or [""]
    elif not kept([target], "unknown targets"):
        return None

    shown = session.shown
    if shown is not None:
        others = dict.fromkeys(kept(shown, "unknown ids shown"))
        shown = [item for item in others if item != target and item not in history]
    return replace(session, history=history, target=target, shown=shown)


def unknown_id(session: Session, items: list[str], known: dict[str, bool]) -> str:
    """Return the error message for the first of the session's items that has no text."""
    position, item = next((n, item) for n, item in enumerate(items) if not known.get(item))
    where = session.where[min(position, len(session.where) - 1)]
    reason = "has no text in the catalogue" if item in known else "is not in the catalogue"
    return f"{where}: item {item!r} {reason}; --drop-unknown drops such items"


def reason_to_drop(session: Session, options: Options) -> str | None:
    """Return the filter that a resolved session fails, if any."""
    if len(session.history) < options.min_history:
        return "history too short"
    if len(session.history) > options.max_history and options.long == "drop":
        return "history too long"
    if session.target in session.history:
        return "target already in history"
    needed = max(options.eval_negatives, options.train_negatives)
    if session.shown is not None and len(session.shown) < needed:
        return "rows with too few shown and unclicked"
    return None


def shortened(session: Session, options: Options, dropped: Counter) -> Session:
    """Return the session with no more than the last --max-history items in its history."""
    n_cut = len(session.history) - options.max_history
    if n_cut <= 0:
        return session
    dropped[CUT] += n_cut
    history = session.history
    return replace(session, history=history[n_cut:], earlier=history[:n_cut])


# ---- Users, splits, negatives


def order_of(seed: int, user: str) -> bytes:
    """Return a user's place in the random order that only the seed and the users determine."""
    return hashlib.sha256(f"{seed}\0{user}".encode()).digest()


def choose(sessions: Iterable[Session], limit: int, seed: int) -> list[Session]:
    """Return up to limit sessions, in a random order that only the seed and the users determine."""
    # It never holds more than limit.
    return heapq.nsmallest(limit, sessions, lambda session: order_of(seed, session.user))


def split_sizes(n_users: int, val: int | None = None, test: int | None = None) -> dict[str, int]:
    """Return the number of users in each split, 10 : 1 : 1 where val and test are not given.

    Raises InputError if nobody is left to train on.
    """
    part = max(1, n_users // 12)
    sizes = {"val": val or part, "test": test or part}
    if n_users <= sum(sizes.values()):
        needed = f"{sizes['val']} to validate and {sizes['test']} to test on"
        what = f"{n_users} users left, not enough for {needed} and one to train on"
        raise InputError(f"{what}; loosen the filters, or lower --val-users and --test-users")
    return {"train": n_users - sum(sizes.values()), **sizes}


def divide(
    source: Source, known: dict[str, bool], options: Options, dropped: Counter
) -> dict[str, list[Session]]:
    """Return the sessions of each split, chosen by the seed; InputError if too few are left."""
    passing = eligible(source.sessions(dropped), known, options, dropped)
    chosen = choose(passing, options.users, options.seed)
    dropped[BEYOND] -= len(chosen)
    if len(chosen) < 3:
        what = f"{len(chosen)} users left, at least 3 are needed ({counted(dropped)})"
        raise InputError(f"{source.raw.path}: {what}; loosen the filters")
    sizes, rest = split_sizes(len(chosen), options.val_users, options.test_users), iter(chosen)
    return {split: list(islice(rest, size)) for split, size in sizes.items()}


def counted(dropped: Counter) -> str:
    """Return what was dropped as words."""
    return ", ".join(f"{name} {n}" for name, n in dropped.items() if n) or "nothing dropped"


def draw_negatives(
    seed: int, session: Session, items: Sequence[str], cumulative: Sequence[int], n: int
) -> list[str]:
    """Return n distinct items, drawn by weight, that are neither the target nor in the history.

    cumulative: the running sum of the items' weights, all above 0. Raises InputError if there are
    too few items.
    """
    excluded = {*session.earlier, *session.history, session.target}
    # What a user was shown holds none of the excluded items, the catalogue holds all of them.
    free = len(items) if session.shown else len(items) - len(excluded)
    if free < n:
        what = f"only {free} items can be negatives, {n} are needed"
        way = "lower --train-negatives and --eval-negatives, or take a larger catalogue"
        raise InputError(f"user {session.user!r}: {what}; {way}")

    return draw_distinct(f"{seed} {session.user}", items, cumulative, n, excluded)


def draw_distinct(
    seed: str, items: Sequence[str], cumulative: Sequence[int], n: int, excluded: set[str]
) -> list[str]:
    """Return n distinct items, drawn by weight, that are not excluded; there must be as many."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        # Python promises the same numbers in every version for random() only.
        item = items[bisect_right(cumulative, rng.random() * cumulative[-1])]
        if item not in excluded:
            found[item] = None
    return list(found)


def weights_of(
    split: str,
    divided: dict[str, list[Session]],
    known: dict[str, bool],
    options: Options,
    used: Callable[[str], Iterable[str]] | None,
) -> dict[str, int]:
    """Return the weight of each item that can be a negative of a split."""
    if options.negatives == "uniform":
        items = known if used is None else used(split)
        return dict.fromkeys((item for item in items if known.get(item)), 1)

    # With a moment between the splits, what came after a split's time is unknown in it.
    splits = SPLITS if used is None else SPLITS[: SPLITS.index(split) + 1]
    weights: Counter = Counter()
    for name in splits:
        for session in divided[name]:
            weights.update([*session.earlier, *session.history, session.target])
    return weights


def make_splits(
    divided: dict[str, list[Session]],
    known: dict[str, bool],
    options: Options,
    used: Callable[[str], Iterable[str]] | None = None,
) -> dict[str, list[dict]]:
    """Return the examples of each split, with their negatives, as they are written.

    used: as in Source.
    """
    splits, catalogue = {}, None
    for split in SPLITS:
        n = options.train_negatives if split == "train" else options.eval_negatives
        if catalogue is None or used is not None:  # else it is the same for all splits
            weights = weights_of(split, divided, known, options, used)
            items = [item for item in known if item in weights]
            catalogue = items, list(accumulate(weights[item] for item in items))
        splits[split] = []
        for session in divided[split]:
            pool = catalogue
            if session.shown:
                pool = session.shown, range(1, len(session.shown) + 1)
            negatives = draw_negatives(options.seed, session, *pool, n)
            example = {"user": session.user, "history": session.history}
            example |= {"positive": session.target, "negatives": negatives}
            splits[split].append(example)
    return splits


# ---- The whole preparation

NOT_SETTINGS = ("seed", "domain", "print_domain")  # told elsewhere in meta.json, or nothing to tell


def prepare(options: Options, source: Source) -> None:
    """Prepare a dataset from its source, and print what is done.

    Raises InputError for what the user can fix.
    """
    announce(options, source)
    known = read_catalogue(source.catalogue.path, source.items())
    cut = [CUT] if options.long == "cut" else []
    dropped = Counter(dict.fromkeys([*source.filters, *FILTERS, *cut, BEYOND], 0))
    divided = (source.divide or divide)(source, known, options, dropped)
    splits = make_splits(divided, known, options, source.used)
    report(options, source, dropped, write(options, source, splits, dropped))


def announce(options: Options, source: Source) -> None:
    """Print what is about to be prepared; InputError for options that contradict each other."""
    low, high, out = options.min_history, options.max_history, options.out
    if low > high:
        raise InputError(f"--min-history {low} is above --max-history {high}")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: not a folder")
    what = f"Items from {source.catalogue.path}, users from {source.raw.path}"
    print(f"{what}, to {out} ({source.domain}, seed {options.seed})")
    what = f"At most {options.users} users with {low} to {high} items before the target"
    drawn = f"{options.train_negatives} in train, {options.eval_negatives} in val and test"
    print(f"{what}; negatives: {drawn}", flush=True)


def write(
    options: Options, source: Source, splits: dict[str, list[dict]], dropped: Counter
) -> dict:
    """Write the dataset, with the items that it mentions; return its meta.json."""
    mentioned = set()
    for examples in splits.values():
        for e in examples:
            mentioned.update(e["history"], [e["positive"]], e["negatives"])

    kept = {n: value for n, value in vars(options).items() if not isinstance(value, Path)}
    for name in NOT_SETTINGS:
        kept.pop(name, None)
    meta = {"made_by": source.made_by, **named(source.domain, source.words)}
    meta |= {"seed": options.seed, "settings": kept, **source.more}
    tables = source.catalogue, source.raw
    meta |= {"sources": [table.source() for table in tables], "dropped": dict(dropped)}
    read = ((item, attributes) for _, item, attributes in source.items() if item in mentioned)
    items = ({"id": item, "attributes": attributes} for item, attributes in read)
    return save_dataset(options.out, splits, items, meta)


def report(options: Options, source: Source, dropped: Counter, meta: dict) -> None:
    """Print what was read, dropped and written, and the next command."""
    tables = source.catalogue, source.raw
    read = " and ".join(f"{table.rows:,} rows of {table.path.name}" for table in tables)
    print(f"Read {read}; dropped:")
    for name, n in dropped.items():
        print(f"  {n:>9,}  {name}")
    users = ", ".join(f"{n:,} {split}" for split, n in meta["examples"].items())
    sizes = f"{meta['items']:,} items; mean history {meta['mean_history']}"
    print(f"{users} users; {sizes}; written to {options.out}")
    next_run = f"--model DIR_OR_HUB_ID --run runs/{options.out.name}"
    print(f"Next: python summarize.py --data {options.out} {next_run}")
