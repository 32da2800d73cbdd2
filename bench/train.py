"""LoRA fine-tuning side by side: this project's optimizer steps, and transformers + PEFT's on the same examples.

    python -m bench.train --shape tiny --work mind              # on a CPU in fp32, on a GPU in bf16
    python -m bench.train --shape llama-2-7b --work amazon --pack-tokens 8192

A user gives two examples, the positive and a negative; the loss is that of the whole prompt, the adapters have rank 8
on q, k, v and o, with dropout 0.05. transformers + PEFT take one example a forward pass (as the paper does), and padded
batches of the sizes of --batches, of which the fastest that fits counts. FLOP are 4 a weight of the layers and token
that is computed, without attention: the frozen weights need no gradient. Before the timing, loss and gradients of both
are compared without dropout.
"""

import json

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from bench.common import bench_parser, ceiling, models, random_trees, seconds, weights_read
from llama import compile_layers
from lora import ATTENTION, LoRAConfig, adapter_tensors, apply_lora
from models.packs import Pack, Tree, pack_length, pack_trees
from runfolder.command import run_main
from trsr import InputError


def sequences_of(trees: list[Tree]) -> list[list[int]]:
    """Return all examples, each apart."""
    return [tree.prefix + branch for tree in trees for branch in tree.branches]


def packs_of(trees: list[Tree], pack_tokens: int, device: torch.device) -> list[Pack]:
    """Return the packs of a step, as train.py makes them."""
    if device.type == "cpu":
        return pack_trees(trees, pack_tokens)
    length = pack_length(trees, pack_tokens)
    return pack_trees(trees, length, length)


def packed_step(model, optimizer, trees: list[Tree], pack_tokens: int, device: torch.device) -> float:
    """Make one optimizer step as train.py does; return the loss."""
    packs = packs_of(trees, pack_tokens, device)
    count, total = sum(pack.weights.sum().item() for pack in packs), 0.0
    for pack in packs:
        loss = model.loss(pack.to(device)) / count
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def padded_step(model, optimizer, trees: list[Tree], batch: int, device: torch.device) -> float:
    """Make one optimizer step of transformers' model on padded batches of similar length; return the loss."""
    rows = sorted(sequences_of(trees), key=len)
    count, total = sum(len(row) - 1 for row in rows), 0.0
    for part in (rows[i : i + batch] for i in range(0, len(rows), batch)):
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=device)
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def main() -> None:
    """Print examples/s of each way, ratios, and how near to the machine's ceiling this project is."""
    parser = bench_parser(__doc__)
    parser.add_argument("--users", type=int, help="users in an optimizer step (without it: 32 on GPUs, 8 on CPUs)")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes of the peer to try (12 8 6 4 or 8 4 2)")
    parser.add_argument("--pack-tokens", type=int, help="tokens in a forward pass (without it: as train.py)")
    parser.add_argument("--no-peer", action="store_true", help="this project alone")
    parser.add_argument("--activation-checkpointing", action="store_true", help="as train.py's")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    users, batches = args.users or (32 if gpu else 8), args.batches or ([12, 8, 6, 4] if gpu else [8, 4, 2])
    pack_tokens = args.pack_tokens or (8192 if gpu else 4096)
    ours, theirs = models(args, device, dtype)
    trees = random_trees(args, users, 2)
    apply_lora(ours, LoRAConfig(dropout=0.05))
    if gpu:
        compile_layers(ours)
    options = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": list(ATTENTION)}
    theirs = get_peft_model(theirs, LoraConfig(**options, bias="none", task_type="CAUSAL_LM"))
    mine = adapter_tensors(ours)
    peers = {n.replace("base_model.model.", "").replace(".default", ""): p for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in mine.items():
            torch.nn.init.normal_(parameter, std=0.02)
            peers[name].copy_(parameter)

    def optimizer_of(model) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step_ours() -> float:
        return packed_step(ours, optimizers[0], trees, pack_tokens, device)

    optimizers = [optimizer_of(model) for model in (ours, theirs)]
    ours.eval(), theirs.eval()  # no dropout
    losses = [step_ours()] * 2 if args.no_peer else [step_ours(), padded_step(theirs, optimizers[1], trees, 2, device)]
    if abs(losses[0] - losses[1]) > (1e-4 if not gpu else 2e-2) * losses[1]:
        raise InputError(f"the losses are {losses[0]:.6f} and {losses[1]:.6f}, so the times mean nothing")
    ours.train(), theirs.train()
    ours.model.checkpointing = args.activation_checkpointing
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    examples = 2 * users
    rates = {"ours": examples / seconds(step_ours, device, args.repeats)}
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    for batch in () if args.no_peer else (1, *batches):
        try:
            took = seconds(lambda b=batch: padded_step(theirs, optimizers[1], trees, b, device), device, args.repeats)
            name = f"{batch} a batch" if batch > 1 else "1 example a forward"
            rates[f"transformers + PEFT, {name}"] = examples / took
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit")
    packs = packs_of(trees, pack_tokens, device)
    real, places = sum(pack.tokens for pack in packs), sum(len(pack.ids) for pack in packs)
    flops, limit = 4 * weights_read(ours) * real / examples * rates["ours"], ceiling(device, dtype)
    best = max((name for name in rates if name != "ours"), key=rates.get, default="")
    print(f"{args.shape}, {args.work}, {str(dtype).split('.')[1]} on {device.type}, torch {torch.__version__}")
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.2f} times as fast" if name != "ours" else ""
        print(f"{name:<42}{rate:>9.3f} examples/s{ratio}{' (its best)' if name == best else ''}")
    apart = sum(map(len, sequences_of(trees)))
    speed = rates["ours"] / examples
    print(f"{speed * apart:.0f} tokens/s of examples apart, of which {speed * real:.0f} are computed")
    print(f"{flops / 1e12:.3f} of {limit / 1e12:.3f} TFLOP/s ({flops / limit:.0%}), packs {real / places:.1%} full")
    print(f"losses {losses[0]:.6f} and {losses[1]:.6f}" + (f"; peak of ours {peak:.1f} GiB" if peak else ""))
    if args.json:
        found = {"shape": args.shape, "work": args.work, "torch": torch.__version__, "examples_per_second": rates}
        found |= {"flops": flops, "ceiling": limit, "fill": real / places, "losses": losses, "peak_gib": peak}
        print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
