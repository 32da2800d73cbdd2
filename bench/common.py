"""What the side-by-side benchmarks share: one set of random weights for both, the paper's lengths, the ceiling, timing.

Lengths: MIND-like prompts have a common beginning of 410 tokens and a candidate's tail of 53, Amazon-like ones 750 and
155, each varied by 25 %; the first 100 tokens are the instruction, the same for every user.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.random_model import SHAPES
from llama import Config, Llama
from ops.packs import Tree

WORK = {"mind": (410, 53), "amazon": (750, 155)}
INSTRUCTION, VARIED, CANDIDATES = 100, 0.25, 21


def vocabulary_of(shape: str) -> int:
    """Return the rows of a shape's embedding: `tiny` is models/tiny's shape, the others have Llama 2's vocabulary."""
    return 2048 if shape == "tiny" else 32000


def bench_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=["tiny", *SHAPES], default="100m", help="of the random weights"
    )
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--work", choices=WORK, default="mind", help="the lengths of the prompts")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timings, of which the median counts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def models(
    args, device: torch.device, dtype: torch.dtype, peer: bool = True
) -> tuple[Llama, LlamaForCausalLM | None]:
    """Return this project's model and (if peer) transformers' model on the same random weights."""
    fields = SHAPES["small" if args.shape == "tiny" else args.shape] | {"rms_norm_eps": 1e-5}
    fields |= {"num_hidden_layers": args.layers} if args.layers else {}
    heads = fields["num_attention_heads"]
    sizes = {"num_key_value_heads": heads, "head_dim": fields["hidden_size"] // heads}
    sizes["vocab_size"] = vocabulary_of(args.shape)
    with torch.device("meta"):
        ours = Llama(Config(**fields | sizes | {"max_position_embeddings": 2048}))
        theirs = (
            LlamaForCausalLM(LlamaConfig(**fields | sizes | {"max_position_embeddings": 2048}))
            if peer
            else None
        )
    generator = torch.Generator(device).manual_seed(args.seed)
    weights = {}
    for name, parameter in ours.named_parameters():
        weights[name] = torch.ones(parameter.shape, device=device, dtype=dtype)
        if parameter.dim() > 1:
            weights[name].normal_(0, 0.02, generator=generator)
    ours.load_state_dict(weights, strict=False, assign=True)
    if fields["tie_word_embeddings"]:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    if not peer:
        return ours.eval(), None
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(
        device
    )  # it was on meta too
    return ours.eval(), theirs.eval()


def random_trees(args, users: int, branches: int) -> list[Tree]:
    """Return users' prompts as trees of random tokens, with the lengths of the work; seeded."""
    rng = random.Random(f"bench {args.seed} {args.work}")
    (prefix, tail), vocabulary = WORK[args.work], vocabulary_of(args.shape)

    def tokens(mean: float) -> list[int]:
        return [
            rng.randrange(3, vocabulary)
            for _ in range(round(mean * rng.uniform(1 - VARIED, 1 + VARIED)))
        ]

    instruction = [rng.randrange(3, vocabulary) for _ in range(INSTRUCTION)]
    return [
        Tree(instruction + tokens(prefix - INSTRUCTION), [tokens(tail) for _ in range(branches)])
        for _ in range(users)
    ]


def weights_read(model: nn.Module) -> int:
    """Return the weights that each token is multiplied with: the layers' matrices."""
    return sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1
    )


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of work in seconds, after one warm-up; of several processes, until the last is done."""

    def together() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    times = []
    for _ in range(repeats + 1):
        began = together()
        work()
        times.append(together() - began)
    return statistics.median(times[1:])


def device_name(device: torch.device, world: int) -> str:
    """Return what the benchmark runs on, in words."""
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return f"{world} x {name}" if world > 1 else name


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s that this machine's library reaches on a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    inner = 20 if device.type == "cuda" else 3
    return 2 * n**3 * inner / seconds(lambda: [a @ b for _ in range(inner)], device, 5)
