"""Summarize every user's history with a frozen language model (sections 4.1 and 4.2): users -> RUN/summaries.jsonl

    python summarize.py                                         # the embedded default
    python summarize.py --data data/mind --model owner/llama --run runs/mind --paradigm recurrent --int8
    torchrun --nproc_per_node 8 summarize.py --data data/mind --model owner/llama --run-dir runs/mind

Under torchrun the users are shared out. Finished users are appended to RUN/summaries.part*.jsonl; after an
interruption the same command goes on from there.
"""

from collections import Counter
from dataclasses import asdict

import torch
from tqdm import tqdm

import trsr
from llama import Generator, compile_layers
from models.hub import find_model, load_model
from models.int8 import WAYS
from models.tokenizer import Tokenizer
from prepare.dataset import append_jsonl, load_dataset, read_jsonl, write_jsonl
from runfolder.command import positive, script_parser
from runfolder.estimate import expected_slots, rows_that_fit
from runfolder.processes import gather, join_processes, peak_memory, run_script, share_out
from runfolder.state import FIELDS, claim_config, collect_records, fingerprint, locked


def parse_arguments():
    """Return the command line's settings."""
    parser = script_parser(__doc__)
    flag = parser.add_argument_group("summarization").add_argument
    flag("--paradigm", choices=trsr.SUMMARIZED, default="hierarchical", help="how the blocks become one summary")
    flag("--block-size", type=positive, default=5, help="items a block")
    flag("--max-new-tokens", type=positive, default=150, help="longest summary, in tokens")
    flag("--max-length", type=positive, default=2048, help="longest prompt and summary together, in tokens")
    help = "8-bit weights: this project's, or `--int8 bitsandbytes` for LLM.int8 as in the paper (slower)"
    flag("--int8", nargs="?", choices=WAYS, const="weights", help=help)
    flag("--batch-size", type=positive, help="prompts decoded together (without it: 16 on CPUs, what fits on GPUs)")
    return parser.parse_args()


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
    args.slots = expected_slots(texts.values(), domain, budget, args) if device.type == "cuda" else 0
    args.batch_size = args.batch_size or rows_that_fit(model, args.slots, device)
    if device.type == "cuda" and args.int8 != "bitsandbytes" and not args.no_compile:
        compile_layers(model)
    with locked(args.run, hold=rank == 0):
        if rank == 0:
            claim_config(args.run, "summarize", settings, started=bool(collect_records(args.run)))
        gather(None)  # nobody reads before the first process has gathered
        done = {r["user"]: r["key"] for _, r in read_jsonl(args.run / "summaries.jsonl", FIELDS)}
        keys = {user: trsr.content_hash([settings, history]) for user, history in texts.items()}
        pending = [user for user in texts if done.get(user) != keys[user]]
        if rank == 0:
            print(f"data    {data}: {len(texts)} users, {len(texts) - len(pending)} of them summarized before")
            eight = f", int8 ({args.int8})" if args.int8 else ""
            print(f"model   {name}, {settings['dtype']}{eight}, on {world} x {device.type}, {args.batch_size} a batch")
            print(f"method  {args.paradigm}, {args.block_size} items a block, {args.max_new_tokens} new tokens at most")
        sizes = [sum(map(len, texts[user])) for user in pending]
        mine = [pending[i] for i in share_out(sizes, world)[rank]]
        with tqdm(total=len(mine), unit="user", disable=rank > 0) as bar:
            for user, root in summarize(model, tokenizer, domain, {u: texts[u] for u in mine}, budget, args, bar):
                record = {"user": user, "paradigm": args.paradigm, "key": keys[user], "summary": root["summary"]}
                append_jsonl(args.run / f"summaries.part{rank}.jsonl", record | {"tree": root})
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
    """Yield (user, root of the tree of summaries) as users finish; long histories first, so that the end is short."""
    paradigm = {"hierarchical": trsr.hierarchical, "recurrent": trsr.recurrent}[args.paradigm]
    lengths = (args.batch_size, args.max_new_tokens, model.config.eos_token_id, args.slots)
    generator, written = Generator(model, *lengths), 0

    def submit(prompts: list[tuple], first: bool) -> None:
        keys, texts = zip(*prompts, strict=True)
        generator.submit(zip(keys, tokenizer.encode(list(texts)), strict=True), first)

    def finished() -> list[tuple]:
        nonlocal written
        try:
            done = generator.step()
        except torch.OutOfMemoryError:
            if generator.n_rows == 1:
                raise trsr.InputError("out of memory with one prompt a batch; lower --max-length, or --int8") from None
            generator.shrink()
            bar.write(f"out of memory: going on with {generator.n_rows} prompts a batch")
            return []
        written += sum(len(ids) for _, ids in done)
        bar.set_postfix_str(f"{written / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=bool(done))
        return [(key, tokenizer.decode(ids)) for key, ids in done]

    users = sorted(texts, key=lambda user: -len(texts[user]))
    tasks = ((user, paradigm(texts[user], domain, budget, args.block_size)) for user in users)
    yield from trsr.run_tasks(tasks, lambda: len(generator.waiting) < args.batch_size, submit, finished)


if __name__ == "__main__":
    run_script(main)
