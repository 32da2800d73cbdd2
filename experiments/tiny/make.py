"""Make the embedded default: a small Llama from scratch, trained on experiments.tiny.corpus, in Hugging Face layout.

    python -m experiments.tiny.make --workers 8                      # meant for a GPU: hours on a CPU
    python -m experiments.tiny.make --steps 200 --out runs/models/tiny

Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.model and tokenizer_config.json. A
step's texts depend on the seed and the step alone, however many processes share them. --weights and --first-step go on
from saved weights, with new optimizers.
"""

import argparse
import io
import json
import math
import os
import time
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from experiments.tiny import corpus
from files.jsonl import write_json
from launch.command import natural, positive, run_main
from llama import Llama, load_config, load_model
from models.tokenizer import Tokenizer
from trsr import ANSWERS, answer_ids

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TOKENIZER_TEXTS = 2500
BRIEF_SHARE = 0.75  # of the steps, in which products become longer texts
PROMPT_WEIGHT, VERDICT_WEIGHT = (
    0.1,
    2.0,
)  # of a prompt's tokens and of Yes and No; other answers' tokens count 1


def write_tokenizer(folder: Path, lines: list[str], vocab_size: int) -> Tokenizer:
    """Write tokenizer.model and tokenizer_config.json, and return what they make: BPE with byte fallback, trained on
    lines, which it keeps as they are; Yes and No are a piece each.

    Raises RuntimeError, by the trainer, for a vocabulary too large or too small for the lines.
    """
    # The trainer takes a blank before every line. Where no blank stands, at a line's start, words need pieces too.
    starts = sorted(
        {line.split(" ")[0] for line in lines if line and not line.startswith(("#", "["))}
    )
    lines = lines + [f"({word}" for word in starts for _ in range(20)]
    lines += [f"({answer} {answer}" for answer in ("Yes", "No") for _ in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[","],  # or else numbers would be other pieces before a comma
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    options = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
    }
    options |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", options)
    return Tokenizer(folder, vocab_size)


def train_tokenizer(folder: Path, seed: int) -> None:
    """Write the tokenizer of the corpus, in which the shop's words are a piece each."""
    lines = []
    for text in islice(corpus.texts(f"tokenizer {seed}"), TOKENIZER_TEXTS):
        lines += "".join(prompt + answer for prompt, answer in text).splitlines()
    tokenizer = write_tokenizer(folder, lines, CONFIG["vocab_size"])
    answer_ids(tokenizer.encode, corpus.DOMAIN)
    words = [word for options in corpus.WORDS.values() for word in options]
    broken = [
        word
        for word, ids in zip(words, tokenizer.pieces.encode(words), strict=True)
        if len(ids) > 1
    ]
    assert not broken, f"no single pieces: {broken}"


# ---- Batches: a step's texts, those of similar length together, with an answer's tokens weighing more than a prompt's


def encode(text: corpus.Text, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Return the text's token ids, its end among them, and what each weighs as a target."""
    pieces = [piece for turn in text for piece in turn]
    *lengths, ids = tokenizer.encode(["".join(pieces[: i + 1]) for i in range(len(pieces))])
    weights, bounds = [], [0, *map(len, lengths), len(ids)]
    for i, piece in enumerate(pieces):
        weight = PROMPT_WEIGHT if i % 2 == 0 else VERDICT_WEIGHT if piece in ANSWERS else 1.0
        weights += [weight] * (bounds[i + 1] - bounds[i])
    return [*ids, CONFIG["eos_token_id"]], [*weights, 1.0]


class Batches(Dataset):
    """The batches of each step, (ids, weights) of the same shape (B, T) each, padded with 0."""

    def __init__(self, folder: Path, args):
        self.tokenizer = Tokenizer(folder, CONFIG["vocab_size"])
        self.args = args
        self.rank, self.world = ranks()

    def __len__(self) -> int:
        return self.args.steps - self.args.first_step

    def __getitem__(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        args, rows, size = self.args, [], 0
        step = args.first_step + index
        brief = max(0.0, 1 - step / (BRIEF_SHARE * args.steps))
        for text in corpus.texts(f"{args.seed} {step}", brief):
            rows.append(encode(text, self.tokenizer))
            size += len(rows[-1][0])
            if size > args.step_tokens:
                break
        rows.sort(key=lambda row: len(row[0]))
        batches = []
        for row in rows[self.rank :: self.world]:
            if not batches or (len(batches[-1]) + 1) * len(row[0]) > args.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return [self.padded(batch) for batch in batches]

    @staticmethod
    def padded(rows: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows' ids and weights, (B, T) each."""
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
        return ids, torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])


# ---- Training


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def initialize(model: Llama, seed: int) -> None:
    """Draw the weights: normal, and smaller where a layer writes into the residual stream; norms stay at 1."""
    torch.manual_seed(seed)
    deep = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = (
                0.02
                if "embed" in name
                else 0.06 * (deep if "o_proj" in name or "down_proj" in name else 1)
            )
            nn.init.normal_(parameter, std=std)


def learning_rate(step: int, args) -> float:
    """Return the rate of a step: up over the first 2 %, level, and down to zero over the last 40 %."""
    return args.lr * min(
        1.0, (step + 1) / (0.02 * args.steps + 1), (args.steps - step) / (0.4 * args.steps)
    )


def make_optimizers(model: Llama, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def loss_of(model: Llama, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of weight * cross-entropy over the next tokens of ids (B, T), in fp32."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def train(model: Llama, args, device: torch.device) -> None:
    """Train the model for args.steps steps, printing a line now and then."""
    rank, world = ranks()
    optimizers = make_optimizers(model, args.lr)
    for seed in corpus.SHOPS:  # before the workers start, which share them
        corpus.shop_of(seed)
    workers = {"num_workers": args.workers} | ({"prefetch_factor": 8} if args.workers else {})
    steps = DataLoader(Batches(args.out, args), batch_size=None, **workers)
    began, tokens, losses = time.perf_counter(), 0, []
    for step, batches in enumerate(steps, args.first_step):
        total = torch.stack([weights[:, 1:].sum() for _, weights in batches]).sum()
        if world > 1:
            dist.all_reduce(total)
        loss = 0.0
        for ids, weights in batches:
            part = loss_of(model, ids.to(device), weights.to(device)) / total.item()
            part.backward()
            loss += part.detach()
            tokens += ids.numel() * world
        gradients = [p.grad for p in model.parameters()]
        for tensor in (*gradients, loss) if world > 1 else ():
            dist.all_reduce(tensor)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == args.steps):
            mean, seconds = torch.stack(losses).mean().item(), time.perf_counter() - began
            print(
                f"step {step + 1} loss {mean:.4f} {tokens / 1e6:.2f}M tokens {tokens / seconds:.0f}/s",
                flush=True,
            )
            losses = []
        if rank == 0 and (step + 1) % args.save_every == 0:
            save(model, args.out)


def save(model: Llama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights in dtype; tied ones once, as transformers does."""
    tensors = {
        name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="folder to write to")
    parser.add_argument("--steps", type=positive, default=1397, help="optimizer steps")
    parser.add_argument(
        "--step-tokens", type=positive, default=32768, help="tokens a step, over all processes"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, default=65536, help="tokens in a forward pass, padding too"
    )
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and text")
    parser.add_argument("--workers", type=natural, default=0, help="processes that write text")
    parser.add_argument(
        "--log-every", type=positive, default=100, help="steps between printed lines"
    )
    parser.add_argument(
        "--save-every", type=positive, default=500, help="steps between saved weights"
    )
    parser.add_argument(
        "--weights", type=Path, help="with --first-step: folder of saved weights to go on from"
    )
    parser.add_argument(
        "--first-step", type=natural, default=0, help="steps that --weights has behind it"
    )
    args = parser.parse_args()
    if bool(args.weights) != bool(args.first_step):
        parser.error("--weights and --first-step go together")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, world = ranks()
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(args.out / "config.json", CONFIG)
        write_json(args.out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        train_tokenizer(args.out, args.seed)
    if world > 1:
        dist.barrier()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Llama(load_config(args.out))
    initialize(model, args.seed)
    if args.first_step:
        model.load_state_dict(
            load_model(args.weights, torch.device("cpu"), torch.float32).state_dict()
        )
    model.to(device)
    n = sum(p.numel() for p in model.parameters())
    if rank == 0:
        made = {"parameters": n, "device": f"{world} x {device.type}", "torch": torch.__version__}
        print(json.dumps(made | vars(args), default=str))
    train(model, args, device)
    if rank == 0:
        save(model, args.out)


if __name__ == "__main__":
    run_main(main)
