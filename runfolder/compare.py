"""Compare runs on the same users: one table with random, popularity, the untrained model where it was evaluated, and
each run by the name of its folder and what its prompts tell of the user.

    python -m runfolder.compare runs/demo runs/demo-recurrent
"""

import argparse
from pathlib import Path

from files.jsonl import read_json
from launch.command import run_main
from trsr import InputError


def results_of(run: Path, untrained: bool = False) -> dict | None:
    """Return a run's results.json; None where the untrained model was not evaluated, InputError without results."""
    path = run / ("results-untrained.json" if untrained else "results.json")
    if path.is_file():
        return read_json(path)
    if untrained:
        return None
    raise InputError(f"{path}: no results; first run python evaluate.py --run {run}")


def rows_of(runs: list[Path]) -> tuple[dict, dict[str, dict]]:
    """Return the first run's results and all rows by name; InputError where the runs' users or metrics differ."""
    found = {run: results_of(run) for run in runs}
    first = found[runs[0]]
    for run, results in found.items():
        same = [results[name] == first[name] for name in ("data", "split", "users")]
        if not all(same) or results["table"]["random"].keys() != first["table"]["random"].keys():
            raise InputError(
                f"{run}: other users, or other --k, than {runs[0]}; evaluate them alike"
            )
    rows = {"random": first["table"]["random"], "popularity": first["table"]["popularity"]}
    for run in runs:
        if before := results_of(run, untrained=True):
            rows[f"untrained ({before['paradigm']})"] = before["table"]["untrained"]
    names = [results["paradigm"] for results in found.values()]
    for run, results in found.items():
        name = (
            results["paradigm"]
            if names.count(results["paradigm"]) == 1
            else f"{results['paradigm']} ({run.name})"
        )
        rows[name] = results["table"][results["row"]]
    return first, rows


def format_table(rows: dict[str, dict]) -> str:
    """Return rows (name -> metric -> {"mean", "interval"}) as a table, a line a row and its intervals below it."""
    names, width = list(next(iter(rows.values()))), 2 + max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in names)]
    for title, metrics in rows.items():
        lines.append(
            f"{title:<{width}}" + "".join(f"{metrics[name]['mean']:>13.4f}" for name in names)
        )
        if "interval" in metrics[names[0]]:
            pairs = (metrics[name]["interval"] for name in names)
            lines.append(
                " " * width + "".join(f"{f'{low:.3f}-{high:.3f}':>13}" for low, high in pairs)
            )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, after evaluate.py")
    first, rows = rows_of(parser.parse_args().runs)
    print(
        f"{first['users']} users of {first['data']}/{first['split']}.jsonl; below each mean its 95 % interval"
    )
    print(format_table(rows))


if __name__ == "__main__":
    run_main(main)
