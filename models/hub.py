"""Where a model comes from, a folder or the Hugging Face hub, and which architecture it has."""

from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import snapshot_download

import llama
from llama import CheckpointError, Llama
from lora import ATTENTION
from models import neox
from models.chat import Form, form_of
from models.tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that --dtype has
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def find_model(name: str, revision: str | None = None) -> Path:
    """Return a model's folder: a local one as it is, a hub id (`owner/name`) downloaded once.

    Raises CheckpointError, which says why a model cannot be had and what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such model folder")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except hub.GatedRepoError:
        why = "access is gated: accept its license on the hub, then run `hf auth login`"
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError):
        why = f"neither a folder here nor a model on the hub (revision {revision or 'main'})"
    except UnicodeError:
        why = "the hub token is not plain text; set HF_TOKEN again, or run `hf auth login`"
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, OSError):
        way = "download the model and pass its folder"
        why = f"not a folder here, and the hub cannot be reached; {way}"
    raise CheckpointError(f"{name}: {why}") from None


def load_config(folder: Path) -> llama.Config:
    """Return a folder's configuration; CheckpointError for an unknown architecture."""
    path = folder / "config.json"
    kind = llama.read_json_file(path).get("model_type")
    if kind == "llama":
        return llama.load_config(folder)
    if kind == "gpt_neox":
        return neox.load_config(folder)
    known = "only 'llama' and 'gpt_neox' are supported"
    raise CheckpointError(f"{path}: model_type is {kind!r}, {known}")


def build_model(folder: Path) -> Llama:
    """Return the model that a folder's config.json describes, without its weights."""
    config = load_config(folder)
    return neox.GPTNeoX(config) if isinstance(config, neox.Config) else Llama(config)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, **options) -> Llama:
    """Return llama.load_model's model, of whichever architecture the folder has."""
    return llama.load_model(folder, device, dtype, build=build_model, **options)


def load_form(folder: Path, chat: bool) -> Form:
    """Return how a folder's model is asked: the plain form, or that of its chat template."""
    return form_of(folder, Tokenizer(folder, load_config(folder).vocab_size), chat)


def attention_names(folder: Path) -> tuple[str, ...]:
    """Return the names of attention's linear layers, which an adapter changes by default."""
    neox_layers = isinstance(load_config(folder), neox.Config)
    return ("query_key_value", "dense") if neox_layers else ATTENTION
