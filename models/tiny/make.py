"""Make the embedded default: a small Llama from scratch, trained on models.tiny.corpus, in Hugging Face layout.

    python -m models.tiny.make                                  # a few minutes on a GPU, many hours on a CPU
    python -m models.tiny.make --steps 200 --out runs/models/tiny

Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer.model and tokenizer_config.json. Each
step trains on one pack, whose text depends on the seed and the step alone, however many processes write it.
"""

import argparse
import io
import json
import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from llama import Llama, Pack, Tokenizer, Tree, load_config, make_tree, pack_trees
from models.tiny import corpus
from prepare.dataset import write_json
from trsr import answer_ids, natural, positive, run_main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 1536,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
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
PROMPT_WEIGHT, VERDICT_WEIGHT = 0.1, 2.0  # of a prompt's tokens and of Yes and No; other answers' tokens count 1


def train_tokenizer(folder: Path, seed: int) -> None:
    """Write tokenizer.model: BPE with byte fallback, lines kept as they are, the shop's words a piece each."""
    lines = []
    for text in islice(corpus.texts(f"tokenizer {seed}"), TOKENIZER_TEXTS):
        for ending, answer in text.endings:
            lines += f"{text.beginning}{ending}{answer}".splitlines()
    # The trainer takes a blank before every line. Where no blank stands, at a line's start, words need pieces too.
    starts = sorted({line.split(" ")[0] for line in lines if line and not line.startswith(("#", "["))})
    lines += [f"({word}" for word in starts for _ in range(20)]
    lines += [f"({answer} {answer}" for answer in ("Yes", "No") for _ in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG["vocab_size"],
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
    options = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    options |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", options)
    tokenizer = Tokenizer(folder, CONFIG["vocab_size"])
    answer_ids(tokenizer.encode, corpus.DOMAIN)
    words = [word for options in corpus.WORDS.values() for word in options]
    broken = [word for word, ids in zip(words, tokenizer.pieces.encode(words), strict=True) if len(ids) > 1]
    assert not broken, f"no single pieces: {broken}"


# ---- Packs: the project's own, with an answer's tokens weighing more than a prompt's


def encode(text: corpus.Text, tokenizer: Tokenizer) -> tuple[Tree, list[tuple[int, float]]]:
    """Return the text as a tree, and of each branch how many tokens its answer has and what they weigh."""
    prompts = [text.beginning + ending for ending, _ in text.endings]
    full = tokenizer.encode([p + answer for p, (_, answer) in zip(prompts, text.endings, strict=True)])
    sequences = [[*ids, CONFIG["eos_token_id"]] for ids in full]
    lengths = [len(ids) - len(p) for ids, p in zip(sequences, tokenizer.encode(prompts), strict=True)]
    weights = [VERDICT_WEIGHT if answer in ("Yes", "No") else 1.0 for _, answer in text.endings]
    return make_tree(sequences), list(zip(lengths, weights, strict=True))


def make_pack(texts, tokenizer: Tokenizer, tokens: int) -> Pack:
    """Return one pack of the texts that come first, as many as fit."""
    trees, answers, size = [], [], 0
    for text in texts:
        tree, lengths = encode(text, tokenizer)
        size += tree.size
        if size > tokens:
            break
        trees.append(tree)
        answers.append(lengths)
    (pack,) = pack_trees(trees, tokens, tokens)
    # All texts begin with the same token, so target i is the token in row i + 1.
    weights = torch.full_like(pack.weights, PROMPT_WEIGHT)
    for (tree, branch), row in pack.leaves.items():
        length, weight = answers[tree][branch]
        weights[row - length : row] = weight
    return replace(pack, weights=weights, leaves={})


class Packs(Dataset):
    """The pack of each step."""

    def __init__(self, folder: Path, seed: int, steps: int, tokens: int):
        self.folder, self.seed, self.steps, self.tokens = folder, seed, steps, tokens

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Pack:
        if not hasattr(self, "tokenizer"):
            self.tokenizer = Tokenizer(self.folder, CONFIG["vocab_size"])
        return make_pack(corpus.texts(f"{self.seed} {step}"), self.tokenizer, self.tokens)


# ---- Training


def initialize(model: Llama, seed: int) -> None:
    """Draw the weights: normal, and smaller where a layer writes into the residual stream; norms stay at 1."""
    torch.manual_seed(seed)
    deep = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            std = 0.02 if "embed" in name else 0.06 * (deep if "o_proj" in name or "down_proj" in name else 1)
            nn.init.normal_(parameter, std=std)


def learning_rate(step: int, args) -> float:
    """Return the rate of a step: up over the first 2 %, level, and down to zero over the last 40 %."""
    return args.lr * min(1.0, (step + 1) / (0.02 * args.steps + 1), (args.steps - step) / (0.4 * args.steps))


def train(model: Llama, args, device: torch.device) -> None:
    """Train the model for args.steps packs, printing a line now and then."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.05}]
    groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.97), fused=device.type == "cuda")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        model.model.compile()
    for seed in corpus.SHOPS:
        corpus.shop_of(seed)  # before the workers start, which share it
    workers = {"num_workers": args.workers} | ({"prefetch_factor": 8} if args.workers else {})
    packs = DataLoader(Packs(args.out, args.seed, args.steps, args.pack_tokens), batch_size=None, **workers)
    began, tokens, losses = time.perf_counter(), 0, []
    for step, pack in enumerate(packs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = model.loss(pack.to(device), chunk=1 << 20) / pack.weights.sum().item()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        tokens += pack.tokens
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean, seconds = torch.stack(losses).mean().item(), time.perf_counter() - began
            print(f"step {step + 1} loss {mean:.4f} {tokens / 1e6:.1f}M tokens {tokens / seconds:.0f}/s", flush=True)
            losses = []


def save(model: Llama, folder: Path) -> None:
    """Write the weights in bf16; tied ones once, as transformers does."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Make the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/tiny"), help="folder to write to")
    parser.add_argument("--steps", type=positive, default=12000, help="packs to train on")
    parser.add_argument("--pack-tokens", type=positive, default=16384, help="tokens a pack")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and text")
    parser.add_argument("--workers", type=natural, default=0, help="processes that write text")
    parser.add_argument("--log-every", type=positive, default=100, help="steps between printed lines")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "config.json", CONFIG)
    write_json(args.out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    train_tokenizer(args.out, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Llama(load_config(args.out))
    initialize(model, args.seed)
    model.to(device)
    n = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": n, "device": device.type, "torch": torch.__version__} | vars(args), default=str))
    train(model, args, device)
    save(model, args.out)


if __name__ == "__main__":
    run_main(main)
