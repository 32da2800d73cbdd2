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
        if model == trained["model"]:
            what = f"its files are other ones than those that {run} was trained on; restore them"
        raise InputError(f"{model}: {what}")
    if trained.get("prompt") not in (None, words):
        what = "the prompt has other words than in training"
        raise InputError(f"{run}: {what} (config.json, 'prompt'); train it again")

    path = run / "adapter" / ORIGIN
    origin = read_json(path) if path.is_file() else {}  # other programs write none
    if origin.get("fingerprint") not in (None, fingerprint):
        what = f"the adapter was trained on another model ({origin.get('model')})"
        raise InputError(f"{path}: {what}; evaluate it with that one")


def learned_from(examples: Sequence[Example], items: dict[str, str]) -> dict[str, str]:
    """Return hashes of the training users, histories and targets, and of their items' texts."""
    shown = sorted({item for e in examples for item in (*e.history, e.positive)})
    return {
        "learned": content_hash([[e.user, e.history, e.positive] for e in examples]),
        "learned_texts": content_hash([[item, items[item]] for item in shown]),
    }


def check_learned(run: Path, data: str, examples: Sequence[Example], items: dict[str, str]) -> None:
    """Raise InputError if a dataset has other training users, or texts, than the run learned.

    Its other splits may then have users whom the run was trained on, or prompts of another kind.
    examples: data's train.jsonl. items: their texts; those of other items may change.
    """
    trained = read_config(run)["train"]
    if data != trained["data"]:
        return
    names = {"learned": "the training users are", "learned_texts": "the texts of their items are"}
    for name, found in learned_from(examples, items).items():
        if trained.get(name) not in (None, found):  # None: an older run
            what = f"{names[name]} not those that {run} was trained on"
            raise InputError(f"{data}: {what}; it was prepared again, so train in a new --run")


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
