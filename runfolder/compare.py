"""Compare runs on the same users: one table with random, popularity, the untrained model where it was evaluated, and
each run by the name of its folder and what its prompts tell of the user.

    python -m runfolder.compare runs/demo runs/demo-recurrent
"""

import argparse
from pathlib import Path

from prepare.dataset import read_json
from trsr import InputError, run_main


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
            raise InputError(f"{run}: other users, or other --k, than {runs[0]}; evaluate them alike")
    rows = {"random": first["table"]["random"], "popularity": first["table"]["popularity"]}
    for run in runs:
        if before := results_of(run, untrained=True):
            rows[f"untrained ({before['paradigm']})"] = before["table"]["untrained"]
    names = [results["paradigm"] for results in found.values()]
    for run, results in found.items():
        name = results["paradigm"] if names.count(results["paradigm"]) == 1 else f"{results['paradigm']} ({run.name})"
        rows[name] = results["table"][results["row"]]
    return first, rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, after evaluate.py")
    first, rows = rows_of(parser.parse_args().runs)
    names = [name for name in first["table"]["random"] if not name.startswith("NDCG")]
    width = 2 + max(map(len, rows))
    print(f"{first['users']} users of {first['data']}/{first['split']}.jsonl")
    print(" " * width + "".join(f"{name:>11}" for name in names) + "   95 % interval of the first")
    for title, row in rows.items():
        low_high = "-".join(f"{x:.3f}" for x in row[names[0]].get("interval", ()))
        print(f"{title:<{width}}" + "".join(f"{row[name]['mean']:>11.4f}" for name in names) + f"   {low_high}")


if __name__ == "__main__":
    run_main(main)
