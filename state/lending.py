"""Summaries of one run for the training of another, so that many need only one summarizing."""

from pathlib import Path

from state.settings import read_config
from trsr import SUMMARIZED, InputError


def summarized(source: Path | None, run: Path) -> dict:
    """Return the settings of the summaries of source, or without one of run; {} if it has none.

    Raises InputError if source has no summaries.
    """
    if source is None:
        return read_config(run).get("summarize", {})
    settings, path = read_config(source).get("summarize"), source / "summaries.jsonl"
    if not settings or not path.is_file():
        raise InputError(f"{path}: no summaries; first run python summarize.py --run {source}")
    return settings


def lender_of(settings) -> Path:
    """Return the folder whose summaries a script reads: its run, or with --summaries another.

    settings: of a script; train.py's alone has summaries. Raises InputError if those are of another
    paradigm, or if the run has others of its own.
    """
    source, run, paradigm = getattr(settings, "summaries", None), settings.run, settings.paradigm
    if source is None or (run.is_dir() and source.samefile(run)):
        return run
    if paradigm not in SUMMARIZED:
        raise InputError(f"--summaries {source}: --paradigm {paradigm} shows none; leave it out")
    made, path = summarized(source, run)["paradigm"], source / "summaries.jsonl"
    if made != paradigm:
        what = f"summaries of --paradigm {made}, not {paradigm}"
        raise InputError(f"{path}: {what}; choose another --summaries or --paradigm")
    own = run / path.name
    if own.is_file() and not own.samefile(path) and own.read_bytes() != path.read_bytes():
        what = f"not the summaries of {source}"
        raise InputError(f"{own}: {what}; leave out --summaries, or choose another --run")
    return source
