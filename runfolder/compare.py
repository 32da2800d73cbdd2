"""Compare runs on the same users, in one table.

    python -m runfolder.compare runs/demo runs/demo-recurrent

The rows are a random order, popularity, the untrained model if it was evaluated, and the runs. A
run is named after its paradigm, and after its folder too if another run has the same paradigm. A
second table has the differences between the first run and each other one, user by user.
"""

import argparse
from pathlib import Path

from files.jsonl import read_json, read_jsonl
from launch.command import Help, run_main
from runfolder.scores import paired_differences
from trsr import InputError

SCORES = "scores-test.jsonl"
COLUMNS = 100  # of a printed table


def results_of(run: Path) -> dict:
    """Return a run's results.json; InputError if the run was not evaluated."""
    path = run / "results.json"
    if not path.is_file():
        raise InputError(f"{path}: no results; first run python evaluate.py --run {run}")
    return read_json(path)


def rows_of(runs: list[Path]) -> tuple[dict, dict[str, dict]]:
    """Return the first run's results, and all rows by name.

    Raises InputError if the runs differ in users or metrics.
    """
    found = {run: results_of(run) for run in runs}
    first = found[runs[0]]
    for run, results in found.items():
        same = all(results[name] == first[name] for name in ("data", "split", "users"))
        if not same or results["table"]["random"].keys() != first["table"]["random"].keys():
            what = f"other users, or other --k, than {runs[0]}; evaluate them alike"
            raise InputError(f"{run}: {what}")

    rows = {"random": first["table"]["random"], "popularity": first["table"]["popularity"]}
    for run in runs:
        path = run / "results-untrained.json"
        if path.is_file():
            untrained = read_json(path)
            rows[f"untrained ({untrained['paradigm']})"] = untrained["table"]["untrained"]
    for run, name in row_names(found).items():
        rows[name] = found[run]["table"][found[run]["row"]]
    return first, rows


def row_names(found: dict[Path, dict]) -> dict[Path, str]:
    """Return the name of each run's row; found: their results."""
    paradigms = [results["paradigm"] for results in found.values()]
    folders = [run.name for run in found]
    names = {}
    for run, results in found.items():
        name = results["paradigm"]
        folder = run if folders.count(run.name) > 1 else run.name
        names[run] = f"{name} ({folder})" if paradigms.count(name) > 1 else name
    return names


def differences_of(runs: list[Path]) -> dict[str, dict]:
    """Return the differences between the first run and each other one, by the other's row.

    Raises InputError if a run has no scores-test.jsonl, or if the scores are of other users.
    """
    found = {run: results_of(run) for run in runs}
    first, *others = runs
    names = found[first]["table"]["random"]
    ks = [int(name.split("@")[1]) for name in names if name.startswith("Recall")]
    own = ranks_by_user(first)
    rows = {}
    for run in others:
        ranks = ranks_by_user(run)
        if ranks.keys() != own.keys():
            what = f"its users are not those of {first}; evaluate them alike"
            raise InputError(f"{run / SCORES}: {what}")
        pair = [ranks[user] for user in own], list(own.values())
        rows[row_names(found)[run]] = paired_differences(*pair, ks)
    return rows


def ranks_by_user(run: Path) -> dict[str, int]:
    """Return the rank of each test user's positive."""
    return {r["user"]: r["rank"] for _, r in read_jsonl(run / SCORES, {"user": str, "rank": int})}


def format_table(rows: dict[str, dict], signed: bool = False) -> str:
    """Return a table of rows (name -> metric -> {"mean", "interval"}), of at most 100 columns.

    A row is a line of means, with a line of intervals below it. Metrics that find no room in one
    line follow in another block. signed: for differences.
    """
    names, width = list(next(iter(rows.values()))), 2 + max(map(len, rows))
    wide = 18 if signed else 12
    size, lines = max(1, (COLUMNS - width) // wide), []
    kinds = len({name.split("@")[0] for name in names})
    per_kind = len(names) // kinds
    if per_kind <= size < len(names):  # what belongs together stays in one block
        size -= size % per_kind
    for start in range(0, len(names), size):
        lines += table_block(rows, names[start : start + size], width, wide)
    return "\n".join(lines)


def table_block(rows: dict[str, dict], names: list[str], width: int, wide: int) -> list[str]:
    """Return the lines of some metrics; width and wide: of the first column and the others."""
    sign, between = ("+", " to ") if wide > 12 else ("", "-")
    lines = [" " * width + "".join(f"{name:>{wide}}" for name in names)]
    for title, metrics in rows.items():
        means = "".join(f"{metrics[name]['mean']:>{sign}{wide}.4f}" for name in names)
        lines.append(f"{title:<{width}}{means}")
        if "interval" in metrics[names[0]]:
            pairs = (metrics[name]["interval"] for name in names)
            intervals = (f"{low:{sign}.3f}{between}{high:{sign}.3f}" for low, high in pairs)
            lines.append(" " * width + "".join(f"{interval:>{wide}}" for interval in intervals))
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, after evaluate.py")
    runs = list(dict.fromkeys(parser.parse_args().runs))
    first, rows = rows_of(runs)
    users = f"{first['users']} users of {first['data']}/{first['split']}.jsonl"
    print(f"{users}; below each mean is its 95 % interval")
    print(format_table(rows))
    if len(runs) > 1:
        names = row_names({run: results_of(run) for run in runs})
        print(f"\ndifferences from {names[runs[0]]}, user by user; below each its 95 % interval")
        print(format_table(differences_of(runs), signed=True))


if __name__ == "__main__":
    run_main(main)
