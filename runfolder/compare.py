"""Compare runs on the same users, in one table.

    python -m runfolder.compare runs/demo runs/demo-recurrent
    python -m runfolder.compare runs/demo runs/demo-recurrent --candidates all --csv both.csv

The rows are a random order, popularity, the untrained model if it was evaluated, and the runs. A
run is named after its paradigm, and after its folder too if another run has the same paradigm. A
second table has the differences between the first run and each other one, user by user. Below it
is whether they are significant: by Wilcoxon's signed-rank test on the users' NDCG at the largest k,
without the users who have no difference, corrected by Holm for the number of rows.
"""

import re
from dataclasses import replace
from pathlib import Path

from batches.candidates import choice, name_of
from files.jsonl import read_json, read_jsonl
from files.sheet import TABLE, table_rows, write_csv
from launch.command import Parser, run_main
from runfolder.results import Question, same_question
from runfolder.scores import paired_differences, tested_metric, told_apart
from runfolder.told_apart import LEVEL
from trsr import InputError

COLUMNS_OF_CSV = ("table", *TABLE, "p", "holm")
COLUMNS, TITLE = 100, 40  # of a printed table, and of a row's name in it


def question_of(run: Path, candidates: str = "") -> Question:
    """Return what the run's evaluation asked, of the untrained model if it was alone.

    candidates: what the file names say, such as "all" or "val", or the value of evaluate.py's
    flag; nothing for the dataset's own. InputError if the run was not evaluated.
    """
    name, split = candidates, "test"
    if candidates.isdecimal() or Path(candidates).is_file():
        name = name_of(choice(candidates))
    elif match := re.fullmatch("val(?:-(.*))?", candidates):  # as Question names them
        split, name = "val", match[1]
    names = [name] if name else []
    trained = Question(run, split, names)
    untrained = Question(run, split, ["untrained", *names])
    found = [question for question in (trained, untrained) if question.results.is_file()]
    if not found:
        flag = f" --candidates {candidates}" if candidates else ""
        way = f"first run python evaluate.py --run {run}{flag}"
        if Question(run, split, ["interim", *names]).results.is_file():
            way = f"its training is unfinished; add --candidates {'-'.join(['interim', *names])}"
        raise InputError(f"{trained.results}: no results; {way}")
    return found[0]


def rows_of(runs: list[Path], candidates: str = "") -> tuple[dict, dict[str, dict]]:
    """Return the first run's results, and all rows by name.

    Raises InputError if the runs differ in users, candidates or metrics.
    """
    found = {run: read_json(question_of(run, candidates).results) for run in runs}
    first, unlike = found[runs[0]], f"other users, positives, candidates or --k than {runs[0]}"
    for run, results in found.items():
        if not same_question(results, first):
            raise InputError(f"{run}: {unlike}; evaluate them alike")

    rows = {"random": first["table"]["random"], "popularity": first["table"]["popularity"]}
    for run in runs:
        question = question_of(run, candidates)
        path = replace(question, parts=["untrained", *question.parts]).results
        if path.is_file() and found[run]["row"] != "untrained":
            untrained = read_json(path)
            if not same_question(untrained, first):
                raise InputError(f"{path}: {unlike}; evaluate alike, or remove it")
            name, row = f"untrained ({untrained['paradigm']})", untrained["table"]["untrained"]
            if rows.get(name, row) != row:  # another base model's
                name = f"untrained ({untrained['paradigm']}, {run})"
            rows[name] = row
    for run, name in row_names(found).items():
        rows[name] = found[run]["table"][found[run]["row"]]
    return first, rows


def row_names(found: dict[Path, dict]) -> dict[Path, str]:
    """Return the name of each run's row; found: their results."""
    kinds = {run: results["paradigm"] for run, results in found.items()}
    for run, results in found.items():
        if results["row"] == "untrained":
            kinds[run] = f"untrained ({kinds[run]})"
    every, folders = list(kinds.values()), [run.name for run in found]
    names = {}
    for run, name in kinds.items():
        folder = run if folders.count(run.name) > 1 else run.name
        names[run] = f"{name} ({folder})" if every.count(name) > 1 else name
    return names


def ranks_of(runs: list[Path], candidates: str = "") -> dict[str, list[int]]:
    """Return each run's ranks of the same users in the same order, by the run's row.

    Raises InputError if a run has no scores, or if the scores are of other users.
    """
    names = row_names({run: read_json(question_of(run, candidates).results) for run in runs})
    own: list[str] = []  # the first run's users
    found = {}
    for run in runs:
        path = question_of(run, candidates).scores
        ranks = ranks_by_user(path)
        own = own or list(ranks)
        if ranks.keys() != set(own):
            what = f"its users are not those of {runs[0]}; evaluate them alike"
            raise InputError(f"{path}: {what}")
        found[names[run]] = [ranks[user] for user in own]
    return found


def ranks_by_user(path: Path) -> dict[str, int]:
    """Return the rank of each user's positive."""
    return {r["user"]: r["rank"] for _, r in read_jsonl(path, {"user": str, "rank": int})}


def cutoffs(results: dict) -> list[int]:
    """Return the cut-offs of a table's metrics."""
    names = results["table"]["random"]
    return [int(name.split("@")[1]) for name in names if name.startswith("Recall")]


def differences_of(runs: list[Path], candidates: str = "") -> dict[str, dict]:
    """Return the differences between the first run and each other one, by the other's row.

    Raises InputError if a run has no scores, or if the scores are of other users.
    """
    ks = cutoffs(read_json(question_of(runs[0], candidates).results))
    (_, first), *others = ranks_of(runs, candidates).items()
    return {name: paired_differences(ranks, first, ks) for name, ranks in others}


def verdicts_of(runs: list[Path], candidates: str = "") -> dict[str, dict[str, float]]:
    """Return the test of each other run against the first, as {"p", "holm"} by its row."""
    ks = cutoffs(read_json(question_of(runs[0], candidates).results))
    (_, first), *others = ranks_of(runs, candidates).items()
    found = told_apart(first, [ranks for _, ranks in others], ks)
    return {name: test for (name, _), test in zip(others, found, strict=True)}


def format_table(rows: dict[str, dict], signed: bool = False) -> str:
    """Return a table of rows (name -> metric -> {"mean", "interval"}), of at most 100 columns.

    A row is a line of means, with a line of intervals below it. Metrics that find no room in one
    line follow in another block. signed: for differences.
    """
    names, width = list(next(iter(rows.values()))), first_column(rows)
    wide = 18 if signed else 12
    size, lines = max(1, (COLUMNS - width) // wide), []
    kinds = len({name.split("@")[0] for name in names})
    per_kind = len(names) // kinds
    if per_kind <= size < len(names):  # what belongs together stays in one block
        size -= size % per_kind
    for start in range(0, len(names), size):
        lines += table_block(rows, names[start : start + size], width, wide)
    return "\n".join(lines)


def first_column(rows: dict[str, dict]) -> int:
    """Return the width of the names' column; a name that is longer has a line of its own."""
    return 2 + min(TITLE, max(map(len, rows)))


def titled(title: str, width: int) -> tuple[list[str], str]:
    """Return the lines before a row, and what the row begins with."""
    return ([title], " " * width) if len(title) > width - 2 else ([], f"{title:<{width}}")


def table_block(rows: dict[str, dict], names: list[str], width: int, wide: int) -> list[str]:
    """Return the lines of some metrics; width and wide: of the first column and the others."""
    sign, between = ("+", " to ") if wide > 12 else ("", "-")
    lines = [" " * width + "".join(f"{name:>{wide}}" for name in names)]
    for title, metrics in rows.items():
        means = "".join(f"{metrics[name]['mean']:>{sign}{wide}.4f}" for name in names)
        above, begin = titled(title, width)
        lines += [*above, begin + means]
        if "interval" in metrics[names[0]]:
            pairs = (metrics[name]["interval"] for name in names)
            intervals = (f"{low:{sign}.3f}{between}{high:{sign}.3f}" for low, high in pairs)
            lines.append(" " * width + "".join(f"{interval:>{wide}}" for interval in intervals))
    return lines


def format_tests(tests: dict[str, dict], first: str, metric: str) -> str:
    """Return a line per row: p, corrected, and whether the row differs from the first."""
    width = first_column(tests)
    lines = [
        f"Wilcoxon's signed-rank test on {metric}, by Holm for {len(tests)} rows together;",
        f"the difference from {first}:",
    ]
    for name, test in tests.items():
        verdict = "significant" if test["holm"] <= LEVEL else "not significant"
        above, begin = titled(name, width)
        lines += [*above, f"{begin}p {test['p']:.3g}, corrected {test['holm']:.3g}: {verdict}"]
    return "\n".join(lines)


def csv_rows(
    table: dict[str, dict], differences: dict[str, dict], tests: dict[str, dict]
) -> list[list]:
    """Return the lines of a CSV file with the columns COLUMNS_OF_CSV."""
    lines = [["mean", *row] for row in table_rows(table)]
    for row in table_rows(differences):
        lines.append(["difference", *row, tests[row[0]]["p"], tests[row[0]]["holm"]])
    return [line + [None] * (len(COLUMNS_OF_CSV) - len(line)) for line in lines]


def check_csv(path: Path | None) -> None:
    """Raise InputError for a file that is there and that this command did not write."""
    if path and path.is_file():
        with open(path, errors="replace") as file:
            if not file.readline().startswith(",".join(COLUMNS_OF_CSV[:2])):
                what = "is no table of this command, and would be replaced"
                raise InputError(f"--csv {path}: {what}; choose another file")


def main() -> None:
    """Print the tables."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, after evaluate.py")
    parser.add_argument(
        "--candidates", default="", help="of evaluations with these: what their files are named"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the tables as CSV too")
    asked = parser.parse_args()
    runs, candidates = list(dict.fromkeys(asked.runs)), asked.candidates
    check_csv(asked.csv)
    first, rows = rows_of(runs, candidates)
    users = f"{first['users']} users of {first['data']}/{first['split']}.jsonl"
    mean = first.get("mean_candidates")  # None: the dataset's own
    among = f", {mean:.10g} candidates each" if mean else ""
    print(f"{users}{among}; below each mean is its 95 % interval")
    print(format_table(rows))
    differences, tests = {}, {}
    if len(runs) > 1:
        differences, tests = differences_of(runs, candidates), verdicts_of(runs, candidates)
        name = next(iter(ranks_of(runs, candidates)))
        print(f"\ndifferences from {name}, user by user; below each its 95 % interval")
        print(format_table(differences, signed=True))
        print(f"\n{format_tests(tests, name, tested_metric(cutoffs(first)))}")
    if asked.csv:
        write_csv(asked.csv, COLUMNS_OF_CSV, csv_rows(rows, differences, tests))
        print(f"wrote   {asked.csv}")


if __name__ == "__main__":
    run_main(main)
