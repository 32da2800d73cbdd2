"""How far 8-bit weights are from the full model: the logits of prompts, and how much of greedy texts stays the same.

    python -m bench.int8                                        # models/tiny on the demo's first users
    python -m bench.int8 --model FOLDER --data FOLDER --users 20

Compares this project's int8 weights and bitsandbytes' LLM.int8 with thresholds 6 (its default, the paper's) and 0. The
texts are the block summaries of the users; a text counts as far as it agrees from its start.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch

import trsr
from launch.command import positive, run_main
from llama import load_model
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset
from summarize import generate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--users", type=positive, default=40)
    parser.add_argument("--max-new-tokens", type=positive, default=120)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    domain, items, splits = load_dataset(args.data, ("test",))
    model = load_model(args.model, device, dtype)
    tokenizer = Tokenizer(args.model, model.config.vocab_size)
    budget = trsr.Budget(
        model.config.max_position_embeddings - args.max_new_tokens, tokenizer.encode, Counter()
    )
    histories = [[items[i] for i in example.history] for example in splits["test"][: args.users]]
    texts = [
        trsr.block_prompt(h[a:b], domain, budget)
        for h in histories
        for a, b in trsr.split_blocks(len(h), 5)
    ]
    prompts = tokenizer.encode(texts)

    def told(model) -> tuple[torch.Tensor, list[list[int]]]:
        with torch.inference_mode():
            logits = torch.cat(
                [model(torch.tensor([ids], device=device))[0, -1:].float() for ids in prompts]
            )
        return logits, generate(model, prompts, args.max_new_tokens, model.config.eos_token_id)

    logits, written = told(model)
    print(
        f"{args.model}, {len(prompts)} prompts of {args.users} users, {str(dtype).split('.')[1]} on {device.type}"
    )
    print(f"{'':<28}logits' relative error   greedy tokens the same   texts the same")
    rows = [
        ("int8 weights", "weights", 0.0),
        *((f"LLM.int8, threshold {t:g}", "bitsandbytes", t) for t in (6.0, 0.0)),
    ]
    for name, way, threshold in rows:
        found, texts = told(load_model(args.model, device, dtype, int8=way, threshold=threshold))
        error = ((found - logits).norm() / logits.norm()).item()
        same = [
            next(
                (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)),
            )
            for a, b in zip(texts, written, strict=True)
        ]
        share = sum(same) / sum(map(len, written))
        equal = sum(a == b for a, b in zip(texts, written, strict=True)) / len(written)
        print(f"{name:<28}{error:>22.4%}{share:>25.2%}{equal:>17.1%}")


if __name__ == "__main__":
    run_main(main)
