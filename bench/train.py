"""LoRA fine-tuning side by side: this project's optimizer steps, and transformers + PEFT's on the same examples.

    python -m bench.train --shape tiny --work mind              # on a CPU in fp32, on a GPU in bf16
    python -m bench.train --shape llama-2-7b --work amazon --pack-tokens 8192
    torchrun --nproc_per_node 2 -m bench.train --shape llama-2-7b --shard zero3       # this project alone

A user gives two examples, the positive and a negative; the loss is that of the whole prompt, the adapters have rank 8
on q, k, v and o, with dropout 0.05. The steps are train.py's own, the packs made in a thread as there. transformers +
PEFT take one example a forward pass (as the paper does), and padded batches of the sizes of --batches, of which the
fastest that fits counts. FLOP are 4 a weight of the layers and token that is computed, without attention: the frozen
weights need no gradient. Before the timing, the losses of both are compared without dropout.
"""

import argparse
import json
from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from bench.common import (
    bench_parser,
    ceiling,
    device_name,
    models,
    random_trees,
    seconds,
    weights_read,
)
from launch.processes import gather, join_processes, prefetch, run_script
from llama import compile_layers
from lora import ATTENTION, LoRAConfig, adapter_tensors, apply_lora
from ops.packs import Tree
from train import shard, step_packs, train_step
from trsr import InputError


def sequences_of(trees: list[Tree]) -> list[list[int]]:
    """Return all examples, each apart."""
    return [tree.prefix + branch for tree in trees for branch in tree.branches]


def padded_step(model, optimizer, trees: list[Tree], batch: int, device: torch.device) -> float:
    """Make one optimizer step of transformers' model on padded batches of similar length; return the loss."""
    rows = sorted(sequences_of(trees), key=len)
    count, total = sum(len(row) - 1 for row in rows), 0.0
    for part in (rows[i : i + batch] for i in range(0, len(rows), batch)):
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in part], device=device
        )
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = (
            F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            / count
        )
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def main() -> None:
    """Print examples/s of each way, ratios, and how near to the machine's ceiling this project is."""
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--users", type=int, help="users in an optimizer step (without it: 32 on GPUs, 8 on CPUs)"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", help="batch sizes of the peer to try (12 8 6 4 or 8 4 2)"
    )
    parser.add_argument(
        "--pack-tokens", type=int, help="tokens in a forward pass (without it: as train.py)"
    )
    parser.add_argument(
        "--unshared", action="store_true", help="this project with every example apart, none shared"
    )
    parser.add_argument("--no-peer", action="store_true", help="this project alone")
    parser.add_argument("--activation-checkpointing", action="store_true", help="as train.py's")
    parser.add_argument(
        "--shard", choices=["zero2", "zero3", "replicate"], default="zero2", help="as train.py's"
    )
    args = parser.parse_args()
    rank, world, device = join_processes()
    gpu, args.no_peer = device.type == "cuda", args.no_peer or world > 1
    dtype = torch.bfloat16 if gpu else torch.float32
    users, batches = (
        args.users or (32 if gpu else 8),
        args.batches or ([12, 8, 6, 4] if gpu else [8, 4, 2]),
    )
    args.pack_tokens = args.pack_tokens or (8192 if gpu else 4096)
    args.pad_to = args.pack_tokens if gpu else 1
    step_args = argparse.Namespace(**vars(args), loss="prompt", autocast=False, max_grad_norm=1.0)
    ours, theirs = models(args, device, dtype, peer=not args.no_peer)
    weights = weights_read(ours)
    trees = random_trees(args, users, 2)
    examples, apart = 2 * users, sum(map(len, sequences_of(trees)))
    if args.unshared:
        trees = [Tree([], [ids]) for ids in sequences_of(trees)]
    apply_lora(ours, LoRAConfig(dropout=0.05))
    torch.manual_seed(args.seed)
    for parameter in adapter_tensors(ours).values():
        torch.nn.init.normal_(parameter, std=0.02)
    if not args.no_peer:
        options = {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": list(ATTENTION),
        }
        theirs = get_peft_model(theirs, LoraConfig(**options, bias="none", task_type="CAUSAL_LM"))
        peers = {
            n.replace("base_model.model.", "").replace(".default", ""): p
            for n, p in theirs.named_parameters()
        }
        with torch.no_grad():
            for name, parameter in adapter_tensors(ours).items():
                peers[name].copy_(parameter)
    if world > 1 and args.shard != "replicate":
        shard(ours, device, args.shard)
    if gpu:
        compile_layers(ours)

    def optimizer_of(model) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    optimizer = optimizer_of(ours)
    packing = (
        step_packs(trees, batch, rank, world, step_args)
        for batch in repeat(list(range(len(trees))))
    )
    steps = prefetch(packing)

    def step_ours() -> float:
        _, packs, _, count = next(steps)
        return train_step(ours, optimizer, packs, count, step_args, device)[0]

    ours.model.checkpointing = args.activation_checkpointing
    ours.eval()  # no dropout
    losses = [step_ours()]
    if not args.no_peer:
        losses.append(padded_step(theirs.eval(), optimizer_of(theirs), trees, 2, device))
        if abs(losses[0] - losses[1]) > (1e-4 if not gpu else 2e-2) * losses[1]:
            raise InputError(
                f"the losses are {losses[0]:.6f} and {losses[1]:.6f}, so the times mean nothing"
            )
        theirs.train()
    ours.train()
    step_ours(), step_ours()  # ready to be timed: compiled, and with what the allocator keeps
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    rates = {"ours": examples / seconds(step_ours, device, args.repeats)}
    peak = max(gather(torch.cuda.max_memory_allocated() / 2**30)) if gpu else None
    theirs_optimizer = None if args.no_peer else optimizer_of(theirs)
    for batch in () if args.no_peer else (1, *batches):
        try:
            step = partial(padded_step, theirs, theirs_optimizer, trees, batch, device)
            took = seconds(step, device, args.repeats)
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit")
            theirs_optimizer.zero_grad(set_to_none=True)
            continue
        name = f"{batch} a batch" if batch > 1 else "1 example a forward"
        rates[f"transformers + PEFT, {name}"] = examples / took
    shares = gather(step_packs(trees, list(range(len(trees))), rank, world, step_args)[1])
    packs = [pack for share in shares for pack in share]
    real, places = sum(pack.tokens for pack in packs), sum(len(pack.ids) for pack in packs)
    flops, limit = 4 * weights * real / examples * rates["ours"], world * ceiling(device, dtype)
    if rank:
        return
    best = max((name for name in rates if name != "ours"), key=rates.get, default="")
    where = device_name(device, world) + (f", {args.shard}" if world > 1 else "")
    print(
        f"{args.shape}, {args.work}, {str(dtype).split('.')[1]} on {where}, torch {torch.__version__}"
    )
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.2f} times as fast" if name != "ours" else ""
        print(f"{name:<42}{rate:>9.3f} examples/s{ratio}{' (its best)' if name == best else ''}")
    speed = rates["ours"] / examples
    print(
        f"{speed * apart:.0f} tokens/s of examples apart, of which {speed * real:.0f} are computed"
    )
    print(
        f"{flops / 1e12:.3f} of {limit / 1e12:.3f} TFLOP/s ({flops / limit:.0%}), packs {real / places:.1%} full"
    )
    told = " and ".join(f"{loss:.6f}" for loss in losses)
    print(f"loss {told}" + (f"; peak of ours {peak:.1f} GiB" if peak else ""), flush=True)
    if args.json:
        found = {
            "shape": args.shape,
            "work": args.work,
            "torch": torch.__version__,
            "examples_per_second": rates,
        }
        found |= {
            "flops": flops,
            "ceiling": limit,
            "fill": real / places,
            "losses": losses,
            "peak_gib": peak,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
