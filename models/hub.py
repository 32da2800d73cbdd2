"""Where a model comes from: a folder, or the Hugging Face hub; and which of the architectures it is."""

from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download

import llama
from llama import CheckpointError, Llama
from models import neox

HUB_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*")


def find_model(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model: a local folder as it is, a hub id (`owner/name`) downloaded or from the cache."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except hub.GatedRepoError:
        why = "access is gated: accept its licence on the hub, then run `hf auth login`"
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        why = f"neither a folder here nor a model on the hub (revision {revision or 'main'})"
    except UnicodeError:
        why = "the hub's token is not plain text; set HF_TOKEN anew, or run `hf auth login`"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError):
        why = "not a folder here, and the hub cannot be reached; download the model and pass its folder"
    raise CheckpointError(f"{name}: {why}") from None


def load_config(folder: Path) -> llama.Config:
    """Return what a folder's config.json describes; CheckpointError for an unknown architecture."""
    path = folder / "config.json"
    kind = llama.read_json_file(path).get("model_type")
    if kind == "llama":
        return llama.load_config(folder)
    if kind == "gpt_neox":
        return neox.load_config(folder)
    raise CheckpointError(f"{path}: model_type is {kind!r}, only 'llama' and 'gpt_neox' are supported")


def build_model(folder: Path) -> Llama:
    """Return the model that a folder's config.json describes, without weights; CheckpointError as load_config."""
    config = load_config(folder)
    return neox.GPTNeoX(config) if isinstance(config, neox.Config) else Llama(config)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, **options) -> Llama:
    """Return llama.load_model's model, of whichever architecture."""
    return llama.load_model(folder, device, dtype, build=build_model, **options)
