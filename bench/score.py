"""Scoring candidates side by side: this project, transformers with a batch a user, and the authors' way.

    python -m bench.score --shape 100m --work mind              # on a CPU in fp32, on a GPU in bf16
    python -m bench.score --shape llama-2-7b --work amazon --candidates 5 21 100 1000

transformers: a user's 21 prompts in one batch, padded on the left, the last position's logits alone. The authors' way:
each prompt padded to 2,048 tokens, one a forward pass (the last position's logits alone too). The same random weights
and prompts for all. FLOP are 2 a weight of the layers and token, without attention; the fill is the share of packs'
places that hold a token. With several numbers of candidates, this project's cost a user for each.
"""

import json
import time

import torch

from bench.common import CANDIDATES, bench_parser, ceiling, models, random_trees, seconds, weights_read
from llama import compile_layers, score_packs
from models.packs import Pack, Tree, pack_trees, steady_length
from runfolder.command import run_main
from trsr import InputError

ANSWERS = (17, 1711)  # two tokens in place of Yes and No
AUTHORS_LENGTH = 2048


def prompts_of(tree: Tree) -> list[list[int]]:
    """Return the tree's prompts, each apart."""
    return [tree.prefix + branch for branch in tree.branches]


@torch.inference_mode()
def score_batches(model, trees: list[Tree], width: int | None, batch: int, device: torch.device) -> list:
    """Return transformers' logits of ANSWERS for all prompts, `batch` at a time, padded on the left to width."""
    scores = []
    for prompts in map(prompts_of, trees):
        for part in (prompts[i : i + batch] for i in range(0, len(prompts), batch)):
            longest = width or max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            scores.append(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, list(ANSWERS)])
    return torch.cat(scores).float().tolist()


def agreement(ours: dict, theirs: list, trees: list[Tree]) -> tuple[float, float]:
    """Return the largest difference of two scores, and the share of pairs of a user's candidates in the same order."""
    flat = [ours[t, b] for t, tree in enumerate(trees) for b in range(len(tree.branches))]
    a, b = torch.tensor(flat[: len(theirs)]), torch.tensor(theirs)
    margins = [(x[:, 0] - x[:, 1]).view(-1, CANDIDATES) for x in (a, b)]
    orders = [m[:, :, None] > m[:, None, :] for m in margins]
    return (a - b).abs().max().item(), (orders[0] == orders[1]).float().mean().item()


def busy_share(work) -> float:
    """Return the share of work's time in which the GPU computes."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type.name == "CUDA")
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / took


def main() -> None:
    """Print users/s of each way, ratios, and how near to the machine's ceiling this project is."""
    parser = bench_parser(__doc__)
    parser.add_argument("--users", type=int, help="users that this project scores (without it: 160 on GPUs, 6 on CPUs)")
    parser.add_argument("--peer-users", type=int, default=2, help="users that the others score")
    parser.add_argument("--candidates", type=int, nargs="+", default=[CANDIDATES], help="numbers of candidates to time")
    parser.add_argument("--pack-tokens", type=int, help="tokens in a forward pass (without it: as evaluate.py)")
    parser.add_argument("--profile", action="store_true", help="on a GPU, tell how much of the time it computes")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    users = args.users or (160 if gpu else 6)
    pack_tokens = args.pack_tokens or (8192 if gpu else 4096)
    ours, theirs = models(args, device, dtype)
    trees = random_trees(args, users, CANDIDATES)
    if gpu:
        compile_layers(ours)

    def packs_of(trees: list[Tree]) -> list[Pack]:
        length = steady_length(trees[:64], pack_tokens) if gpu else pack_tokens
        return pack_trees(trees, length, length if gpu else 1)

    def score(trees: list[Tree]) -> dict:
        return score_packs(ours, packs_of(trees), ANSWERS)

    few = trees[: args.peer_users]
    authors = [Tree(tree.prefix, tree.branches[:2]) for tree in few[:1]]  # two prompts tell its time
    limit = ceiling(device, dtype)
    found = {"shape": args.shape, "work": args.work, "device": torch.cuda.get_device_name() if gpu else "cpu"}
    found |= {"dtype": str(dtype).split(".")[1], "torch": torch.__version__, "threads": torch.get_num_threads()}
    rates = {"ours": users / seconds(lambda: score(trees), device, args.repeats)}
    rates["transformers"] = len(few) / seconds(
        lambda: score_batches(theirs, few, None, CANDIDATES, device), device, args.repeats
    )
    apart = seconds(lambda: score_batches(theirs, authors, AUTHORS_LENGTH, 1, device), device, args.repeats)
    rates["authors"] = 2 / CANDIDATES / apart
    if args.profile and gpu:
        found["busy"] = busy_share(lambda: score(trees[:32]))
    packs = packs_of(trees)
    real, places = sum(pack.tokens for pack in packs), sum(len(pack.ids) for pack in packs)
    flops = 2 * weights_read(ours) * real / users * rates["ours"]
    error, ordered = agreement(score(trees), score_batches(theirs, few, None, CANDIDATES, device), few)
    found |= {"users_per_second": rates, "tokens_a_user": real / users, "fill": real / places, "flops": flops}
    found |= {"ceiling": limit, "share_of_ceiling": flops / limit, "largest_difference": error, "same_order": ordered}
    found["ratio"] = {name: rates["ours"] / rates[name] for name in ("transformers", "authors")}
    if dtype is torch.float32 and error > 1e-4:
        raise InputError(f"the scores differ by {error:.1e}, so the times mean nothing")
    if args.candidates != [CANDIDATES]:
        found["seconds_a_user"] = {}
    for n in args.candidates if args.candidates != [CANDIDATES] else ():
        some = random_trees(args, max(1, users * CANDIDATES // n), n)
        found["seconds_a_user"][n] = seconds(lambda some=some: score(some), device, 1) / len(some)
    print(f"{args.shape}, {args.work}, {found['dtype']} on {found['device']}, torch {torch.__version__}")
    for name, rate in rates.items():
        ratio = f"   ours is {found['ratio'][name]:.1f} times as fast" if name != "ours" else ""
        print(f"{name:<14}{rate:>9.3f} users/s{ratio}")
    print(f"{flops / 1e12:.2f} of {limit / 1e12:.2f} TFLOP/s ({flops / limit:.0%}), packs {real / places:.1%} full")
    if "busy" in found:
        print(f"the GPU computes in {found['busy']:.1%} of the time, packing included")
    print(f"largest difference {error:.1e}; {ordered:.2%} of the pairs of candidates in the same order")
    for n, cost in found.get("seconds_a_user", {}).items():
        print(f"{n:>6} candidates: {cost:.4f} s a user")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    run_main(main)
