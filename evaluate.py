"""Rank every user's candidates by the probability of Yes (equations 2 and 3) and report Recall, MRR and NDCG at K.

    python evaluate.py --k 3 5 10                               # the embedded default, after train.py
    python evaluate.py --run runs/mind --split test             # data, model and prompt as the run was trained with
    torchrun --nproc_per_node 8 evaluate.py --run-dir runs/mind # users are shared out; the result is the same

Writes RUN/scores-SPLIT.jsonl, a line a user, and RUN/results.json, the table. A user's candidates are branches of one
prefix that is computed once; ties count against the positive.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import trsr
from llama import compile_layers, score_packs
from lora import load_adapter
from models.hub import find_model, load_config, load_model
from models.packs import Pack
from prepare.dataset import load_dataset, write_json, write_jsonl
from runfolder.command import natural, positive, script_parser
from runfolder.compare import format_table
from runfolder.page import write_report
from runfolder.processes import ahead, gather, host_workers, join_processes, peak_memory, run_script, share_out
from runfolder.prompts import user_packs
from runfolder.scores import read_scores, table_of
from runfolder.state import fingerprint, load_summaries, read_config
from train import make_recommender


def parse_arguments():
    """Return the command line's settings."""
    parser = script_parser(__doc__)
    flag = parser.add_argument_group("evaluation").add_argument
    flag("--split", choices=["val", "test"], default="test", help="users to rank candidates for")
    flag("--k", type=positive, nargs="+", default=[3, 5, 10], help="cut-offs of the metrics")
    flag("--untrained", action="store_true", help="the base model, without the run's adapter")
    flag("--users", type=positive, help="only the first so many users")
    flag("--pack-tokens", type=positive, help="tokens in a forward pass (without it: 16384 on GPUs, 4096 on CPUs)")
    flag("--seed", type=natural, default=0, help="of the candidates' order and the resampling of users")
    flag("--scores", type=Path, help="rank by this file's scores, another system's, in the form of scores-test.jsonl")
    flag("--report", action="store_true", help="write RUN/report.html too, for a browser")
    return parser.parse_args()


def own_packs(recommender, examples, candidates, args, show: bool) -> Iterator[Pack]:
    """Return the packs of this process's users, shared out by their candidates' lengths. Worker processes, if args asks
    for any, tokenize from now on.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = [sum(len(recommender.items[i]) for i in items) for items in candidates]
    return user_packs(recommender, examples, candidates, sorted(share_out(sizes, world)[rank]), args, show)


def score(model, packs, n_users: int, answers, budget: trsr.Budget) -> tuple[dict, list[int], Counter]:
    """Return the (Yes, No) logits by (user, candidate), each user's longest prompt in tokens, and what was trimmed.

    packs: this process's own; every process gets the result of all.
    """
    lengths: Counter = Counter()

    def measure(pack: Pack) -> None:
        for (user, _), row in pack.leaves.items():
            lengths[user] = max(lengths[user], int(pack.positions[row]) + 1)

    parts = gather((score_packs(model, ahead(packs), answers, measure), lengths, budget.trimmed))
    scores = {key: value for part, _, _ in parts for key, value in part.items()}
    lengths, trimmed = (sum((part[i] for part in parts), Counter()) for i in (1, 2))
    return scores, [lengths[user] for user in range(n_users)], trimmed


def rank_by_file(args) -> None:
    """Print the table for the scores of --scores and write it to RUN/results-NAME.json."""
    data = args.data or read_config(args.run).get("train", {}).get("data", "data/demo")
    _, _, splits = load_dataset(data, ("train", args.split))
    examples = splits[args.split][: args.users]
    candidates = [trsr.shuffled_candidates(example) for example in examples]
    _, ranks = trsr.rank_users(examples, candidates, read_scores(args.scores, examples, candidates))
    name = args.scores.stem
    table = table_of(name, ranks, examples, splits["train"], args.k, args.seed)
    print(format_table(table))
    report = {"data": data, "split": args.split, "users": len(examples), "row": name, "paradigm": name, "table": table}
    args.run.mkdir(parents=True, exist_ok=True)
    write_json(args.run / f"results-{name}.json", report)
    print(f"wrote   {args.run / f'results-{name}.json'}")


def main() -> None:
    """Score and rank the candidates of a split."""
    args = parse_arguments()
    if args.scores:
        return rank_by_file(args)
    rank, world, device = join_processes()
    trained = read_config(args.run).get("train")
    kind = "adapter" if trained and trained["lora_r"] else "model"
    if trained is None or not (args.untrained or (args.run / kind).is_dir()):
        raise trsr.InputError(f"{args.run}: nothing trained here yet; first run python train.py --run {args.run}")
    own = {name: value for name, value in vars(args).items() if value is not None and value != "auto"}
    # What was not asked for is as it was trained.
    args = argparse.Namespace(**vars(args) | trained | {"users": None} | own)
    args.pack_tokens = own.get("pack_tokens", 16384 if device.type == "cuda" else 4096)
    args.pad_to = args.pack_tokens if device.type == "cuda" else 1
    args.workers = host_workers(device)
    folder = find_model(args.model, args.revision)
    if fingerprint(folder) != args.fingerprint:
        raise trsr.InputError(f"{args.model}: not the model that {args.run} was trained on ({trained['model']})")
    domain, items, splits = load_dataset(args.data, ("train", args.split))
    examples = splits[args.split][: args.users]
    summaries = load_summaries(args.run, items, examples) if args.paradigm in trsr.SUMMARIZED else {}
    recommender, answers = make_recommender(args, load_config(folder), folder, domain, items, summaries)
    row = "untrained" if args.untrained else "trained"
    if rank == 0:
        print(f"data    {args.data}: {len(examples)} users of {args.split}.jsonl")
        print(f"model   {args.model}, {row} ({kind}), {args.dtype}, on {world} x {device.type}")
        print(f"prompt  {args.paradigm}, {args.history_items} recent items, {recommender.budget.tokens} tokens at most")
    candidates = [trsr.shuffled_candidates(example) for example in examples]
    packs = own_packs(recommender, examples, candidates, args, show=rank == 0)  # while the weights are loaded
    if kind == "model" and not args.untrained:
        folder = args.run / "model"
    model = load_model(folder, device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    if kind == "adapter" and not args.untrained:
        load_adapter(model, args.run / "adapter")
    model.eval()
    if device.type == "cuda" and not args.no_compile:
        compile_layers(model)
    start = time.perf_counter()  # on a GPU, the first users are tokenized by now
    logits, lengths, trimmed = score(model, packs, len(examples), answers, recommender.budget)
    seconds = time.perf_counter() - start
    if rank > 0:
        return
    scores, ranks = trsr.rank_users(examples, candidates, logits)

    table = table_of(row, ranks, examples, splits["train"], args.k, args.seed)
    print(format_table(table))
    print("below each mean is its 95 % interval over users")
    print(f"{len(examples)} users in {seconds:.1f} s; peak {peak_memory(device)}")
    for what, number in trimmed.items():
        print(f"trimmed to the context: {number} {what}")
    suffix = "-untrained" if args.untrained else ""
    lines, results = args.run / f"scores-{args.split}{suffix}.jsonl", args.run / f"results{suffix}.json"
    names = ("user", "positive", "rank", "candidates", "scores", "prompt_tokens")
    users, positives = [e.user for e in examples], [e.positive for e in examples]
    columns = (users, positives, ranks, candidates, scores, lengths)
    write_jsonl(lines, (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)))
    report = {"data": args.data, "split": args.split, "users": len(examples), "model": args.model, "row": row}
    write_json(results, report | {"paradigm": args.paradigm, "table": table, "trimmed": dict(trimmed)})
    page = f", {write_report(args.run, args.split, suffix)}" if args.report else ""
    print(f"wrote   {results}, {lines}{page}")


if __name__ == "__main__":
    run_script(main)
