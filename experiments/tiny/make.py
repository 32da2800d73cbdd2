"""Make models/tiny: a small Llama from scratch, trained on the text of experiments.tiny.corpus.

    python -m experiments.tiny.make --workers 8                 # meant for a GPU: hours on a CPU
    python -m experiments.tiny.make --steps 200 --out runs/models/tiny

Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.model and
tokenizer_config.json. A step's texts depend only on the seed and the step, however many processes
share them. --weights and --first-step continue from saved weights, with new optimizers.
"""

import json
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.scratch import (
    CONFIG,
    initialize,
    learning_rate,
    make_optimizers,
    save,
    update,
    write_config,
    write_tokenizer,
)
from experiments.tiny import corpus
from experiments.tiny.summaries import DOMAIN, WORDS, Text
from launch.command import option, parse_settings, run_main
from launch.numbers import natural, positive, positive_real, seed_number
from launch.processes import ranks
from llama import Llama, load_config, load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from trsr import ANSWERS, InputError, answer_ids

TOKENIZER_TEXTS = 2500
BRIEF_SHARE = 0.75  # of the steps; over these, more and more products have all their attributes
PROMPT_WEIGHT, VERDICT_WEIGHT = 0.1, 2.0  # of prompt tokens, and of Yes and No; others have 1


@dataclass(frozen=True)
class Settings:
    """The flags."""

    out: Path = option(Path("models/tiny"), "model folder to write", Path)
    steps: int = option(1397, "optimizer steps", positive)
    step_tokens: int = option(32768, "tokens per step, over all processes", positive)
    batch_tokens: int = option(65536, "tokens in a forward pass, padding included", positive)
    lr: float = option(4e-3, "highest learning rate", positive_real)
    seed: int = option(0, "seed of weights and text", seed_number)
    workers: int = option(0, "processes that write text", natural)
    log_every: int = option(100, "steps between printed lines", positive)
    save_every: int = option(500, "steps between saved weights", positive)
    weights: Path | None = option(
        None, "with --first-step: folder of the weights to continue from", Path
    )
    first_step: int = option(0, "with --weights: the steps that those had", natural)


# ---- The tokenizer


def train_tokenizer(folder: Path, seed: int) -> None:
    """Write the corpus's tokenizer, in which the shop's words are one piece each."""
    lines = []
    for text in islice(corpus.texts(f"tokenizer {seed}"), TOKENIZER_TEXTS):
        lines += "".join(prompt + answer for prompt, answer in text).splitlines()
    tokenizer = write_tokenizer(folder, lines, CONFIG["vocab_size"])
    answer_ids(Plain(tokenizer).encode, DOMAIN)  # raises unless Yes and No are one piece each
    words = [word for options in WORDS.values() for word in options]
    pieces = tokenizer.pieces.encode(words)
    broken = [word for word, ids in zip(words, pieces, strict=True) if len(ids) > 1]
    assert not broken, f"not one piece each: {broken}"


# ---- Batches: a step's texts, those of similar length together

Row = tuple[list[int], list[float]]  # a text's token ids, and what each weighs as a target


def encode(text: Text, tokenizer: Tokenizer) -> Row:
    """Return a text as a row; its last id is the end token."""
    pieces = [piece for turn in text for piece in turn]
    *starts, ids = tokenizer.encode(["".join(pieces[: i + 1]) for i in range(len(pieces))])
    bounds = [0, *map(len, starts), len(ids)]
    weights = []
    for i, piece in enumerate(pieces):
        is_prompt = i % 2 == 0
        weight = VERDICT_WEIGHT if piece in ANSWERS else 1.0
        weights += [PROMPT_WEIGHT if is_prompt else weight] * (bounds[i + 1] - bounds[i])
    return [*ids, CONFIG["eos_token_id"]], [*weights, 1.0]


class Batches(Dataset):
    """Each step's batches: pairs of ids and weights, (B, T) each, padded with 0."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.tokenizer = Tokenizer(settings.out, CONFIG["vocab_size"])
        self.rank, self.world = ranks()

    def __len__(self) -> int:
        return self.settings.steps - self.settings.first_step

    def __getitem__(self, index: int) -> list[tuple[Tensor, Tensor]]:
        rows = self.rows(self.settings.first_step + index)
        rows.sort(key=lambda row: len(row[0]))
        batches: list[list[Row]] = []
        for row in rows[self.rank :: self.world]:
            full = batches and (len(batches[-1]) + 1) * len(row[0]) > self.settings.batch_tokens
            if full or not batches:
                batches.append([])
            batches[-1].append(row)
        return [padded(batch) for batch in batches]

    def rows(self, step: int) -> list[Row]:
        """Return a step's texts, for all processes."""
        settings, rows, size = self.settings, [], 0
        brief = max(0.0, 1 - step / (BRIEF_SHARE * settings.steps))
        for text in corpus.texts(f"{settings.seed} {step}", brief):
            rows.append(encode(text, self.tokenizer))
            size += len(rows[-1][0])
            if size > settings.step_tokens:
                break
        return rows


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return the rows' ids and weights, (B, T) each."""
    length = max(len(ids) for ids, _ in rows)
    ids = [ids + [0] * (length - len(ids)) for ids, _ in rows]
    weights = [weights + [0.0] * (length - len(weights)) for _, weights in rows]
    return torch.tensor(ids), torch.tensor(weights)


# ---- Training


def loss_of(model: Llama, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of weight * cross-entropy over the next tokens of ids (B, T), in fp32."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def backward(model: Llama, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Add up the gradients of the step's mean loss over all processes; return that loss."""
    several = ranks()[1] > 1
    total = torch.stack([weights[:, 1:].sum() for _, weights in batches]).sum()
    if several:
        dist.all_reduce(total)
    loss = torch.zeros((), device=device)
    for ids, weights in batches:
        part = loss_of(model, ids.to(device), weights.to(device)) / total.item()
        part.backward()
        loss += part.detach()
    if several:
        for tensor in (*(p.grad for p in model.parameters()), loss):
            dist.all_reduce(tensor)
    return loss


def train(model: Llama, settings: Settings, device: torch.device) -> None:
    """Train the model; print a line and save the weights every so many steps."""
    rank, world = ranks()
    optimizers = make_optimizers(model, settings.lr)
    for seed in corpus.SHOPS:  # before the workers start, so that they share the shops
        corpus.shop_of(seed)
    options = {"num_workers": settings.workers}
    if settings.workers:
        options["prefetch_factor"] = 8
    loader = DataLoader(Batches(settings), batch_size=None, **options)

    began, tokens, losses = time.perf_counter(), 0, []
    for step, batches in enumerate(loader, settings.first_step):
        losses.append(backward(model, batches, device))
        update(model, optimizers, learning_rate(step, settings.steps, settings.lr))
        tokens += sum(ids.numel() for ids, _ in batches) * world
        done = step + 1
        if rank == 0 and (done % settings.log_every == 0 or done == settings.steps):
            mean, seconds = torch.stack(losses).mean().item(), time.perf_counter() - began
            speed = f"{tokens / 1e6:.2f}M tokens {tokens / seconds:.0f}/s"
            print(f"step {done} loss {mean:.4f} {speed}", flush=True)
            losses = []
        if rank == 0 and done % settings.save_every == 0:
            save(model, settings.out)


# ---- The command


def main() -> None:
    """Make the model."""
    settings = parse_settings(Settings, __doc__)
    if bool(settings.weights) != bool(settings.first_step):
        raise InputError("--weights and --first-step go together")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = ranks()
    out = settings.out
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_config(out, CONFIG)
        train_tokenizer(out, settings.seed)
    if world > 1:
        dist.barrier()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Llama(load_config(out))
    initialize(model, settings.seed)
    if settings.first_step:
        saved = load_model(settings.weights, torch.device("cpu"), torch.float32)
        model.load_state_dict(saved.state_dict())
    model.to(device)
    if rank == 0:
        n = sum(p.numel() for p in model.parameters())
        made = {"parameters": n, "device": f"{world} x {device.type}", "torch": torch.__version__}
        print(json.dumps(made | vars(settings), default=str))
    train(model, settings, device)
    if rank == 0:
        save(model, out)


if __name__ == "__main__":
    run_main(main)
