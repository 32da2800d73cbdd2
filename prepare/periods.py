"""Splits by time: two moments, the same for all users, so that nothing of the future is learned.

Everything up to the first moment is for training, what follows up to the second for validation, and
the rest for testing. The target of a user is the last item in the time of the user's split; the
history is all that the same user had before it, whenever that was. What a user did later than the
target is not used.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

from prepare.common import (
    BEYOND,
    SPLITS,
    Options,
    Session,
    Source,
    counted,
    order_of,
    reason_to_drop,
    shortened,
    unknown_id,
)
from trsr import InputError

NO_PLACE = "users beyond the sizes of their splits"


def targets(
    session: Session, known: dict[str, bool], options: Options, dropped: Counter
) -> Iterator[tuple[str, Session]]:
    """Yield (split, session with its target) for the splits in whose time the user has an item.

    The latest split comes first. Raises InputError for an unknown id unless options.drop_unknown.
    """
    kept = [n for n, item in enumerate(session.history) if known.get(item)]
    if len(kept) < len(session.history) and not options.drop_unknown:
        raise InputError(unknown_id(session, session.history, known))
    dropped["unknown ids in histories"] += len(session.history) - len(kept)

    items = [session.history[n] for n in kept]
    periods = [session.periods[n] for n in kept]  # ascending
    for number in reversed(range(len(SPLITS))):
        end = bisect_right(periods, number)
        if end and periods[end - 1] == number:
            found = items[: end - 1], items[end - 1]
            yield SPLITS[number], Session(session.where, session.user, *found)


def passing(
    source: Source, known: dict[str, bool], options: Options, dropped: Counter
) -> tuple[dict[str, list[tuple[bytes, Session]]], int]:
    """Return the sessions that pass every filter, by split and in random order, and their users.

    A user may be in several splits here. Of each split no more than --users sessions are held.
    """
    found: dict[str, list[tuple[bytes, Session]]] = {split: [] for split in SPLITS}
    n_users = 0
    for session in source.sessions(dropped):
        reasons, passed, place = [], False, order_of(options.seed, session.user)
        for split, made in targets(session, known, options, dropped):
            reasons.append(reason_to_drop(made, options))
            if reasons[-1] is None:
                passed = True
                found[split].append((place, made))
                if len(found[split]) >= 2 * options.users + 1000:
                    prune(found[split], options.users)

        n_users += passed
        if not passed:
            dropped[reasons[0] if reasons else "history too short"] += 1
    for sessions in found.values():
        prune(sessions, options.users)
    return found, n_users


def prune(sessions: list[tuple[bytes, Session]], limit: int) -> None:
    """Sort the sessions by their random places and leave the first ones, in place."""
    sessions.sort(key=lambda pair: pair[0])
    del sessions[limit:]


def divide_by_time(
    source: Source, known: dict[str, bool], options: Options, dropped: Counter
) -> dict[str, list[Session]]:
    """Return the sessions of each split; each user is in one of them.

    Test users are chosen first, by the seed, then validation users, and whoever is left and passes
    is for training. Raises InputError if a split gets too few users.
    """
    found, n_users = passing(source, known, options, dropped)
    total = min(options.users, n_users)
    part = max(1, total // 12)
    asked = {"test": options.test_users, "val": options.val_users}

    divided: dict[str, list[Session]] = {}
    taken: set[str] = set()
    for split in reversed(SPLITS):
        size = total - len(taken) if split == "train" else asked[split] or part
        free = (session for _, session in found[split] if session.user not in taken)
        divided[split] = [session for session, _ in zip(free, range(size), strict=False)]
        least = asked.get(split) or 1
        if len(divided[split]) < least:
            what = f"{len(divided[split])} users for {split}, {least} needed ({counted(dropped)})"
            way = "move --split-time, loosen the filters, or lower --val-users and --test-users"
            raise InputError(f"{source.raw.path}: {what}; {way}")
        taken.update(session.user for session in divided[split])

    dropped[BEYOND] = max(0, n_users - options.users)
    dropped[NO_PLACE] = n_users - dropped[BEYOND] - len(taken)
    return {
        split: [shortened(session, options, dropped) for session in divided[split]]
        for split in SPLITS
    }
