"""What a run's summaries are worth: shares that need no model, and advice for those that are bad.

    python -m runfolder.quality runs/demo

summarize.py prints the same at its end and writes it to RUN/quality.json; the report shows it. The
shares are of users that have a history:

    ended, limit, turn  how the texts ended: by themselves, at the limit, or by beginning another
                        turn of the conversation; of all texts, those of blocks and merges too
    loop                4-word runs of a summary that are repeats, as a mean over users
    loop_users          users whose summary repeats more than a fifth of its 4-word runs
    another             users whose summary is, word for word, also that of another history
    empty               users whose summary is empty
    own_first           users whose summary fits their own history better than those of 23 others
    sound               users of whose summary nothing above is bad: not empty, not another's, no
                        loop, and every text on the way to it ended by itself

A summary fits a history by the words that they share, each with the weight log(1 + its frequency in
the history / its frequency in all histories): rare words count more, and since frequencies are
relative to the history's length, a long history has no advantage. Ties count against the user, so
summaries that know nothing of the user come first in 1 of 24 cases.

Advice is given if the share that hits the limit is more than a tenth above loop_users, since loops
reach any limit, or if more than a tenth begin another turn; if loop is more than a tenth, or
loop_users, another or empty more than a twentieth; and if own_first is less than three times its
chance, but in no case if it is a half or more.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from files.jsonl import read_json
from launch.command import Parser, run_main
from launch.numbers import seed_number
from prepare.dataset import load_dataset
from runfolder.show import records_of
from state.settings import read_config
from trsr import InputError, content_hash

ENDS = {"end": "ended by themselves", "limit": "hit the limit", "turn": "began another turn"}
GROUP = 24  # users whose histories a summary is compared with, its own among them
RUN_OF_WORDS, LOOP = 4, 0.2
# In Chinese and Japanese, where no spaces part the words, a character is one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")

# ---- The shares


@dataclass(frozen=True)
class Quality:
    """The shares of a run's summaries, each between 0 and 1; None: unknown."""

    users: int  # who have a history; the others have nothing to summarize
    texts: int  # whose end is recorded
    ended: float | None
    limit: float | None
    turn: float | None
    loop: float
    loop_users: float
    another: float
    empty: float
    own_first: float | None
    chance: float | None  # of own_first
    sound: float | None = None  # unknown where it is unknown how the texts ended

    def rows(self) -> list[tuple[str, str]]:
        """Return (what, shares in words) pairs."""
        if not self.users:
            return [("quality", "no user has a history, so there is nothing to judge")]

        shares = zip((self.ended, self.limit, self.turn), ENDS.values(), strict=True)
        ends = f"unknown for these {self.users} users, since older runs do not record them"
        if self.texts:
            ends = ", ".join(f"{percent(share)} {what}" for share, what in shares)
            ends = f"of {self.texts} texts {ends}"
        loops = f"{percent(self.loop)} of a summary's 4-word runs are repeats"
        own = "a single user has no others to compare with"
        if self.own_first is not None:
            others = round(1 / self.chance) - 1
            what = f"of the summaries fit their own history better than {others} others'"
            own = f"{percent(self.own_first)} {what} (by chance {percent(self.chance)})"
        sound = []
        if self.sound is not None:
            what = "of the summaries are sound: whole, without loops, the user's own"
            sound.append(("sound", f"{percent(self.sound)} {what}"))
        return [
            *sound,
            ("ends", ends),
            ("loops", f"{loops}, more than a fifth for {percent(self.loop_users)} of the users"),
            ("copies", f"{percent(self.another)} are another user's, {percent(self.empty)} empty"),
            ("own", own),
        ]

    def advice(self) -> Iterator[str]:
        """Yield a sentence for each share that is bad."""
        if not self.users:
            return
        loops = self.loop > 0.1 or self.loop_users > 0.05
        # A text that goes in circles reaches any limit.
        if (self.limit or 0) - self.loop_users > 0.1:
            yield "many texts are cut at the limit: raise --max-new-tokens"
        if (self.turn or 0) > 0.1:
            yield "other turns begin: drop --no-chat, or the base model needs one with a chat form"
        if loops:
            yield "summaries repeat themselves: try --no-repeat-ngram-size or --repetition-penalty"
        if self.empty > 0.05:
            yield "summaries are empty: the model ends at once, so choose another summarizer"
        # Few users have a high chance already.
        little = self.own_first is not None and self.own_first < min(3 * self.chance, 0.5)
        if little or self.another > 0.05:
            yield "summaries carry little of their own history: choose a larger summarizer"

    def lines(self) -> list[str]:
        """Return the lines for the end of summarize.py, of at most 100 columns."""
        found = [*self.rows(), *(("advice", sentence) for sentence in self.advice())]
        return [f"{what:<7} {text}" for what, text in found]

    def record(self) -> dict:
        """Return the shares as a JSON object, for quality.json."""
        return asdict(self)


def percent(share: float) -> str:
    """Return a share as a percentage, in which only 0 and 1 look like 0 and 1."""
    points = 100 * share
    if 0 < points < 1 or 99 < points < 100:
        return f"{min(max(points, 0.1), 99.9):.1f} %"
    return f"{points:.0f} %"


def quality_of(records: dict[str, dict], texts: dict[str, list[str]], seed: int = 0) -> Quality:
    """Return the quality of summaries.

    records: lines of summaries.jsonl by user, each with "summary" and, unless it is of an older
    run, "ends", which counts the texts that were written for the user by how they ended: {"end": 2,
    "limit": 1, "turn": 0}. texts: the histories of at least these users, as item texts. seed: of
    the groups in which summaries are compared.
    """
    users = [user for user in records if texts[user]]
    histories = [texts[user] for user in users]
    summaries = [records[user]["summary"] for user in users]
    words = [words_of(summary) for summary in summaries]

    counts = [ends_of(user, records[user]) for user in users]
    ends = sum(counts, Counter())
    n_texts = sum(ends[name] for name in ENDS)
    ended, limit, turn = (ends[name] / n_texts if n_texts else None for name in ENDS)
    loops = [repeated_share(found) for found in words]
    others = of_another(summaries, histories)
    sound = [
        bool(summary.strip())
        and not other
        and loop <= LOOP
        and not record["limit"] + record["turn"]
        for summary, other, loop, record in zip(summaries, others, loops, counts, strict=True)
    ]
    own, chance = None, None
    if len(users) > 1:
        first = own_first(words, histories, seed)
        own, chance = mean(first), 1 / min(GROUP, len(users))
    return Quality(
        users=len(users),
        texts=n_texts,
        ended=ended,
        limit=limit,
        turn=turn,
        loop=mean(loops),
        loop_users=mean([share > LOOP for share in loops]),
        another=mean(others),
        empty=mean([not summary.strip() for summary in summaries]),
        own_first=own,
        chance=chance,
        sound=mean(sound) if users and all(counts) else None,
    )


def ends_of(user: str, record: dict) -> Counter:
    """Return how a user's texts ended, nothing if it is not recorded; InputError if it is wrong."""
    ends = record.get("ends", {})
    sound = isinstance(ends, dict) and ends.keys() <= ENDS.keys()
    if not sound or not all(isinstance(n, int) and n >= 0 for n in ends.values()):
        what = f"field 'ends' is {ends!r}, expected counts of {', '.join(ENDS)}"
        raise InputError(f"summary of user {user!r}: {what}; run summarize.py again")
    return Counter(ends)


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 of nothing."""
    return float(np.mean(values)) if len(values) else 0.0


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def repeated_share(words: list[str]) -> float:
    """Return the share of 4-word runs that occurred before in the same text."""
    runs = list(zip(*(words[i:] for i in range(RUN_OF_WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def of_another(summaries: list[str], histories: list[list[str]]) -> list[bool]:
    """Return for each summary whether it is also that of another history; empty ones are not."""
    plain = [" ".join(summary.split()) for summary in summaries]
    owners = defaultdict(set)
    for summary, history in zip(plain, histories, strict=True):
        owners[summary].add(tuple(history))
    return [bool(summary) and len(owners[summary]) > 1 for summary in plain]


# ---- Which history a summary fits best


def own_first(summaries: list[list[str]], histories: list[list[str]], seed: int = 0) -> list[bool]:
    """Return for each summary, as words, whether it fits its own history better than any other's.

    histories: each user's item texts. A summary is compared with 23 other users, or with all if
    there are fewer.
    """
    ids: dict[str, int] = defaultdict(lambda: len(ids))
    # Items are in many histories, so each is taken apart once.
    items = {text: 0 for history in histories for text in history}
    items = {text: np.array([ids[word] for word in words_of(text)], int) for text in items}
    read = [np.concatenate([items[text] for text in history]) for history in histories]
    known = [np.array(sorted({ids[w] for w in s if w in ids}), int) for s in summaries]
    everywhere = np.bincount(np.concatenate(read), minlength=len(ids))
    frequency = everywhere / max(1, everywhere.sum())

    first = [False] * len(summaries)
    place = np.full(len(ids), -1)  # of a word, in the columns of the group at hand
    for group, n_own in groups(len(summaries), seed):
        columns = np.unique(np.concatenate([known[u] for u in group[:n_own]]))
        place[columns] = np.arange(len(columns))
        asked = np.zeros((n_own, len(columns)))
        for row, u in zip(asked, group, strict=False):
            row[place[known[u]]] = 1
        weights = [word_weights(place[read[u]], frequency[columns]) for u in group]
        place[columns] = -1

        # Rounded, so that equal histories tie however the sums were added up.
        fits = (asked @ np.array(weights).T).round(9)  # (users asked, users of the group)
        for fit, i in zip(fits, range(n_own), strict=True):
            first[group[i]] = bool(fit[i] > np.delete(fit, i).max())
    return first


def word_weights(places: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return the weight of each column's word for a history, 0 for a word that is not in it.

    places: the column of each word of the history, -1 for a word without one. frequency: each
    column's, in all histories.
    """
    counts = np.bincount(places[places >= 0], minlength=len(frequency))
    return np.log1p(counts / max(1, len(places)) / frequency)


def groups(n_users: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yield (users, n) such that each user is once among the first n of a group.

    A group has 24 users, or all if there are fewer. The last one is filled up with users who had
    their turn.
    """
    order = list(range(n_users))
    random.Random(f"quality {seed}").shuffle(order)
    for start in range(0, n_users, GROUP):
        own = order[start : start + GROUP]
        yield own + order[: min(GROUP, n_users) - len(own)], len(own)


# ---- The file, and the command


def read_quality(path: Path) -> Quality | None:
    """Return what quality.json holds, None if there is no such file; InputError if it is broken."""
    if not path.is_file():
        return None
    record = {"sound": None} | read_json(path)  # older runs did not count them
    for field in fields(Quality):
        if not isinstance(record.get(field.name, ""), field.type | int):
            what = f"field {field.name!r} is missing or not a number"
            raise InputError(f"{path}: {what}; run python summarize.py again")
    return Quality(**{field.name: record[field.name] for field in fields(Quality)})


def main() -> None:
    """Print the quality of a run's summaries."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder, after summarize.py")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the groups of 24 users")
    args = parser.parse_args()

    records = records_of(args.run)
    settings = read_config(args.run).get("summarize", {})
    if "data" not in settings:
        raise InputError(f"{args.run}: no settings of summarize.py here; run it again")
    _, items, splits = load_dataset(settings["data"], ("train", "val", "test"))
    examples = [example for split in splits.values() for example in split]
    texts = {example.user: [items[i] for i in example.history] for example in examples}
    for user, record in records.items():
        if user not in texts or record["key"] != content_hash([settings, texts[user]]):
            what = f"the summary of user {user!r} is of another history than {settings['data']}'s"
            raise InputError(f"{args.run}/summaries.jsonl: {what}; run summarize.py again")
    print(*quality_of(records, texts, args.seed).lines(), sep="\n")


if __name__ == "__main__":
    run_main(main)
