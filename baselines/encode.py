"""Frozen embeddings of texts, from a sentence encoder or from a Llama's own hidden states.

    python -m baselines.encode --data data/games --run runs/games --encoder llama:FOLDER

The command makes only these, for baselines that are trained without a GPU.
"""

import launch.waiting  # noqa: F401  # before torch
import fcntl
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from files.atomic import atomic_write
from launch.bars import Bar
from launch.command import option, parse_settings, run_main
from launch.embedded import MODEL
from llama import CheckpointError
from models.hub import find_model, load_model
from models.tokenizer import Tokenizer
from ops.packs import Tree, pack_trees
from prepare.dataset import default_model, load_dataset
from trsr import InputError, content_hash

LONGEST = 256  # tokens of a text; the rest is not read


@torch.no_grad()
def by_llama(folder: Path, texts: list[str], device: torch.device) -> Tensor:
    """Return a Llama's last hidden states, averaged over each text and normalized: (n, C)."""
    model = load_model(folder, device, torch.float32)
    encoded = Tokenizer(folder, model.config.vocab_size).encode(texts)
    ids = [row[:LONGEST] for row in encoded]
    found = torch.zeros(len(texts), model.config.hidden_size)
    pack_tokens = 8192 if device.type == "cuda" else 4096
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in Bar(range(0, len(order), 512), "items", unit="512 texts"):
        part = order[start : start + 512]
        # Without a prefix, a tree's tokens are next to each other in the pack.
        for pack in pack_trees([Tree([], [ids[i]]) for i in part], pack_tokens):
            here = pack.to(device)
            states = model.model(here.ids[None], here.positions[None], here.mask(), None)[0]
            states = states.float().cpu()
            for (t, _), row in pack.leaves.items():
                text = part[t]
                found[text] = states[row + 1 - len(ids[text]) : row + 1].mean(0)
    return F.normalize(found, dim=-1)


@torch.no_grad()
def by_sentence_encoder(name: str, texts: list[str], device: torch.device) -> Tensor:
    """Return an encoder's states, averaged over each text and normalized: (n, E).

    name: a folder or hub id that transformers loads, such as a sentence-transformers model.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        way = "pip install transformers, or take a Llama folder"
        raise InputError(f"this encoder needs transformers: {way}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{name}: no encoder that transformers can load ({why})") from None

    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    found: list[Tensor] = []
    for start in Bar(range(0, len(texts), 64), "items", unit="64 texts"):
        inputs = tokenizer(texts[start : start + 64], **options).to(device)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        found.append(((states * mask).sum(1) / mask.sum(1)).float().cpu())
    return F.normalize(torch.cat(found), dim=-1)


def cache_path(encoder: str, items: dict[str, str], cache: Path) -> Path:
    """Return the file that keeps the items' embeddings in the folder cache."""
    return cache / f"embeddings-{content_hash([encoder, list(items.values())])}.safetensors"


def embeddings(encoder: str, items: dict[str, str], cache: Path, device: torch.device) -> Tensor:
    """Return the items' text embeddings (n, E), in order; computed once, then read from cache.

    encoder: `llama:FOLDER_OR_HUB_ID`, or a name for by_sentence_encoder.
    """
    texts, path = list(items.values()), cache_path(encoder, items, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".embeddings.lock", "w") as lock:
        # Of several processes one computes, and the others wait for its file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("texts")

        kind, _, name = encoder.partition(":")
        if kind == "llama":
            found = by_llama(find_model(name), texts, device)
        else:
            found = by_sentence_encoder(encoder, texts, device)
        with atomic_write(path, "wb") as file:
            save_file({"texts": found}, file.name)
    return found


def default_encoder(data: Path) -> str:
    """Return the embedded model as an encoder; InputError for data that it does not know."""
    return f"llama:{default_model(data, MODEL, '--encoder')}"


# ---- The command

ENCODER = "llama:FOLDER, or a model that transformers loads (unset: llama:models/tiny, on the demo)"


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: Path = option(Path("data/demo"), "dataset folder made by prepare", Path, "files")
    run: Path = option(Path("runs/demo"), "run folder", Path)
    encoder: str | None = option(None, ENCODER)


def main() -> None:
    """Encode the items' texts, unless that was done before."""
    settings = parse_settings(Settings, __doc__)
    encoder = settings.encoder or default_encoder(settings.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, items, _ = load_dataset(settings.data, ("train",))
    out = settings.run / "baselines"
    embeddings(encoder, items, out, device)
    print(f"wrote   {cache_path(encoder, items, out)}")


if __name__ == "__main__":
    run_main(main, CheckpointError)
