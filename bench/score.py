"""Time the scoring of candidates: here, in transformers, and the way the authors do it.

    python -m bench.score --shape 100m --work mind              # fp32 on a CPU, bf16 on a GPU
    python -m bench.score --shape llama-2-7b --work amazon --candidates 5 21 100 1000
    python -m bench.score --shape llama-2-7b --no-peer --data data/mind --tokenizer tokenizer.model
    torchrun --nproc_per_node 2 -m bench.score --shape llama-2-7b          # this project alone

All use the same random weights and prompts.

    transformers    a user's 21 prompts in one batch, padded on the left
    authors         one prompt per forward pass, padded to 2,048 tokens

Both compute the logits of the last position alone. FLOP are 2 per weight and token, without
attention. The fill of packs is the share of their places that hold a token. With several numbers of
--candidates, each is timed. --data also times evaluate.py's whole path from a dataset's texts to
scores: when the GPU starts to compute, and for how much of the time after that it is busy. (In
evaluate.py itself, tokenizing overlaps with loading the weights.)
"""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import evaluate
import trsr
from batches.prompts import Batching, Ranking
from batches.stream import own_packs, stream_packs
from bench import common
from bench.common import (
    CANDIDATES,
    Filling,
    ceiling,
    covered,
    device_name,
    layer_matrices,
    make_models,
    padded_left,
    random_trees,
    seconds,
)
from launch.command import option, parse_settings
from launch.numbers import positive
from launch.processes import gather, join_processes, prefetch, ranks, run_script, share_out
from llama import Llama, compile_layers
from models.chat import Plain
from models.tokenizer import Tokenizer
from ops.fp8 import use_fp8
from ops.packs import Pack, Tree
from prepare.dataset import load_dataset
from trsr import InputError

ANSWERS = (17, 1711)  # two tokens in place of Yes and No
AUTHORS_LENGTH = 2048


@dataclass(frozen=True)
class Settings(common.PackSettings):
    """The flags."""

    users: int | None = option(
        None, "users that this project scores (unset: 160 on GPUs, 6 on CPUs)", positive
    )
    peer_users: int = option(2, "users that the others score", positive)
    candidates: tuple[int, ...] = option(
        (CANDIDATES,), "numbers of candidates per user to time", positive, nargs="+"
    )
    no_peer: bool = option(False, "this project alone")
    data: Path | None = option(None, "dataset whose training users are scored from texts", Path)
    tokenizer: Path | None = option(
        None, "SentencePiece model with 32,000 pieces, for --data", Path
    )


# ---- This project


@dataclass(frozen=True)
class Ours:
    """Scores trees with this project's packs, shared out over the processes."""

    model: Llama
    batching: Batching
    weights: int  # of the layers
    tail: int  # of these, those of the last layer's second half
    graphs: bool | None

    @classmethod
    def of(cls, settings: Settings, model: Llama, device: torch.device) -> "Ours":
        """Return what scores with a model, which is compiled as in evaluate.py."""
        last = model.model.layers[-1]
        parts = (last.self_attn.o_proj, last.mlp)
        tail = sum(p.numel() for part in parts for p in part.parameters())
        weights = sum(p.numel() for p in layer_matrices(model))
        if settings.fp8:
            use_fp8(model, "scoring")
        if device.type == "cuda" and not settings.no_compile:
            compile_layers(model)
        batching = Batching.on(device, settings.pack_tokens, on_gpus=16384)
        return cls(model, batching, weights, tail, settings.cuda_graphs)

    def packs(self, trees: list[Tree]) -> Iterator[Pack]:
        """Return this process's packs."""
        rank, world = ranks()
        mine = sorted(share_out([tree.size for tree in trees], world)[rank])
        return stream_packs(((i, trees[i]) for i in mine), len(mine), self.batching)

    def score(self, trees: list[Tree]) -> list[dict]:
        """Return the logits of ANSWERS by (tree, branch), from each process."""
        packs = prefetch(self.packs(trees))
        return gather(evaluate.score_packs(self.model, packs, ANSWERS, self.graphs))

    def filling(self, trees: list[Tree]) -> Filling:
        """Return how full all processes' packs are."""
        return Filling.of(gather(list(self.packs(trees))))

    def flops(self, filling: Filling) -> float:
        """Return the FLOP of scoring packs that are as full as that."""
        # The last layer's second half is computed for the candidates' last tokens alone.
        return 2 * ((self.weights - self.tail) * filling.tokens + self.tail * filling.leaves)


# ---- transformers


@torch.inference_mode()
def score_batches(
    model, trees: list[Tree], width: int | None, batch: int, device: torch.device
) -> list:
    """Return transformers' logits of ANSWERS for all prompts, `batch` at a time.

    width: the tokens that prompts are padded to; None for the longest in the batch.
    """
    scores = []
    for tree in trees:
        prompts = [tree.prefix + branch for branch in tree.branches]
        for part in (prompts[i : i + batch] for i in range(0, len(prompts), batch)):
            ids, mask = padded_left(part, width or max(map(len, part)), device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits
            scores.append(logits[:, -1, list(ANSWERS)])
    return torch.cat(scores).float().tolist()


def agreement(ours: dict, theirs: list, trees: list[Tree]) -> tuple[float, float]:
    """Return the largest difference between scores, and the share of pairs in the same order.

    A pair is two candidates of one user.
    """
    leaves = [(t, b) for t, tree in enumerate(trees) for b in range(len(tree.branches))]
    a, b = torch.tensor([ours[leaf] for leaf in leaves]), torch.tensor(theirs)
    margins = [(x[:, 0] - x[:, 1]).view(-1, CANDIDATES) for x in (a, b)]
    orders = [m[:, :, None] > m[:, None, :] for m in margins]
    return (a - b).abs().max().item(), (orders[0] == orders[1]).float().mean().item()


def measure_peers(
    settings: Settings, model, trees: list[Tree], ours: dict, device: torch.device
) -> tuple[dict, dict]:
    """Return the users/s of transformers and of the authors' way, and how well scores agree.

    ours: this project's scores. Raises InputError if the scores differ in fp32, unless --fp8.
    """
    score = partial(score_batches, model, device=device)
    rates = {}
    took = seconds(lambda: score(trees, None, CANDIDATES), device, settings.repeats)
    rates["transformers"] = len(trees) / took
    # Two prompts, whose time is scaled up to a whole user.
    two = [Tree(trees[0].prefix, trees[0].branches[:2])]
    took = seconds(lambda: score(two, AUTHORS_LENGTH, 1), device, settings.repeats)
    rates["authors"] = 2 / CANDIDATES / took

    error, ordered = agreement(ours, score(trees, None, CANDIDATES), trees)
    if model.dtype is torch.float32 and not settings.fp8 and not error <= 1e-4:
        raise InputError(f"the scores differ by {error:.1e}, so the times mean nothing")
    return rates, {"largest_difference": error, "same_order": ordered}


# ---- From a dataset's texts


def text_scorer(settings: Settings, ours: Ours, users: int) -> tuple[Callable[[], object], int]:
    """Return evaluate.py's scoring of training users from their texts, and their number.

    The prompts show whole histories.
    """
    domain, items, splits = load_dataset(settings.data, ("train",))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(settings.tokenizer, Path(folder) / "tokenizer.model")
        form = Plain(Tokenizer(Path(folder), ours.model.config.vocab_size))
    budget = trsr.Budget(2047, form.encode, Counter())  # one token is the answer's
    recommender = trsr.Recommender("whole-history", domain, items, {}, 0, budget)
    answers = trsr.answer_ids(budget.encode, domain)
    ranking = Ranking.of(recommender, splits["train"][:users])

    def score() -> None:
        packs = own_packs(ranking, ours.batching, show=False)
        evaluate.score_users(ours.model, packs, answers, ranking, ours.graphs)

    return score, len(ranking.examples)


def busy_share(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return the seconds that work takes, the seconds until the GPU computes, and its busy share.

    The share is that of the time after it has started to compute.
    """
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        began = time.perf_counter()
        torch.zeros(1, device="cuda")  # marks the beginning of the work in the profile
        work()
        torch.cuda.synchronize()
        took = time.perf_counter() - began

    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    kernels = [event.time_range for event in events if not event.name.startswith("Mem")]
    spans = sorted((span.start, span.end) for span in kernels)
    before = (spans[1][0] - spans[0][0]) / 1e6
    return took, before, covered(spans) / 1e6 / (took - before)


# ---- The comparison


def main() -> None:
    """Print the users/s of each, their ratios, and how close this project is to the ceiling."""
    settings = parse_settings(Settings, __doc__)
    rank, world, device = join_processes()
    gpu, peer = device.type == "cuda", not settings.no_peer and world == 1
    dtype = torch.bfloat16 if gpu else torch.float32
    users = settings.users or (160 if gpu else 6)
    model, theirs = make_models(settings, device, dtype, peer)
    ours = Ours.of(settings, model, device)
    trees = random_trees(settings, users, CANDIDATES)

    limit, scored = world * ceiling(device, dtype), []
    took = seconds(lambda: scored.append(ours.score(trees)), device, settings.repeats)
    rates, filling = {"ours": users / took}, ours.filling(trees)
    flops = ours.flops(filling) / took
    found = {"shape": settings.shape, "work": settings.work, "device": device_name(device, world)}
    found |= {"dtype": settings.precision(dtype), "torch": torch.__version__}
    found |= {"users_per_second": rates}
    found |= {"tokens_a_user": filling.tokens / users, "fill": filling.share, "flops": flops}
    found |= {"ceiling": limit, "share_of_ceiling": flops / limit}
    found["seconds_a_user"] = candidate_times(settings, ours, users, device)
    if peer:
        few = trees[: settings.peer_users]
        more, agreed = measure_peers(settings, theirs, few, scored[-1][0], device)
        rates |= more
        found |= agreed
    from_texts = 0
    if settings.data:
        score, from_texts = text_scorer(settings, ours, users)
        score()  # a first time, to compile what it needs
        times = busy_share(score) if gpu else (seconds(score, device, 1),)
        found["from_texts"] = times
    if rank == 0:
        report(settings, found, from_texts)
        if settings.json:
            print(json.dumps(found))


def candidate_times(
    settings: Settings, ours: Ours, users: int, device: torch.device
) -> dict[int, float]:
    """Return the seconds per user by number of candidates, if --candidates was given."""
    if tuple(settings.candidates) == (CANDIDATES,):
        return {}
    times = {}
    for n in settings.candidates:
        trees = random_trees(settings, max(1, users * CANDIDATES // n), n)
        took = seconds(partial(ours.score, trees), device, 1)
        times[n] = took / len(trees)
    return times


def report(settings: Settings, found: dict, from_texts: int) -> None:
    """Print the table; from_texts: how many users were scored from texts."""
    where = f"{found['dtype']} on {found['device']}, torch {found['torch']}"
    print(f"{settings.shape}, {settings.work}, {where}")
    rates = found["users_per_second"]
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.1f} times as fast" if name != "ours" else ""
        print(f"{name:<14}{rate:>9.3f} users/s{ratio}")
    speed = f"{found['flops'] / 1e12:.2f} of {found['ceiling'] / 1e12:.2f} TFLOP/s"
    print(f"{speed} ({found['share_of_ceiling']:.0%}), packs {found['fill']:.1%} full")
    if "same_order" in found:
        pairs = f"{found['same_order']:.2%} of the pairs of candidates in the same order"
        print(f"largest difference {found['largest_difference']:.1e}; {pairs}")
    for n, cost in found["seconds_a_user"].items():
        print(f"{n:>6} candidates: {cost:.4f} s a user")
    if "from_texts" in found:
        took, *gpu = found["from_texts"]
        busy = ""
        if gpu:
            before, share = gpu
            busy = f"; the GPU begins after {before:.2f} s, then it computes in {share:.1%}"
            busy += " of the time"
        users = f"{from_texts} users of {settings.data}"
        print(f"{users} from texts to scores in {took:.2f} s{busy}", flush=True)


if __name__ == "__main__":
    run_script(main)
