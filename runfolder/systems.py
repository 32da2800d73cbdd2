"""Another system's scores, in a file like scores-test.jsonl: the same table of them."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import trsr
from batches.candidates import about_candidates, with_candidates
from files.jsonl import read_jsonl
from launch.embedded import DATA
from prepare.dataset import load_dataset
from runfolder.compare import format_table
from runfolder.results import Question, check_replaced, parts_of, write_table
from runfolder.scores import table_of
from state.settings import read_config
from trsr import Example, InputError

LARGEST = sys.float_info.max  # of a score; JSON's numbers can be larger


def rank_by_file(settings) -> None:
    """Print the table of the scores in settings.scores, and write it to RUN/results-NAME.json.

    settings: evaluate.py's, of which only the run, the users and the metrics matter here.
    """
    if settings.report:
        raise InputError("--report shows a model's prompts; leave it out with --scores")
    data = settings.data or read_config(settings.run).get("train", {}).get("data", DATA)
    _, items, splits = load_dataset(data, ("train", settings.split))
    shown, name = splits[settings.split][: settings.users], settings.scores.stem
    parts = [name, *parts_of(settings.candidates, settings.users, settings.seed)]
    question = Question(settings.run, settings.split, parts)
    check_replaced(question, data, None, settings.candidates)
    examples = with_candidates(settings.candidates, shown, items, settings.seed)
    ranks = ranks_of_file(settings.scores, examples)
    table = table_of(name, ranks, examples, splits["train"], settings.k, settings.seed)
    print(format_table(table))
    about = {"data": data, "split": settings.split, "users": len(examples), "row": name}
    about |= {"paradigm": name, "table": table}
    about |= about_candidates(settings.candidates, examples, settings.seed)
    print(f"wrote   {', '.join(map(str, write_table(question, about, settings.csv)))}")


def ranks_of_file(path: Path, examples: Sequence[Example]) -> list[int]:
    """Return the positive's rank of each example by lines {"user", "candidates", "scores"}.

    The lines may be in any order. InputError if a user is missing, if the candidates are not the
    example's positive and negatives, or if a score is not a finite number.
    """
    wanted = {example.user: example for example in examples}
    seen, ranks = set(), {}
    for where, record in read_jsonl(path, {"user": str, "candidates": list}):
        user, scores = record["user"], scores_of(where, record)
        if user in seen:
            raise InputError(f"{where}: field 'user': {user!r} is there twice")
        seen.add(user)
        if user not in wanted:
            continue
        example = wanted[user]
        expected = {example.positive, *example.negatives}
        if scores.keys() != expected:
            odd = sorted(scores.keys() ^ expected)[0]
            what = f"{odd!r} is not there on one side; expected those that are to be ranked"
            raise InputError(f"{where}: field 'candidates': {what}")
        place = list(scores).index(example.positive)
        ranks[user] = trsr.rank_of_positive([float(score) for score in scores.values()], place)

    if missing := [example.user for example in examples if example.user not in ranks]:
        raise InputError(f"{path}: user {missing[0]!r} is missing")
    return [ranks[example.user] for example in examples]


def scores_of(where: str, record: dict) -> dict[str, float]:
    """Return a line's scores by candidate; InputError unless each has a finite number."""
    scores = record.get("scores")
    if not isinstance(scores, list) or len(scores) != len(record["candidates"]):
        what = "expected a list with a number for each candidate"
        raise InputError(f"{where}: field 'scores', {what}")
    if len(set(record["candidates"])) < len(scores):
        twice = next(i for i, n in Counter(record["candidates"]).items() if n > 1)
        raise InputError(f"{where}: field 'candidates' names {twice!r} twice")
    if not all(type(x) in (int, float) and abs(x) <= LARGEST for x in scores):
        raise InputError(f"{where}: field 'scores' holds something that is no finite number")
    return dict(zip(record["candidates"], scores, strict=True))
