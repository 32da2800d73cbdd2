"""Rank every user's candidates by the probability of Yes (equations 2 and 3) and report Recall, MRR and NDCG at K.

    python evaluate.py --k 3 5 10                               # the embedded default, after train.py
    python evaluate.py --run runs/mind --split test             # data, model and prompt as the run was trained with
    torchrun --nproc_per_node 8 evaluate.py --run-dir runs/mind # the packs are shared out; the result is the same

Writes RUN/scores-SPLIT.jsonl, a line a user, and RUN/results.json, the table. A user's candidates are branches of one
prefix that is computed once; ties count against the positive.
"""

import json
import os
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import trsr
from llama import (
    CheckpointError,
    Tokenizer,
    find_model,
    fingerprint,
    load_model,
    make_tree,
    pack_trees,
    pick_device,
    score_packs,
)
from lora import AdapterError, load_adapter


def parse_arguments():
    """Return the command line's settings."""
    parser = trsr.script_parser(__doc__)
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--split", choices=["val", "test"], default="test", help="users to rank candidates for")
    flag("--k", type=trsr.positive, nargs="+", default=[3, 5, 10], help="cut-offs of the metrics")
    flag("--untrained", action="store_true", help="the base model, without the run's adapter")
    flag("--users", type=trsr.positive, help="only the first so many users")
    flag("--pack-tokens", type=trsr.positive, help="tokens in a forward pass (without it: 8192 on GPUs, 2048 on CPUs)")
    flag("--seed", type=trsr.natural, default=0, help="of the candidates' order and the resampling of users")
    return parser.parse_args()


def popularity_ranks(examples: list[trsr.Example], counts: Counter, seed: int) -> list[int]:
    """Return the positive's rank by how often an item was chosen in training; equals in a seeded random order."""
    rng = np.random.default_rng(seed)
    lists = ([e.positive, *e.negatives] for e in examples)
    return [trsr.rank_of_positive([counts[i] + rng.random() for i in items], 0) for items in lists]


def format_table(rows: dict[str, dict]) -> str:
    """Return rows (name -> metric -> {"mean", "interval"}) as a table, a line a row and its intervals below it."""
    names = list(next(iter(rows.values())))
    lines = [" " * 12 + "".join(f"{name:>16}" for name in names)]
    for title, metrics in rows.items():
        lines.append(f"{title:<12}" + "".join(f"{metrics[name]['mean']:>16.4f}" for name in names))
        if "interval" in metrics[names[0]]:
            pairs = (metrics[name]["interval"] for name in names)
            lines.append(" " * 12 + "".join(f"{f'{low:.3f}-{high:.3f}':>16}" for low, high in pairs))
    return "\n".join(lines)


def summary_of(ranks: list[int], ks: list[int], seed: int) -> dict[str, dict]:
    """Return each metric's mean over users and its 95 % interval."""
    metrics = trsr.metrics_at(ranks, ks)
    intervals = trsr.bootstrap_intervals(metrics, seed=seed)
    return {name: {"mean": float(values.mean()), "interval": intervals[name]} for name, values in metrics.items()}


def main() -> None:
    """Score and rank the candidates of a split."""
    args = parse_arguments()
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device()
    if world > 1:
        dist.init_process_group("gloo")
    settings = trsr.read_config(args.run).get("train")
    adapter, whole = args.run / "adapter", args.run / "model"
    if settings is None or not (args.untrained or (adapter if settings["lora_r"] else whole).is_dir()):
        raise trsr.InputError(f"{args.run}: nothing trained here yet; first run python train.py --run {args.run}")
    data, name = args.data or settings["data"], args.model or settings["model"]
    folder = find_model(name, args.revision or settings["revision"])
    if fingerprint(folder) != settings["fingerprint"]:
        raise trsr.InputError(f"{name}: not the model that {args.run} was trained on ({settings['model']})")
    if not settings["lora_r"] and not args.untrained:
        folder = whole
    domain, items, splits = trsr.load_dataset(data, ("train", args.split))
    examples = splits[args.split][: args.users]
    paradigm = settings["paradigm"]
    summaries = trsr.load_summaries(args.run, items, examples) if paradigm in trsr.SUMMARIZED else {}
    half = args.dtype == "bf16" or (args.dtype == "auto" and settings["dtype"] == "bf16")
    model = load_model(folder, device, torch.bfloat16 if half else torch.float32)
    if settings["lora_r"] and not args.untrained:
        load_adapter(model, adapter)
    model.eval()
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    answers = trsr.answer_ids(tokenizer.encode, domain)
    context = min(settings["max_length"], model.config.max_position_embeddings)
    budget = trsr.Budget(context - 1, tokenizer.encode, Counter())
    recommender = trsr.Recommender(paradigm, domain, items, summaries, settings["history_items"], budget)
    what = "untrained" if args.untrained else "adapter" if settings["lora_r"] else "trained"
    if rank == 0:
        print(f"data    {data}: {len(examples)} users of {args.split}.jsonl")
        print(f"model   {name}, {what}, {'bf16' if half else 'fp32'}, on {world} x {device.type}")
        print(f"prompt  {paradigm}, {settings['history_items']} recent items, context {context} tokens")

    start = time.perf_counter()
    candidates = [trsr.shuffled_candidates(example, args.seed) for example in examples]
    prompts = zip(examples, candidates, strict=True)
    bar = tqdm(prompts, "tokenize", total=len(examples), unit="user", disable=rank > 0)
    trees = [make_tree(recommender.prompt_ids(example, chosen)) for example, chosen in bar]
    pack_tokens = args.pack_tokens or (8192 if device.type == "cuda" else 2048)
    packs = pack_trees(trees, pack_tokens, pack_tokens if device.type == "cuda" else 1)
    with tqdm(total=len(packs[rank::world]), desc="score", unit="pack", disable=rank > 0) as bar:
        parts = [score_packs(model, packs[rank::world], answers, lambda _: bar.update())]
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts[0])
        parts = gathered
        dist.destroy_process_group()
    if rank > 0:
        return
    scores, ranks = trsr.rank_users(examples, candidates, {k: v for part in parts for k, v in part.items()})
    seconds = time.perf_counter() - start

    chance = trsr.random_metrics(len(candidates[0]), args.k)
    rows = {
        "random": {metric: {"mean": mean} for metric, mean in chance.items()},
        "popularity": summary_of(
            popularity_ranks(examples, trsr.popularity(splits["train"]), args.seed), args.k, args.seed
        ),
        what: summary_of(ranks, args.k, args.seed),
    }
    suffix = "-untrained" if args.untrained else ""
    scores_path = args.run / f"scores-{args.split}{suffix}.jsonl"
    with trsr.atomic_write(scores_path) as file:
        for example, chosen, probabilities, place in zip(examples, candidates, scores, ranks, strict=True):
            record = {"user": example.user, "positive": example.positive, "rank": place}
            record |= {"candidates": chosen, "scores": probabilities}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    results_path = args.run / f"results{suffix}.json"
    report = {"data": data, "split": args.split, "users": len(examples), "model": name, "what": what}
    trsr.write_json(results_path, report | {"paradigm": paradigm, "table": rows, "trimmed": dict(budget.trimmed)})
    print(format_table(rows))
    for thing, number in budget.trimmed.items():
        print(f"trimmed to the context of {context} tokens: {number} {thing}")
    print(f"{len(examples)} users in {seconds:.1f} s; below each mean its 95 % interval over users")
    print(f"wrote   {results_path}, {scores_path}")


if __name__ == "__main__":
    trsr.run_main(main, CheckpointError, AdapterError)
