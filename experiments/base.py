"""A base language model from scratch on a dataset's training split, where no pretrained weights can be had.

    python -m experiments.base --data data/mind --out runs/base/mind-0            # meant for a GPU
    python -m experiments.base --data data/mind --out runs/base/mind-small --hidden-size 128 --layers 4 --tokens 4e6

Writes a Llama folder for summarize.py, train.py and evaluate.py, and base.json, which tells what the model saw: the
training users and the texts of the items that train.jsonl names, nothing of val.jsonl and test.jsonl. It learns

    questions   the recommendation prompts, under all paradigms: each item of a user's history after the first, and the
                target, is a positive after the items before it; the negatives are uniform; loss on Yes and No alone
    writings    the prompts that ask for a summary, answered by experiments.rule; loss on every token, with a tenth of
                its weight on the prompt's

A step has a pack of each. What is in it depends on the seed and the step alone, however many processes tokenize.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import trsr
from experiments.corpus import BLOCK, CONTEXT, QUESTIONS, WRITINGS, Corpus, Question, Writing
from experiments.tiny.make import (
    CONFIG,
    initialize,
    learning_rate,
    make_optimizers,
    save,
    write_tokenizer,
)
from files.jsonl import read_json, write_json
from launch.command import natural, positive, run_main
from launch.processes import host_workers, peak_memory
from llama import Llama, compile_layers, load_config
from models.tokenizer import Tokenizer
from ops.masks import BLOCK as PACK_UNIT
from ops.packs import Pack, Tree, make_tree, pack_trees

HEAD, RECENT = 64, 3  # head size, recent items in a prompt
WRITINGS_SHARE = 4  # a step has this many times fewer tokens of writings than of questions
QUESTION_WEIGHT, WRITING_WEIGHT = 1.0, 1.0  # of the mean losses of a step's questions and writings
PROMPT_WEIGHT = 0.1  # of a writing's prompt tokens, where a summary's count 1
LOG_EVERY = 10  # steps


# ---- Steps: which examples, and their packs


Step = tuple[list[Question], list[Writing]]


def plan_steps(corpus: Corpus, tokenizer: Tokenizer, args) -> list[Step]:
    """Return steps of about args.tokens tokens in all, each with about a pack of questions and one of writings."""
    ids = tokenizer.encode(list(corpus.texts.values()))
    sizes = {
        item: len(some) + 2 for item, some in zip(corpus.texts, ids, strict=True)
    }  # with number and line's end
    ids = tokenizer.encode(corpus.summaries())
    instruction, summary, cue = (
        55,
        14 + sum(map(len, ids)) // len(ids),
        4,
    )  # the summary with its header

    def asked(question: Question) -> int:
        sequence, i = corpus.sequences[question.user], question.position
        shown = (
            sequence[:i]
            if question.paradigm == "whole-history"
            else sequence[max(0, i - RECENT) : i]
        )
        fixed = instruction + (summary if question.paradigm in trsr.SUMMARIZED else 0)
        prefix = min(fixed + sum(sizes[item] for item in shown), CONTEXT)
        return prefix + sum(sizes[item] + cue for item in (sequence[i], *question.negatives))

    def written(writing: Writing) -> int:
        sequence, start = corpus.sequences[writing.user][: writing.n], writing.block * BLOCK
        if writing.kind == "merge":
            return instruction + summary * (writing.block + 2)
        items = sum(sizes[item] for item in sequence[start : start + BLOCK])
        return min(instruction + items + summary * (1 + (writing.kind == "update")), CONTEXT)

    def filled(examples: Iterator, size_of, room: int) -> Iterator[tuple[list, int]]:
        held, total = [], 0
        for example in examples:
            size = size_of(example)
            if held and total + size > room:
                yield held, total
                held, total = [], 0
            held.append(example)
            total += size

    plan, planned = [], 0
    questions = filled(corpus.questions(args.negatives, args.seed), asked, args.pack_tokens)
    writings = filled(corpus.writings(args.seed), written, args.pack_tokens // WRITINGS_SHARE)
    for (some, n), (others, m) in zip(questions, writings, strict=False):
        plan.append((some, others))
        planned += n + m
        if planned >= args.tokens:
            return plan
    raise AssertionError("both go on without end")


class Steps(Dataset):
    """Each step's packs of questions and of writings, as texts are tokenized and packed by whoever asks."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, plan: list[Step], pack_tokens: int, pad_to: int
    ):
        self.corpus, self.tokenizer, self.plan = corpus, tokenizer, plan
        self.pack_tokens, self.pad_to = pack_tokens, pad_to
        self.answers = trsr.answer_ids(tokenizer.encode, corpus.domain)
        budget = trsr.Budget(CONTEXT - 1, tokenizer.encode, Counter())  # one token is the answer's
        self.recommender = trsr.Recommender("none", corpus.domain, corpus.texts, {}, RECENT, budget)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> tuple[list[Pack], list[Pack]]:
        questions, writings = self.plan[step]
        room, few = self.pack_tokens, self.pack_tokens // WRITINGS_SHARE
        asked = [self.question_tree(question) for question in questions]
        trees = [self.writing_tree(writing) for writing in writings]
        written = [weighted(pack, trees) for pack in pack_trees(trees, few, min(few, self.pad_to))]
        asked = pack_trees(asked, room, min(room, self.pad_to), last_only=True)
        return asked, written

    def question_tree(self, question: Question) -> Tree:
        """Return the prompts of the positive and the negatives, each with its answer."""
        example, summary = self.corpus.example(question)
        recommender = replace(self.recommender, paradigm=question.paradigm, summaries={"": summary})
        prompts = recommender.prompt_ids(example, [example.positive, *example.negatives])
        yes, no = self.answers
        return make_tree([[*ids, no if i else yes] for i, ids in enumerate(prompts)])

    def writing_tree(self, writing: Writing) -> Tree:
        """Return the prompt, its answer and the end as a tree of one branch."""
        prompt, answer = self.corpus.written(
            writing, replace(self.recommender.budget, tokens=CONTEXT - 150)
        )
        begin, ids = self.tokenizer.encode([prompt, prompt + answer])
        return Tree(begin, [[*ids[len(begin) :], CONFIG["eos_token_id"]]])


def weighted(pack: Pack, trees: list[Tree]) -> Pack:
    """Return a pack of trees of one branch with the prefixes' tokens weighing less as targets."""
    answers = torch.zeros(len(pack.ids), dtype=torch.bool)
    for (t, _), last in pack.leaves.items():
        answers[last + 1 - len(trees[t].branches[0]) : last + 1] = True
    # No prompt begins another, so the targets of a row are all in prefixes, as the next row is, or all in answers.
    return replace(
        pack, weights=pack.weights * torch.where(answers[pack.rows + 1], 1.0, PROMPT_WEIGHT)
    )


# ---- Training


def mean_loss(model: Llama, packs: list[Pack], weight: float, device: torch.device) -> torch.Tensor:
    """Return the mean loss of the packs' targets, after a backward pass of `weight` times it."""
    count, total = sum(pack.weights.sum().item() for pack in packs), torch.zeros((), device=device)
    for pack in packs:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(pack.to(device)) / count
        (loss * weight).backward()
        total += loss.detach()
    return total


def train_step(model: Llama, optimizers, kinds, lr: float, device: torch.device) -> torch.Tensor:
    """Update the model on a step's packs; return the mean losses of its questions and its writings, (2,)."""
    weights = (QUESTION_WEIGHT, WRITING_WEIGHT)
    pairs = zip(kinds, weights, strict=True)
    losses = torch.stack([mean_loss(model, packs, weight, device) for packs, weight in pairs])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def train(model: Llama, steps: Steps, args, device: torch.device) -> dict:
    """Train for all steps; return each kind's tokens, its mean loss in the last tenth of the steps, and the seconds."""
    optimizers, workers = make_optimizers(model, args.lr), host_workers(device)
    loader = DataLoader(
        steps, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None
    )
    tokens, losses, began = [0, 0], [], time.perf_counter()
    with tqdm(loader, unit="step") as bar:
        for step, kinds in enumerate(bar):
            losses.append(train_step(model, optimizers, kinds, learning_rate(step, args), device))
            tokens = [
                n + sum(pack.tokens for pack in packs)
                for n, packs in zip(tokens, kinds, strict=True)
            ]
            if (step + 1) % LOG_EVERY == 0 or step + 1 == len(
                steps
            ):  # to ask more often would make the GPU wait
                asked, written = torch.stack(losses[-LOG_EVERY:]).mean(0).tolist()
                speed = sum(tokens) / (time.perf_counter() - began)
                bar.set_postfix_str(
                    f"loss of questions {asked:.4f}, of writings {written:.4f}, {speed:.0f} tokens/s"
                )
    seconds, last = (
        time.perf_counter() - began,
        torch.stack(losses[-max(1, len(losses) // 10) :]).mean(0).tolist(),
    )
    found = {"tokens": tokens, "loss": last}
    named = {
        what: dict(zip(("questions", "writings"), pair, strict=True))
        for what, pair in found.items()
    }
    return named | {"seconds": round(seconds, 1)}


def parse_arguments():
    """Return the command line's settings."""
    form = type(
        "Form", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    flag = parser.add_argument
    flag("--data", required=True, help="dataset folder, made by prepare")
    flag("--out", type=Path, required=True, help="model folder to write")
    flag("--seed", type=natural, default=0, help="of weights and examples")
    flag("--hidden-size", type=positive, default=384, help="a multiple of 64")
    flag("--layers", type=positive, default=8)
    flag("--vocabulary", type=positive, default=8192, help="pieces of the tokenizer")
    flag("--tokens", type=float, default=40e6, help="tokens to compute, about")
    flag(
        "--pack-tokens",
        type=positive,
        default=16384,
        help="of questions in a step (of writings a quarter)",
    )
    flag("--lr", type=float, default=2e-3, help="highest learning rate")
    flag("--negatives", type=positive, default=4, help="for a positive")
    args = parser.parse_args()
    for name, unit in (("hidden_size", HEAD), ("pack_tokens", PACK_UNIT)):
        if vars(args)[name] % unit:
            parser.error(f"--{name.replace('_', '-')} {vars(args)[name]} is no multiple of {unit}")
    return args


def write_configuration(args, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    heads, wide = args.hidden_size // HEAD, -(-args.hidden_size * 8 // 3 // HEAD) * HEAD
    config = CONFIG | {
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden_size,
        "intermediate_size": wide,
    }
    config |= {
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    config |= {
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "torch_dtype": str(dtype).split(".")[1],
    }
    write_json(args.out / "config.json", config)
    write_json(args.out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def seen(corpus: Corpus, plan: list[Step], args) -> dict:
    """Return what base.json says of the data: where they come from, and how many examples of each kind there are."""
    examples = Counter(question.paradigm for questions, _ in plan for question in questions)
    asked = examples.total()
    examples.update(writing.kind for _, writings in plan for writing in writings)
    sources = read_json(Path(args.data) / "meta.json").get("sources", [])
    record = {
        "data": args.data,
        "sources": sources,
        "split": "train",
        "users": len(corpus.sequences),
    }
    record |= {"texts": len(corpus.texts), "positives": len(corpus.positions())}
    record |= {"examples": {kind: examples[kind] for kind in (*QUESTIONS, *WRITINGS)}}
    record |= {"answers": {"Yes": asked, "No": asked * args.negatives}}
    return record | {"facets": corpus.rule.facets, "common_words": sorted(corpus.rule.common)}


def main() -> None:
    """Train the base model that the command line asks for."""
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Threads would add up the gradients of a pack's rows in the order in which they come.
    torch.use_deterministic_algorithms(device.type == "cpu")
    corpus = Corpus.load(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "base.json").unlink(
        missing_ok=True
    )  # it comes last, so that a folder that has one is whole
    write_configuration(args, dtype)
    try:
        tokenizer = write_tokenizer(args.out, corpus.tokenizer_lines(), args.vocabulary)
    except RuntimeError as error:
        raise trsr.InputError(f"--vocabulary {args.vocabulary}: {error}") from None
    plan = plan_steps(corpus, tokenizer, args)
    args.steps = len(plan)
    steps = Steps(
        corpus, tokenizer, plan, args.pack_tokens, args.pack_tokens if device.type == "cuda" else 1
    )
    model = Llama(load_config(args.out))
    initialize(model, args.seed)
    model.to(device)
    if device.type == "cuda":
        compile_layers(model)
    n, record = sum(p.numel() for p in model.parameters()), seen(corpus, plan, args)
    asked, written = (
        sum(record["examples"][kind] for kind in kinds) for kinds in (QUESTIONS, WRITINGS)
    )
    print(
        f"data    {args.data}: {record['users']} training users, {record['texts']} texts of items"
    )
    print(
        f"model   {n / 1e6:.1f}M parameters from seed {args.seed}, {args.vocabulary} pieces, on {device.type}"
    )
    print(
        f"learns  {asked} questions, {asked / record['positives']:.2f} epochs, and {written} writings"
    )
    print(
        f"steps   {args.steps}, each of up to {args.pack_tokens} + {args.pack_tokens // WRITINGS_SHARE} tokens"
    )
    found = train(model, steps, args, device)
    save(model, args.out, dtype)
    made = {"parameters": n, "device": device.type, "torch": torch.__version__}
    write_json(
        args.out / "base.json",
        record | found | made | {"settings": vars(args) | {"out": str(args.out)}},
    )
    losses = ", ".join(f"{name} {value:.4f}" for name, value in found["loss"].items())
    print(f"learned {sum(found['tokens'].values())} tokens in {found['seconds']} s; loss {losses}")
    print(f"wrote   {args.out}; peak {peak_memory(device)}")
    print(
        f"next    python summarize.py --data {args.data} --model {args.out} --run runs/{args.out.name}"
    )


if __name__ == "__main__":
    run_main(main)
