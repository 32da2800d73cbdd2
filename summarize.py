"""Summarize every user's history with a frozen language model (sections 4.1 and 4.2): users -> RUN/summaries.jsonl

    python summarize.py                                         # the embedded default
    python summarize.py --data data/mind --model owner/llama --run runs/mind --paradigm recurrent --int8
    torchrun --nproc_per_node 8 summarize.py --data data/mind --model owner/llama --run-dir runs/mind

Under torchrun the users are shared out. Finished users are appended to RUN/summaries.part*.jsonl; after an
interruption the same command goes on from there.
"""

import fcntl
import json
import os
import resource
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import trsr
from llama import CheckpointError, Tokenizer, find_model, fingerprint, generate, load_model
from prepare.dataset import load_dataset, read_json, read_jsonl, write_json, write_jsonl

# A line of summaries.jsonl; key is a hash of all that determines the summary: the settings and the history's texts.
FIELDS = {"user": str, "paradigm": str, "key": str, "summary": str, "tree": dict}


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


# ---- Processes: the same script runs alone and under torchrun


def join_processes() -> tuple[int, int, torch.device]:
    """Return this process's rank, the number of processes and its device; under torchrun, meet the others first."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(hours=12)
        )  # a process may finish its users long before others
    return rank, world, device


def gather(value: object) -> list:
    """Return the value that each process passes, in the order of their ranks. Every process must call it."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process had in use at once: of its GPU, or on a CPU of the machine."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"


# ---- The run folder: its lock, its settings, and the summaries in it


@contextmanager
def locked(run: Path, hold: bool = True):
    """Make the run folder and hold its lock (if hold); InputError where another process holds it."""
    run.mkdir(parents=True, exist_ok=True)
    if not hold:
        yield
        return
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise trsr.InputError(
                f"{run}: another process is working in this run folder; wait, or choose --run"
            ) from None
        yield


def read_config(run: Path) -> dict:
    """Return the settings of the scripts that ran in the run folder, by script."""
    return read_json(run / "config.json") if (run / "config.json").is_file() else {}


def claim_config(run: Path, section: str, settings: dict, started: bool) -> None:
    """Write settings to the section of the run's config.json; InputError where work was started with others.

    One run folder has one set of settings a script, so that nothing is ever continued or scored with another.
    """
    config, settings = read_config(run), json.loads(json.dumps(settings))
    old = config.get(section, settings)
    differing = [name for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    if started and differing:
        values = ", ".join(f"{n} {old.get(n)!r} (now {settings.get(n)!r})" for n in differing)
        raise trsr.InputError(f"{run}: {section}.py worked here with {values}; use those, or another --run")
    write_json(run / "config.json", config | {section: settings})


def collect_records(run: Path) -> dict[str, dict]:
    """Return all finished records by user, after gathering what the processes wrote into one summaries.jsonl."""
    path, parts = run / "summaries.jsonl", sorted(run.glob("summaries.part*.jsonl"))
    sources = [path, *parts] if path.is_file() else parts
    found = {r["user"]: r for source in sources for _, r in read_jsonl(source, FIELDS, torn=source in parts)}
    write_jsonl(path, found.values())
    for part in parts:
        part.unlink()
    return found


def load_summaries(run: Path, items: dict[str, str], examples: Iterable[trsr.Example]) -> dict[str, str]:
    """Return each user's summary from the run; InputError where one is missing or is not of the user's history."""
    path, settings = run / "summaries.jsonl", read_config(run).get("summarize", {})
    again = f"run python summarize.py --run {run} (with --data and --model), or choose --paradigm recent-only"
    if not path.is_file():
        raise trsr.InputError(f"{path}: no summaries; {again}")
    found = {record["user"]: record for _, record in read_jsonl(path, FIELDS)}
    for example in examples:
        record = found.get(example.user)
        if record is None or record["key"] != trsr.content_hash([settings, [items[i] for i in example.history]]):
            what = "no summary" if record is None else "the summary is of another history"
            raise trsr.InputError(f"{path}: user {example.user!r}: {what}; {again}")
    return {example.user: found[example.user]["summary"] for example in examples}


# ---- The run


def main() -> None:
    """Summarize the users of all splits."""
    args = parse_arguments()
    rank, world, device = join_processes()
    data, name = args.data or "data/demo", args.model or "models/tiny"
    domain, items, splits = load_dataset(data, ("train", "val", "test"))
    texts = {example.user: [items[i] for i in example.history] for split in splits.values() for example in split}
    folder = find_model(name, args.revision)
    half = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda")
    flags = ("paradigm", "block_size", "max_new_tokens", "max_length", "int8")
    settings = {"data": data, "model": name, "fingerprint": fingerprint(folder)} | {f: vars(args)[f] for f in flags}
    settings |= {"dtype": "bf16" if half else "fp32", "prompts": asdict(domain)}
    model = load_model(folder, device, torch.bfloat16 if half else torch.float32, int8=args.int8)
    tokenizer = Tokenizer(folder, model.config.vocab_size)
    context = min(args.max_length, model.config.max_position_embeddings)
    budget = trsr.Budget(context - args.max_new_tokens, tokenizer.encode, Counter())
    with locked(args.run, hold=rank == 0):
        if rank == 0:
            claim_config(args.run, "summarize", settings, started=bool(collect_records(args.run)))
        gather(None)  # nobody reads before the first process has gathered
        done = {r["user"]: r["key"] for _, r in read_jsonl(args.run / "summaries.jsonl", FIELDS)}
        keys = {user: trsr.content_hash([settings, history]) for user, history in texts.items()}
        pending = [user for user in texts if done.get(user) != keys[user]]
        if rank == 0:
            print(f"data    {data}: {len(texts)} users, {len(texts) - len(pending)} of them summarized before")
            print(f"model   {name}, {settings['dtype']}{', int8' if args.int8 else ''}, on {world} x {device.type}")
            print(f"method  {args.paradigm}, {args.block_size} items a block, {args.max_new_tokens} new tokens at most")
        mine = pending[rank::world]
        with tqdm(total=len(mine), unit="user", disable=rank > 0) as bar:
            for user, root in summarize(model, tokenizer, domain, {u: texts[u] for u in mine}, budget, args, bar):
                record = {"user": user, "paradigm": args.paradigm, "key": keys[user], "summary": root["summary"]}
                with open(args.run / f"summaries.part{rank}.jsonl", "a", encoding="utf-8", newline="\n") as file:
                    file.write(json.dumps(record | {"tree": root}, ensure_ascii=False) + "\n")
                bar.update()
        trimmed = sum(gather(budget.trimmed), Counter())
        if rank == 0:
            found = collect_records(args.run)
            write_jsonl(args.run / "summaries.jsonl", [found[user] for user in texts])
            for what, count in trimmed.items():
                print(f"trimmed to the context of {context} tokens: {count} {what}")
            print(f"wrote   {args.run / 'summaries.jsonl'} ({len(texts)} users); peak {peak_memory(device)}")
            print(f"next    python train.py --data {data} --model {name} --run {args.run}")


def summarize(model, tokenizer, domain, texts: dict[str, list[str]], budget, args, bar):
    """Yield (user, root of the tree of summaries) as users finish, args.users_per_round users at a time."""
    paradigm = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}[args.paradigm]
    tokens = 0

    def progress(_prompts: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")

    def write_texts(prompts: list[str]) -> list[str]:
        ids, eos = tokenizer.encode(prompts), model.config.eos_token_id
        answers = generate(model, ids, args.max_new_tokens, eos, args.batch_size, progress)
        return [tokenizer.decode(answer) for answer in answers]

    users = list(texts)
    for start in range(0, len(users), args.users_per_round):
        together = users[start : start + args.users_per_round]
        tasks = {user: paradigm(texts[user], domain, budget, args.block_size) for user in together}
        yield from trsr.run_rounds(tasks, write_texts)


if __name__ == "__main__":
    trsr.run_main(main, CheckpointError)
