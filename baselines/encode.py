"""Texts to frozen embeddings: by a sentence-transformers folder or hub id, or by a Llama's own states."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from files.atomic import atomic_write
from models.hub import find_model, load_model
from models.tokenizer import Tokenizer
from ops.packs import Tree, pack_trees
from trsr import InputError, content_hash


@torch.no_grad()
def by_llama(folder: Path, texts: list[str], device: torch.device, max_tokens: int = 256) -> Tensor:
    """Return the mean of a Llama's last states over each text's tokens, normalized to length 1: (n, C)."""
    model = load_model(folder, device, torch.float32)
    ids = [row[:max_tokens] for row in Tokenizer(folder, model.config.vocab_size).encode(texts)]
    found = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in tqdm(range(0, len(order), 512), "items", unit="512 texts"):
        part = order[start : start + 512]
        # Without a prefix in common, so that each text is a row of tokens of its own.
        for pack in pack_trees(
            [Tree([], [ids[i]]) for i in part], 8192 if device.type == "cuda" else 4096
        ):
            here = pack.to(device)
            states = (
                model.model(here.ids[None], here.positions[None], here.mask(), None)[0]
                .float()
                .cpu()
            )
            for (t, _), row in pack.leaves.items():
                found[part[t]] = states[row + 1 - len(ids[part[t]]) : row + 1].mean(0)
    return F.normalize(found, dim=-1)


@torch.no_grad()
def by_sentence_encoder(
    folder: str, texts: list[str], device: torch.device, max_tokens: int = 256
) -> Tensor:
    """Return mean-pooled states of a transformers encoder, such as a sentence-transformers folder: (n, E)."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise InputError(
            "this encoder needs transformers: pip install transformers, or take a Llama folder"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: no encoder that transformers can load ({str(error).splitlines()[0]})"
        ) from None
    found: list[Tensor] = []
    for start in tqdm(range(0, len(texts), 64), "items", unit="64 texts"):
        options = {
            "padding": True,
            "truncation": True,
            "max_length": max_tokens,
            "return_tensors": "pt",
        }
        inputs = tokenizer(texts[start : start + 64], **options).to(device)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        found.append(((states * mask).sum(1) / mask.sum(1)).float().cpu())
    return F.normalize(torch.cat(found), dim=-1)


def embeddings(encoder: str, items: dict[str, str], cache: Path, device: torch.device) -> Tensor:
    """Return the items' text embeddings (n, E) in their order, from cache if they were made before.

    encoder: `llama:FOLDER_OR_HUB_ID`, or what transformers' AutoModel loads.
    """
    key = content_hash([encoder, list(items.values())])
    path = cache / f"embeddings-{key}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("texts")
    texts = list(items.values())
    kind, _, name = encoder.partition(":")
    if kind == "llama":
        found = by_llama(find_model(name), texts, device)
    else:
        found = by_sentence_encoder(encoder, texts, device)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        save_file({"texts": found}, file.name)
    return found
