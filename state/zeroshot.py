"""What a model is asked that was not trained: what a training's settings say otherwise."""

from pathlib import Path

from launch.embedded import DATA, MODEL
from prepare.dataset import default_model
from state.settings import read_config
from trsr import InputError

# How a training asks, unless a flag says otherwise.
PROMPT = {"paradigm": "recent-only", "history_items": 3, "max_length": 2048, "chat": False}


def untrained_settings(run: Path, data: str | None, model: str | None) -> dict:
    """Return the settings of a run without a training, with those of its summaries if it has any.

    data and model: what the user named. Raises InputError if there is no model for the data.
    """
    summarized = read_config(run).get("summarize", {})
    known = {name: summarized[name] for name in ("data", "model", "paradigm") if name in summarized}
    data = data or known.get("data", DATA)
    model = model or known.get("model") or default_model(data, MODEL)
    return PROMPT | known | {"data": data, "model": model}


def check_prompt_flags(run: Path, trained: dict, flags: dict) -> None:
    """Raise InputError for a flag that asks in another way than the run was trained with.

    flags: the values that were given, of those in PROMPT, by name.
    """
    for name, value in flags.items():
        if value != trained.get(name, PROMPT[name]):
            flag = "--" + name.replace("_", "-")
            what = f"{run} was trained with {trained.get(name, PROMPT[name])}"
            way = "leave it out, or choose another --run"
            raise InputError(f"{flag} {value}: {what}; {way}")
