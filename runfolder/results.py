"""The files that an evaluation writes, whose names say what was asked.

    results.json            the table of the trained model on all test users
    scores-test.jsonl       a line per user
    report.html             both, for a browser
    results.csv, scores-test.csv    both, for a spreadsheet

The names say what differs from that question, so that no evaluation replaces another's files:
results-untrained.json, results-val.json, results-20-users.json, results-mind.json (other data),
results-interim.json (before the last epoch), results-all.json (all of the catalogue is ranked).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batches.candidates import Choice, name_of
from files.jsonl import read_json, read_jsonl, write_json, write_jsonl
from files.sheet import TABLE, table_rows, write_csv
from runfolder.tally import Ranked, answer_mass
from trsr import Example, InputError

RANKING = ("user", "place", "candidate", "score", "positive")  # the columns of a CSV file of scores


@dataclass(frozen=True)
class Question:
    """What an evaluation asks: which users are ranked, and by which model."""

    run: Path
    split: str = "test"
    parts: Sequence[str] = ()  # what differs from the run's own trained model and data

    def _path(self, name: str, ending: str) -> Path:
        split = [self.split] if self.split != "test" or name == "scores" else []
        return self.run / ("-".join([name, *split, *self.parts]) + ending)

    @property
    def results(self) -> Path:
        """The path of the table."""
        return self._path("results", ".json")

    @property
    def scores(self) -> Path:
        """The path of the users' lines."""
        return self._path("scores", ".jsonl")

    @property
    def report(self) -> Path:
        """The path of the page."""
        return self._path("report", ".html")


def parts_of(
    candidates: Choice, users: int | None = None, seed: int = 0, fp8: bool = False
) -> list[str]:
    """Return what the flags of an evaluation add to the names of its files, in order."""
    parts = [name_of(candidates, seed), f"{users}-users" if users else "", "fp8" if fp8 else ""]
    return [part for part in parts if part]


def check_replaced(question: Question, data: str, model: str | None, chosen: Choice) -> None:
    """Raise InputError if files of these names are there that answer another question.

    data, model, chosen: the dataset, the model or None for another system, and the candidates.
    """
    if not question.results.is_file():
        return
    found = read_json(question.results)
    file = str(chosen) if isinstance(chosen, Path) else None
    asked = {"data": data, "model": model, "candidates_file": file}
    for name, value in asked.items():
        if (before := found.get(name)) is None and name == "candidates_file":
            continue
        if before != value and not same_path(before, value):
            what = f"is of {name} {before}, not of {value}"
            way = "move or remove it, or choose another --run"
            raise InputError(f"{question.results}: {what}, and would be replaced; {way}")


def same_path(one: str | None, other: str | None) -> bool:
    """Return whether two names are of the same file or folder."""
    return None not in (one, other) and Path(one).resolve() == Path(other).resolve()


def same_question(one: dict, other: dict) -> bool:
    """Return whether two tables are of the same users, positives, candidates and metrics."""
    names = ["data", "split", "users", "candidates", "mean_candidates"]
    if "ranked" in one and "ranked" in other:  # older files lack the hash of who is ranked
        names.append("ranked")
    same = all(one.get(name) == other.get(name) for name in names)
    return same and one["table"]["random"].keys() == other["table"]["random"].keys()


# ---- What they hold


def write_results(
    question: Question,
    about: dict,
    examples: Sequence[Example],
    ranked: Sequence[Ranked],
    csv: bool = False,
) -> list[Path]:
    """Write a line per user, and the table; return the paths.

    about: what the table's file says, the table itself under "table". csv: both as CSV too, as
    is done anyway if they are there: older values beside the new ones would mislead.
    """
    question.run.mkdir(parents=True, exist_ok=True)  # not there yet if nothing was trained
    write_jsonl(question.scores, (line_of(*pair) for pair in zip(examples, ranked, strict=True)))
    # Rounded, since the order of the packs may change the last digits.
    about |= {"users": len(examples), "answer_mass": round(answer_mass(ranked), 6)}
    written = [*write_table(question, about, csv), question.scores]
    path = question.scores.with_suffix(".csv")
    if csv or path.is_file():
        write_csv(path, RANKING, ranking_rows(question.scores))
        written.append(path)
    return written


def write_table(question: Question, about: dict, csv: bool = False) -> list[Path]:
    """Write the table, under "table" of about, and as CSV too if csv or there; return the paths."""
    question.run.mkdir(parents=True, exist_ok=True)
    write_json(question.results, about)
    path = question.results.with_suffix(".csv")
    if not csv and not path.is_file():
        return [question.results]
    write_csv(path, TABLE, table_rows(about["table"]))
    return [question.results, path]


def line_of(example: Example, ranked: Ranked) -> dict:
    """Return a user's line: the candidates and their probabilities, and the positive's rank."""
    line = {"user": example.user, "positive": example.positive, "rank": ranked.rank}
    if ranked.best_first:  # so the list may end before the positive
        line |= {"score": ranked.positive_score, "ranked": ranked.number}
    line |= {"candidates": ranked.candidates, "scores": ranked.scores}
    return line | {"prompt_tokens": ranked.prompt_tokens}


def ranking_rows(path: Path) -> Iterator[list]:
    """Yield a line per user and candidate of a file of scores, each user's best candidate first.

    The place of the positive is its rank. If it is not among those in the file, it comes last.
    """
    for _, line in read_jsonl(path, {"user": str, "candidates": list}):
        pairs = zip(line["scores"], line["candidates"], strict=True)
        # As in its rank, ties count against the positive.
        order = sorted(pairs, key=lambda pair: (-pair[0], pair[1] == line["positive"]))
        for place, (score, item) in enumerate(order, 1):
            positive = item == line["positive"]
            yield [line["user"], line["rank"] if positive else place, item, score, int(positive)]
        if line["positive"] not in line["candidates"]:
            yield [line["user"], line["rank"], line["positive"], line["score"], 1]


def tell(ranked: Sequence[Ranked], trimmed: dict[str, int]) -> None:
    """Print what is worth knowing of the prompts."""
    share = f"{answer_mass(ranked):.1%} of the probability of the next token"
    print(f"Yes and No together have {share}")
    for what, number in trimmed.items():
        print(f"trimmed to the context: {number} {what}")
