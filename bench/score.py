"""Scoring candidates side by side: this project, transformers with a batch a user, and the authors' way.

    python -m bench.score --shape 100m --work mind              # on a CPU in fp32, on a GPU in bf16
    python -m bench.score --shape llama-2-7b --work amazon --candidates 5 21 100 1000
    python -m bench.score --shape llama-2-7b --data data/mind --tokenizer tokenizer.model --no-peer
    torchrun --nproc_per_node 2 -m bench.score --shape llama-2-7b                    # this project alone

transformers: a user's 21 prompts in one batch, padded on the left, the last position's logits alone. The authors' way:
each prompt padded to 2,048 tokens, one a forward pass (the last position's logits alone too). The same random weights
and prompts for all. FLOP are 2 a weight and token that meet, without attention; the fill is the share of the packs'
places that hold a token. With several numbers of candidates, this project's cost a user for each. With --data, the time
of evaluate.py's own way from a dataset's texts to scores, when the GPU begins (evaluate.py tokenizes while it loads
weights), and the share of the time from then on in which it computes.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import evaluate
import trsr
from batches.stream import stream_packs
from bench.common import (
    CANDIDATES,
    bench_parser,
    ceiling,
    device_name,
    models,
    random_trees,
    seconds,
    weights_read,
)
from evaluate import score_packs
from launch.processes import gather, host_workers, join_processes, prefetch, run_script, share_out
from llama import Llama, compile_layers
from ops.packs import Pack, Tree
from prepare.dataset import load_dataset
from train import make_recommender
from trsr import InputError

ANSWERS = (17, 1711)  # two tokens in place of Yes and No
AUTHORS_LENGTH = 2048


def prompts_of(tree: Tree) -> list[list[int]]:
    """Return the tree's prompts, each apart."""
    return [tree.prefix + branch for branch in tree.branches]


@torch.inference_mode()
def score_batches(
    model, trees: list[Tree], width: int | None, batch: int, device: torch.device
) -> list:
    """Return transformers' logits of ANSWERS for all prompts, `batch` at a time, padded on the left to width."""
    scores = []
    for prompts in map(prompts_of, trees):
        for part in (prompts[i : i + batch] for i in range(0, len(prompts), batch)):
            longest = width or max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in part], device=device)
            mask = torch.tensor(
                [[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device
            )
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            scores.append(
                model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, list(ANSWERS)]
            )
    return torch.cat(scores).float().tolist()


def agreement(ours: dict, theirs: list, trees: list[Tree]) -> tuple[float, float]:
    """Return the largest difference of two scores, and the share of pairs of a user's candidates in the same order."""
    flat = [ours[t, b] for t, tree in enumerate(trees) for b in range(len(tree.branches))]
    a, b = torch.tensor(flat[: len(theirs)]), torch.tensor(theirs)
    margins = [(x[:, 0] - x[:, 1]).view(-1, CANDIDATES) for x in (a, b)]
    orders = [m[:, :, None] > m[:, None, :] for m in margins]
    return (a - b).abs().max().item(), (orders[0] == orders[1]).float().mean().item()


def recommender_of(args, model: Llama, users: int) -> tuple:
    """Return (recommender, answers, examples, candidates) of training users, whole histories in the prompt."""
    domain, items, splits = load_dataset(args.data, ("train",))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(args.tokenizer, Path(folder) / "tokenizer.model")
        settings = argparse.Namespace(max_length=2048, paradigm="whole-history", history_items=0)
        recommender, answers = make_recommender(
            settings, model.config, Path(folder), domain, items, {}
        )
    examples = splits["train"][:users]
    return (
        recommender,
        answers,
        examples,
        [trsr.shuffled_candidates(example) for example in examples],
    )


def busy_share(work) -> tuple[float, float, float]:
    """Return the seconds that work takes, the seconds before the GPU begins to compute, and the share of the others in
    which it does.
    """
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        began = time.perf_counter()
        torch.zeros(1, device="cuda")  # in the profile, where the work begins
        work()
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    events = [
        e for e in profile.events() if e.device_type.name == "CUDA" and not e.name.startswith("Mem")
    ]  # kernels
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    before = (spans[1][0] - spans[0][0]) / 1e6
    return took, before, busy / 1e6 / (took - before)


def main() -> None:
    """Print users/s of each way, ratios, and how near to the machine's ceiling this project is."""
    parser = bench_parser(__doc__)
    parser.add_argument(
        "--users",
        type=int,
        help="users that this project scores (without it: 160 on GPUs, 6 on CPUs)",
    )
    parser.add_argument("--peer-users", type=int, default=2, help="users that the others score")
    parser.add_argument(
        "--candidates",
        type=int,
        nargs="+",
        default=[CANDIDATES],
        help="numbers of candidates to time",
    )
    parser.add_argument(
        "--pack-tokens", type=int, help="tokens in a forward pass (without it: as evaluate.py)"
    )
    parser.add_argument("--no-peer", action="store_true", help="this project alone")
    parser.add_argument(
        "--data", type=Path, help="dataset, of whose training users evaluate.py's way is timed"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model with 32,000 pieces, for --data"
    )
    args = parser.parse_args()
    rank, world, device = join_processes()
    gpu, args.no_peer = device.type == "cuda", args.no_peer or world > 1
    dtype = torch.bfloat16 if gpu else torch.float32
    users = args.users or (160 if gpu else 6)
    args.pack_tokens = args.pack_tokens or (16384 if gpu else 4096)
    args.pad_to, args.workers = (args.pack_tokens if gpu else 1), host_workers(device)
    ours, theirs = models(args, device, dtype, peer=not args.no_peer)
    trees = random_trees(args, users, CANDIDATES)
    if gpu:
        compile_layers(ours)

    def packs_of(trees: list[Tree]) -> Iterator[Pack]:
        mine = sorted(share_out([tree.size for tree in trees], world)[rank])
        return stream_packs(((i, trees[i]) for i in mine), len(mine), args)

    def score(trees: list[Tree]) -> dict:
        return score_packs(ours, prefetch(packs_of(trees)), ANSWERS)

    few, scored = trees[: args.peer_users], []
    limit = world * ceiling(device, dtype)
    found = {"shape": args.shape, "work": args.work, "device": device_name(device, world)}
    found |= {"dtype": str(dtype).split(".")[1], "torch": torch.__version__}
    rates = {
        "ours": users / seconds(lambda: scored.append(gather(score(trees))), device, args.repeats)
    }
    packs = [pack for share in gather(list(packs_of(trees))) for pack in share]
    real, places = sum(pack.tokens for pack in packs), sum(len(pack.ids) for pack in packs)
    last = ours.model.layers[
        -1
    ]  # whose second half is computed for the candidates' last tokens alone
    tail = sum(p.numel() for part in (last.self_attn.o_proj, last.mlp) for p in part.parameters())
    computed = (weights_read(ours) - tail) * real + tail * sum(len(pack.leaves) for pack in packs)
    flops = 2 * computed / users * rates["ours"]
    found |= {
        "users_per_second": rates,
        "tokens_a_user": real / users,
        "fill": real / places,
        "flops": flops,
    }
    found |= {"ceiling": limit, "share_of_ceiling": flops / limit, "seconds_a_user": {}}
    if not args.no_peer:
        together, alone = (
            (few, None, CANDIDATES),
            ([Tree(few[0].prefix, few[0].branches[:2])], AUTHORS_LENGTH, 1),
        )
        theirs_of = partial(score_batches, theirs, device=device)
        rates["transformers"] = len(few) / seconds(
            partial(theirs_of, *together), device, args.repeats
        )
        rates["authors"] = (
            2 / CANDIDATES / seconds(partial(theirs_of, *alone), device, args.repeats)
        )  # of two prompts
        error, ordered = agreement(scored[-1][0], theirs_of(*together), few)
        found |= {"largest_difference": error, "same_order": ordered}
        if dtype is torch.float32 and error > 1e-4:
            raise InputError(f"the scores differ by {error:.1e}, so the times mean nothing")
    for n in args.candidates if args.candidates != [CANDIDATES] else ():
        some = random_trees(args, max(1, users * CANDIDATES // n), n)
        found["seconds_a_user"][n] = seconds(
            lambda some=some: gather(score(some)), device, 1
        ) / len(some)
    if args.data:
        recommender, answers, examples, candidates = recommender_of(args, ours, users)

        def from_texts() -> None:
            own = evaluate.own_packs(recommender, examples, candidates, args, show=False)
            evaluate.score(ours, own, len(examples), answers, recommender.budget)

        from_texts()  # compiled
        found["from_texts"] = busy_share(from_texts) if gpu else (seconds(from_texts, device, 1),)
    if rank:
        return
    print(
        f"{args.shape}, {args.work}, {found['dtype']} on {found['device']}, torch {torch.__version__}"
    )
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.1f} times as fast" if name != "ours" else ""
        print(f"{name:<14}{rate:>9.3f} users/s{ratio}")
    print(
        f"{flops / 1e12:.2f} of {limit / 1e12:.2f} TFLOP/s ({flops / limit:.0%}), packs {real / places:.1%} full"
    )
    if not args.no_peer:
        print(
            f"largest difference {error:.1e}; {ordered:.2%} of the pairs of candidates in the same order"
        )
    for n, cost in found["seconds_a_user"].items():
        print(f"{n:>6} candidates: {cost:.4f} s a user")
    if args.data:
        took, *more = found["from_texts"]
        share = (
            "; the GPU begins after {:.2f} s, then it computes in {:.1%} of the time".format(*more)
            if more
            else ""
        )
        print(
            f"{len(examples)} users of {args.data} from texts to scores in {took:.2f} s{share}",
            flush=True,
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
