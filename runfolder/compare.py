"""Compare runs on the same users, in one table.

    python -m runfolder.compare runs/demo runs/demo-recurrent

The rows are a random order, popularity, the untrained model if it was evaluated, and the runs. A
run is named after its paradigm, and after its folder too if another run has the same paradigm.
"""

import argparse
from pathlib import Path

from files.jsonl import read_json
from launch.command import Help, run_main
from trsr import InputError


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
    paradigms = [results["paradigm"] for results in found.values()]
    for run, results in found.items():
        name = results["paradigm"]
        if paradigms.count(name) > 1:
            name = f"{name} ({run.name})"
        rows[name] = results["table"][results["row"]]
    return first, rows


def format_table(rows: dict[str, dict]) -> str:
    """Return a table of rows (name -> metric -> {"mean", "interval"}).

    A row is a line of means, with a line of intervals below it.
    """
    names, width = list(next(iter(rows.values()))), 2 + max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in names)]
    for title, metrics in rows.items():
        means = "".join(f"{metrics[name]['mean']:>13.4f}" for name in names)
        lines.append(f"{title:<{width}}{means}")
        if "interval" in metrics[names[0]]:
            pairs = (metrics[name]["interval"] for name in names)
            intervals = (f"{low:.3f}-{high:.3f}" for low, high in pairs)
            lines.append(" " * width + "".join(f"{interval:>13}" for interval in intervals))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, after evaluate.py")
    first, rows = rows_of(parser.parse_args().runs)
    users = f"{first['users']} users of {first['data']}/{first['split']}.jsonl"
    print(f"{users}; below each mean is its 95 % interval")
    print(format_table(rows))


if __name__ == "__main__":
    run_main(main)
