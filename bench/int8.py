"""Measure how close 8-bit weights are to the full model, in logits and in greedy texts.

    python -m bench.int8                                # models/tiny on the demo's first users
    python -m bench.int8 --model FOLDER --data FOLDER --users 20

Measures this project's int8 weights, and bitsandbytes' LLM.int8 with threshold 6, which is its
default and the paper's, and with 0. The texts are summaries of the users' blocks; a text's tokens
count as the same up to the first that differs.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import trsr
from launch.command import option, parse_settings, run_main
from launch.numbers import positive
from llama import Llama
from models.chat import Plain
from models.hub import load_model
from models.tokenizer import Tokenizer
from ops.int8 import bitsandbytes_linear, quantized, replace_linears
from ops.packs import common_prefix
from prepare.dataset import load_dataset
from summarize import Generator

BLOCK, ROWS = 5, 16  # items per block, texts written together
WAYS = {
    "int8 weights": quantized,
    "LLM.int8, threshold 6": bitsandbytes_linear,
    "LLM.int8, threshold 0": partial(bitsandbytes_linear, threshold=0.0),
}


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: Path = option(Path("models/tiny"), "model folder", Path)
    data: str = option("data/demo", "dataset folder made by prepare")
    users: int = option(40, "test users whose blocks are summarized", positive)
    max_new_tokens: int = option(120, "longest summary, in tokens", positive)


@dataclass(frozen=True)
class Answers:
    """A model's answers to the prompts."""

    logits: Tensor  # (prompts, V), after the last token
    texts: list[list[int]]

    @classmethod
    def of(cls, model: Llama, prompts: list[list[int]], max_new_tokens: int) -> "Answers":
        """Return a model's answers."""
        device, rows = model.lm_head.weight.device, []
        with torch.inference_mode():
            for ids in prompts:
                rows.append(model(torch.tensor([ids], device=device))[0, -1:].float())
        return cls(torch.cat(rows), write(model, prompts, max_new_tokens))


def write(model: Llama, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the greedy continuation of each prompt."""
    generator, written = Generator(model, ROWS, max_new_tokens, model.config.eos_token_id), {}
    generator.submit(sorted(enumerate(prompts), key=lambda pair: -len(pair[1])))
    while len(written) < len(prompts):
        written |= generator.step()
    return [written[i] for i in range(len(prompts))]


def block_prompts(settings: Settings, model: Llama) -> list[list[int]]:
    """Return summarize.py's prompts for the users' blocks, as token ids."""
    domain, items, splits = load_dataset(settings.data, ("test",))
    form = Plain(Tokenizer(settings.model, model.config.vocab_size))
    context = model.config.max_position_embeddings - settings.max_new_tokens
    budget = trsr.Budget(context, form.encode, Counter())
    prompts = []
    for example in splits["test"][: settings.users]:
        history = [items[i] for i in example.history]
        for first, end in trsr.split_blocks(len(history), BLOCK):
            prompts.append(trsr.block_prompt(history[first:end], domain, budget))
    return form.encode(prompts)


def main() -> None:
    """Print the table."""
    settings = parse_settings(Settings, __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(settings.model, device, dtype)
    prompts = block_prompts(settings, model)
    full = Answers.of(model, prompts, settings.max_new_tokens)
    kind = str(dtype).split(".")[1]
    users = f"{len(prompts)} prompts of {settings.users} users"
    print(f"{settings.model}, {users}, {kind} on {device.type}")
    print(f"{'':<28}logits' relative error   greedy tokens the same   texts the same")

    for name, make in WAYS.items():
        model = load_model(settings.model, device, dtype)
        replace_linears(model, make)
        model.to(device).eval()  # bitsandbytes quantizes on the way, and its layers are new
        model.syncs_host = make is bitsandbytes_linear  # it then fits no CUDA graph
        found = Answers.of(model, prompts, settings.max_new_tokens)
        error = ((found.logits - full.logits).norm() / full.logits.norm()).item()
        pairs = list(zip(found.texts, full.texts, strict=True))
        share = sum(common_prefix(pair) for pair in pairs) / sum(map(len, full.texts))
        equal = sum(a == b for a, b in pairs) / len(pairs)
        print(f"{name:<28}{error:>22.4%}{share:>25.2%}{equal:>17.1%}")


if __name__ == "__main__":
    run_main(main)
