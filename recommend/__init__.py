"""Recommendations for users who are in no dataset: histories in, ranked items out.

    from recommend import load_run          # or python -m recommend --help

Belongs here: reading such users and what is recommended to them, and a run as an object with
functions. Does not: measuring a run on a dataset (evaluate.py), or how its prompts are made and
scored, which is evaluate.py's and summarize.py's own code.
"""

from pathlib import Path


def load_run(run: Path | str):
    """Return the trained run in a folder, as a recommend.__main__.Run.

    It has .summarize(history) and .rank(history, candidates, top). Raises InputError if nothing
    was trained there, and CheckpointError for a model that cannot be had.
    """
    # Only now, since a script is not imported by what is not one.
    from recommend.__main__ import Run

    return Run(Path(run))
