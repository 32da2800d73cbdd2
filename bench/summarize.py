"""Greedy generation side by side: this project's slots, and transformers' generate at several batch sizes.

    python -m bench.summarize --shape 100m                      # on a CPU in fp32, on a GPU in bf16
    python -m bench.summarize --shape llama-2-7b --batch-size 96 --batches 1 32 64
    python -m bench.summarize --shape llama-2-7b --prompt-tokens 700 700 --new-tokens 128 128
    python -m bench.summarize --shape llama-30b --int8 --peer-layers 6
    torchrun --nproc_per_node 2 -m bench.summarize --shape llama-2-7b                # this project alone

Prompts have 300 to 1,200 tokens, of which the first 100 are the instruction; outputs have 40 to 150, as real ones vary
(random weights never end a text, so each prompt comes with its length). transformers' batches hold prompts of similar
length and go on until the longest output of a batch is written; what is beyond an output's length does not count.
Bytes are those of the layers' matrices once a step, and of the keys and values that rows have.
With --int8 this project has int8 weights and transformers bitsandbytes' LLM.int8.
"""

import gc
import json
import random
import time
from functools import partial

import torch

from bench.common import INSTRUCTION, bench_parser, device_name, models, seconds, vocabulary_of
from launch.estimate import rows_that_fit
from launch.processes import gather, join_processes, run_script, share_out
from llama import compile_layers
from ops.int8 import bitsandbytes_linear, quantized, replace_linears
from summarize import Generator, Row
from trsr import InputError


class MeasuredGenerator(Generator):
    """Ends each text at its own length, where keys are (number, length), and counts what decoding reads."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps = self.cached = 0
        self.decoding = 0.0

    def ends(self, row: Row) -> bool:  # noqa: D102
        return len(row.tokens) == row.key[1]

    def _decode(self) -> list[int]:
        began = time.perf_counter()
        tokens = super()._decode()
        self.decoding += time.perf_counter() - began
        self.steps += 1
        self.cached += sum(row.length + 1 for row in self.rows)
        return tokens


def random_prompts(args, n: int) -> list[tuple[list[int], int]]:
    """Return n prompts of random tokens, each with the length of its output; seeded."""
    rng, vocabulary = random.Random(f"bench {args.seed}"), vocabulary_of(args.shape)
    instruction = [rng.randrange(3, vocabulary) for _ in range(INSTRUCTION)]
    lengths = [(rng.randint(*args.prompt_tokens), rng.randint(*args.new_tokens)) for _ in range(n)]
    made = [
        (instruction + [rng.randrange(3, vocabulary) for _ in range(p - INSTRUCTION)], o)
        for p, o in lengths
    ]
    return sorted(made, key=lambda pair: -len(pair[0]))


def write_ours(
    generator: MeasuredGenerator, prompts: list[tuple[list[int], int]]
) -> dict[int, list[int]]:
    """Return the tokens written for each prompt."""
    generator.steps = generator.cached = 0
    generator.decoding = 0.0
    generator.submit([((i, length), ids) for i, (ids, length) in enumerate(prompts)])
    written = {}
    while len(written) < len(prompts):
        written |= {key[0]: tokens for key, tokens in generator.step()}
    return written


@torch.inference_mode()
def write_theirs(
    model, prompts: list[tuple[list[int], int]], batch: int, device: torch.device
) -> dict[int, list[int]]:
    """Return the tokens that transformers writes for each prompt, `batch` prompts at a time."""
    written = {}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in part], device=device)
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p, _ in part], device=device
        )
        new = max(length for _, length in part)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        for i, (row, (_, length)) in enumerate(zip(out[:, longest:].tolist(), part, strict=True)):
            written[start + i] = row[:length]
    return written


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.empty(
        (1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return (
        2 * len(source) * 5 / seconds(lambda: [target.copy_(source) for _ in range(5)], device, 5)
    )


def equal_share(a: dict, b: dict) -> float:
    """Return the mean share of b's tokens that a writes too before the first that differs."""
    shares = []
    for i, tokens in b.items():
        same = next(
            (t for t, (x, y) in enumerate(zip(a[i], tokens, strict=True)) if x != y), len(tokens)
        )
        shares.append(same / len(tokens))
    return sum(shares) / len(shares)


def main() -> None:
    """Print new tokens/s of each way, ratios, and how near to the machine's copy rate decoding is."""
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--prompts", type=int, help="prompts that this project reads (without it: 4 batches)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, nargs=2, default=(300, 1200), help="least and most of a prompt"
    )
    parser.add_argument(
        "--new-tokens", type=int, nargs=2, default=(40, 150), help="least and most of an output"
    )
    parser.add_argument(
        "--batch-size", type=int, help="rows that decode together (without it: as summarize.py)"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", help="of the peer (1 32 64 on GPUs, 1 8 16 on CPUs)"
    )
    parser.add_argument(
        "--peer-layers",
        type=int,
        help="layers of the peer's model, whose times are scaled up to all",
    )
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--threshold", type=float, default=6.0, help="of bitsandbytes")
    parser.add_argument("--no-peer", action="store_true", help="this project alone")
    args = parser.parse_args()
    rank, world, device = join_processes()
    gpu, args.no_peer = device.type == "cuda", args.no_peer or world > 1
    dtype = torch.bfloat16 if gpu else torch.float32
    batches = args.batches or ([1, 32, 64] if gpu else [1, 8, 16])
    ours, theirs = models(args, device, dtype, peer=not args.no_peer)
    layers = len(ours.model.layers)
    if args.peer_layers and theirs is not None:
        theirs.model.layers = theirs.model.layers[: args.peer_layers]
        theirs.config.num_hidden_layers = args.peer_layers
    if args.int8:  # after the peer's layers are few, since all in 16 bit and in 8 may not fit
        replace_linears(ours, quantized)
    if theirs is not None and args.int8:
        replace_linears(theirs, lambda base: bitsandbytes_linear(base, args.threshold))
        theirs.to(device)
    if gpu:
        torch.cuda.empty_cache()
        compile_layers(ours)
    slots = args.prompt_tokens[1] + args.new_tokens[1]
    rows = args.batch_size or rows_that_fit(ours, slots, device)
    prompts = random_prompts(args, args.prompts or 4 * rows * world)
    generator = MeasuredGenerator(ours, rows, args.new_tokens[1], (), slots if gpu else 0)
    mine = [
        prompts[i] for i in sorted(share_out([len(ids) + 8 * n for ids, n in prompts], world)[rank])
    ]
    write_mine = partial(write_ours, generator, mine)
    took = seconds(lambda write=write_mine: gather(write()), device, args.repeats)
    written, new = write_mine(), sum(length for _, length in prompts)
    matrices = sum(
        p.numel() * p.itemsize
        for n, p in ours.named_parameters()
        if ".layers." in n and p.dim() > 1
    )
    head = ours.lm_head.weight.numel() * ours.lm_head.weight.itemsize
    heads = ours.config.num_key_value_heads * ours.config.head_dim
    token = 2 * layers * heads * ours.lm_head.weight.itemsize
    read = (generator.steps * (matrices + head) + generator.cached * token) / generator.decoding
    limit = copy_rate(device)
    if rank:
        return
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if gpu else ""
    kind = "int8" if args.int8 else str(dtype).split(".")[1]
    found = {
        "shape": args.shape,
        "kind": kind,
        "torch": torch.__version__,
        "rows": rows,
        "prompts": len(prompts),
    }
    found |= {
        "tokens_per_second": new / took,
        "ms_a_step": 1000 * generator.decoding / generator.steps,
    }
    found |= {
        "decoding_share": generator.decoding / took,
        "bytes_per_second": read,
        "copy": limit,
        "peers": {},
    }
    print(f"{args.shape}, {kind} on {device_name(device, world)}, torch {torch.__version__}{peak}")
    name = f"ours, {rows} rows" + (" a GPU" if world > 1 else "")
    print(f"{name:<28}{new / took:>9.1f} new tokens/s, {len(prompts) / took:.2f} prompts/s")
    share = f"{found['decoding_share']:.0%} of the time"
    print(f"{generator.steps} steps of {found['ms_a_step']:.2f} ms, {share}; they read", flush=True)
    print(
        f"{read / 1e9:.1f} GB/s, {read / limit:.0%} of a copy's {limit / 1e9:.1f} GB/s", flush=True
    )
    del generator, write_mine
    gc.collect(), torch.cuda.empty_cache()  # its rows make room for the peer's
    for batch in batches if theirs is not None else ():
        some = (
            prompts[len(prompts) // 2 :][:batch]
            if batch < 4
            else prompts[:: max(1, len(prompts) // batch)][:batch]
        )
        try:
            write_theirs(theirs, [(ids, min(length, 8)) for ids, length in some], batch, device)
            began = time.perf_counter()
            told = write_theirs(theirs, some, batch, device)
            rate = sum(length for _, length in some) / (time.perf_counter() - began)
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit")
            continue
        rate *= (args.peer_layers or layers) / layers
        found["peers"][batch] = rate
        numbers = {id(ids): i for i, (ids, _) in enumerate(prompts)}
        equal = equal_share({i: written[numbers[id(ids)]] for i, (ids, _) in enumerate(some)}, told)
        note = (
            f"{equal:.1%} of the tokens equal"
            if not args.peer_layers
            else f"from {args.peer_layers} layers"
        )
        name = f"transformers, {batch} a batch"
        ratio = f"ours is {new / took / rate:.1f} times as fast"
        print(f"{name:<28}{rate:>9.1f} new tokens/s   {ratio}; {note}", flush=True)
        if dtype is torch.float32 and not args.int8 and equal < 1:
            raise InputError("the tokens differ, so the times mean nothing")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
