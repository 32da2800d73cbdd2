"""What an adapter was trained on, in a file beside it, and how it differs from its run."""

from collections.abc import Sequence
from pathlib import Path

from files.jsonl import read_json, write_json
from lora import LoRAConfig
from state.settings import read_config
from trsr import Example, InputError, content_hash

ORIGIN = "trained_on.json"
FIELDS = ("model", "fingerprint", "paradigm", "prompt")


def write_origin(run: Path) -> None:
    """Write what the run's adapter is trained on beside it."""
    trained = read_config(run).get("train", {})
    write_json(run / "adapter" / ORIGIN, {name: trained.get(name) for name in FIELDS})


def check_trained_on(run: Path, model: str, fingerprint: str, words: str) -> None:
    """Raise InputError unless the run was trained on that base model and with those words.

    fingerprint: of the model to be used. words: the prompt, with placeholders for texts. The
    adapter itself may say more than the run's settings, if it was copied from elsewhere.
    """
    trained = read_config(run)["train"]
    if fingerprint != trained["fingerprint"]:
        what = f"not the model that {run} was trained on ({trained['model']})"
        raise InputError(f"{model}: {what}")
    if trained.get("prompt") not in (None, words):
        what = "the prompt has other words than in training"
        raise InputError(f"{run}: {what} (config.json, 'prompt'); train it again")

    path = run / "adapter" / ORIGIN
    origin = read_json(path) if path.is_file() else {}  # other programs write none
    if origin.get("fingerprint") not in (None, fingerprint):
        what = f"the adapter was trained on another model ({origin.get('model')})"
        raise InputError(f"{path}: {what}; evaluate it with that one")


def learned_from(examples: Sequence[Example]) -> str:
    """Return a hash of the training users with their histories and targets."""
    return content_hash([[e.user, e.history, e.positive] for e in examples])


def check_learned(run: Path, data: str, examples: Sequence[Example]) -> None:
    """Raise InputError if a dataset has other training users now than when the run learned them.

    Its other splits may then have users whom the run was trained on. examples: data's train.jsonl.
    """
    trained = read_config(run)["train"]
    known = trained.get("learned")  # None: an older run
    if data == trained["data"] and known not in (None, learned_from(examples)):
        what = f"the training users are not those that {run} was trained on"
        raise InputError(f"{data}: {what}; it was prepared again, so train again in a new --run")


def differences(run: Path, config: LoRAConfig) -> str:
    """Return in words how an adapter's configuration differs from the run's settings."""
    trained = read_config(run).get("train", {})
    names = {"lora_r": config.r, "lora_alpha": config.alpha, "lora_targets": sorted(config.targets)}
    differing = []
    for name, found in names.items():
        expected = trained.get(name, found)
        if (sorted(expected) if isinstance(expected, list) else expected) != found:
            differing.append(f"{name} {found} (the run: {expected})")
    base = read_json(run / "adapter" / "adapter_config.json").get("base_model_name_or_path")
    if base not in (None, "", trained.get("model")):
        differing.append(f"base model {base} (the run: {trained.get('model')})")
    return ", ".join(differing)
