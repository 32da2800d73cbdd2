"""Summarize every user's history with a frozen language model (sections 4.1 and 4.2): users -> RUN/summaries.jsonl

    python summarize.py                                         # the embedded default
    python summarize.py --data data/mind --model owner/llama --run runs/mind --paradigm recurrent --int8
    torchrun --nproc_per_node 8 summarize.py --data ...         # the users are shared out

Users are appended to RUN/summaries.part*.jsonl as they finish; run the same command again after an interruption and
it goes on where it stopped.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import trsr
from llama import CheckpointError, Tokenizer, find_model, fingerprint, generate, load_model, pick_device


def parse_arguments():
    """Return the command line's settings."""
    parser = trsr.script_parser(__doc__)
    flag = parser.add_argument_group("summarization").add_argument
    flag("--paradigm", choices=trsr.SUMMARIZED, default="hierarchical", help="how the blocks become one summary")
    flag("--block-size", type=trsr.positive, default=5, help="items a block")
    flag("--max-new-tokens", type=trsr.positive, default=150, help="longest summary, in tokens")
    flag("--max-length", type=trsr.positive, default=2048, help="longest prompt and summary together, in tokens")
    flag("--int8", action="store_true", help="8-bit weights through bitsandbytes, as in the paper")
    flag("--batch-size", type=trsr.positive, default=16, help="prompts decoded together")
    flag("--users-per-round", type=trsr.positive, default=256, help="users in flight in one process")
    return parser.parse_args()


FIELDS = {"user": str, "paradigm": str, "key": str, "summary": str, "tree": dict}


def collect(run: Path) -> dict[str, dict]:
    """Return all finished records by user, after gathering what the processes wrote into one summaries.jsonl."""
    path, parts = run / "summaries.jsonl", sorted(run.glob("summaries.part*.jsonl"))
    sources = [path, *parts] if path.is_file() else parts
    found = {r["user"]: r for source in sources for _, r in trsr.read_jsonl(source, FIELDS, torn=source in parts)}
    write(path, found.values())
    for part in parts:
        part.unlink()
    return found


def write(path: Path, records: Iterable[dict]) -> None:
    """Write records to path, whole or not at all."""
    with trsr.atomic_write(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> None:
    """Summarize the users of all splits."""
    args = parse_arguments()
    data, name = args.data or "data/demo", args.model or "models/tiny"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    domain, items, splits = trsr.load_dataset(data, ("train", "val", "test"))
    examples = [example for split in splits.values() for example in split]
    texts = {example.user: [items[i] for i in example.history] for example in examples}
    folder, device = find_model(name, args.revision), pick_device()
    half = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    settings = {
        "data": str(data),
        "model": name,
        "fingerprint": fingerprint(folder),
        "paradigm": args.paradigm,
        "block_size": args.block_size,
        "max_new_tokens": args.max_new_tokens,
        "max_length": args.max_length,
        "int8": args.int8,
        "dtype": "bf16" if half else "fp32",
        "prompts": asdict(domain),
    }
    with trsr.locked(args.run, hold=rank == 0):
        if rank == 0:
            trsr.claim_config(args.run, "summarize", settings)
            collect(args.run)
        if world > 1:
            dist.barrier()
        done = {r["user"]: r["key"] for _, r in trsr.read_jsonl(args.run / "summaries.jsonl", FIELDS)}
        keys = {user: trsr.summary_key(settings, history) for user, history in texts.items()}
        pending = [user for user in texts if done.get(user) != keys[user]]
        mine = pending[rank::world]
        if rank == 0:
            print(f"data    {data}: {len(texts)} users, {len(texts) - len(pending)} of them summarized before")
            print(f"model   {name}, {settings['dtype']}{', int8' if args.int8 else ''}, on {world} x {device.type}")
            print(f"method  {args.paradigm}, {args.block_size} items a block, {args.max_new_tokens} new tokens at most")
        model = load_model(folder, device, torch.bfloat16 if half else torch.float32, int8=args.int8)
        tokenizer = Tokenizer(folder, model.config.vocab_size)
        context = min(args.max_length, model.config.max_position_embeddings)
        budget = trsr.Budget(context - args.max_new_tokens, tokenizer.encode, Counter())
        paradigm = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}[args.paradigm]
        bar = tqdm(total=len(mine), unit="user", disable=rank > 0)
        tokens = 0

        def progress(_prompts: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")

        def write_texts(prompts: list[str]) -> list[str]:
            ids = tokenizer.encode(prompts)
            eos = model.config.eos_token_ids
            return [
                tokenizer.decode(o) for o in generate(model, ids, args.max_new_tokens, eos, args.batch_size, progress)
            ]

        with open(args.run / f"summaries.part{rank}.jsonl", "a", encoding="utf-8", newline="\n") as file:
            for start in range(0, len(mine), args.users_per_round):
                users = mine[start : start + args.users_per_round]
                tasks = {user: paradigm(texts[user], domain, budget, args.block_size) for user in users}
                for user, root in trsr.run_rounds(tasks, write_texts):
                    record = {"user": user, "paradigm": args.paradigm, "key": keys[user], "summary": root["summary"]}
                    file.write(json.dumps(record | {"tree": root}, ensure_ascii=False) + "\n")
                    bar.update()
                file.flush()
        bar.close()
        trimmed = [budget.trimmed]
        if world > 1:
            trimmed = [None] * world
            dist.all_gather_object(trimmed, budget.trimmed)
            dist.barrier()
        if rank == 0:
            found = collect(args.run)
            write(args.run / "summaries.jsonl", [found[user] for user in texts])
            for what, count in sum(trimmed, Counter()).items():
                print(f"trimmed to the context of {context} tokens: {count} {what}")
            print(f"wrote   {args.run / 'summaries.jsonl'} ({len(texts)} users)")
            print(f"next    python train.py --data {data} --model {name} --run {args.run}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    trsr.run_main(main, CheckpointError)
