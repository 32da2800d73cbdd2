"""Train a base language model from scratch, on a dataset's training split.

    python -m experiments.base --data data/mind --out runs/base/mind-0            # meant for a GPU
    python -m experiments.base --data data/mind --out runs/base/mind-small --hidden-size 128 \\
        --layers 4 --tokens 4e6

It takes the place of a pretrained model. Writes a Llama folder for summarize.py, train.py and
evaluate.py, and base.json, which records what the model saw: the training users and the texts of
the items in train.jsonl, but nothing from val.jsonl or test.jsonl. The model learns two things:

    questions   recommendation prompts of all paradigms. Each item of a history but the first, and
                the target, is a positive after the items before it; negatives are uniform. The loss
                is on Yes and No alone.
    writings    prompts that ask for a summary, answered by experiments.rule. The loss is on every
                token; the prompt's have a tenth of the weight.

A step has about one pack of each. Its content depends only on the seed and the step, not on how
many processes tokenize.
"""

import time
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import trsr
from experiments.corpus import BLOCK, CONTEXT, QUESTIONS, WRITINGS, Corpus, Question, Writing
from experiments.scratch import (
    CONFIG,
    initialize,
    learning_rate,
    make_optimizers,
    save,
    update,
    write_config,
    write_tokenizer,
)
from files.jsonl import read_json, write_json
from launch.bars import Bar
from launch.command import option, parse_settings, run_main
from launch.numbers import positive, positive_real, seed_number
from launch.processes import host_workers, peak_memory
from llama import Llama, compile_layers, load_config
from models.chat import Plain
from models.tokenizer import Tokenizer
from ops.masks import BLOCK as PACK_UNIT
from ops.packs import Pack, Tree, make_tree, pack_trees
from trsr import InputError

HEAD, RECENT = 64, 3  # head size, recent items in a prompt
WRITINGS_SHARE = 4  # a step has a fourth as many tokens of writings as of questions
QUESTION_WEIGHT, WRITING_WEIGHT = 1.0, 1.0  # of the two mean losses of a step
PROMPT_WEIGHT = 0.1  # of the prompt's tokens in a writing; the summary's have 1
LOG_EVERY = 10  # steps


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: str = option(SUPPRESS, "dataset folder made by prepare", required=True)
    out: Path = option(SUPPRESS, "model folder to write", Path, required=True)
    seed: int = option(0, "seed of weights and examples", seed_number)
    hidden_size: int = option(384, "a multiple of 64", positive)
    layers: int = option(8, "number of layers", positive)
    vocabulary: int = option(8192, "pieces of the tokenizer", positive)
    tokens: float = option(40e6, "tokens to compute, approximately", positive_real)
    pack_tokens: int = option(
        16384, "tokens of questions in a step; writings have a quarter", positive
    )
    lr: float = option(2e-3, "highest learning rate", positive_real)
    negatives: int = option(4, "negatives per positive", positive)


def check(settings: Settings) -> None:
    """Raise InputError for sizes that are not multiples of what the kernels need."""
    sizes = {"--hidden-size": (settings.hidden_size, HEAD)}
    sizes["--pack-tokens"] = settings.pack_tokens, PACK_UNIT
    for flag, (size, unit) in sizes.items():
        if size % unit:
            raise InputError(f"{flag} {size} is no multiple of {unit}")


# ---- Steps: which examples

Step = tuple[list[Question], list[Writing]]


class Lengths:
    """Estimates the tokens of examples without tokenizing their prompts."""

    INSTRUCTION, CUE, HEADER = 55, 4, 14

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.sequences = corpus.sequences
        ids = tokenizer.encode(list(corpus.texts.values()))
        # An item has a number before it and a line end after it.
        self.items = {i: len(text) + 2 for i, text in zip(corpus.texts, ids, strict=True)}
        ids = tokenizer.encode(corpus.summaries())
        self.summary = self.HEADER + sum(map(len, ids)) // len(ids)

    def of_question(self, question: Question) -> int:
        """Return the tokens of a question's tree."""
        sequence, i = self.sequences[question.user], question.position
        first = 0 if question.paradigm == "whole-history" else max(0, i - RECENT)
        prefix = self.INSTRUCTION + sum(self.items[item] for item in sequence[first:i])
        if question.paradigm in trsr.SUMMARIZED:
            prefix += self.summary
        candidates = [sequence[i], *question.negatives]
        return min(prefix, CONTEXT) + sum(self.items[item] + self.CUE for item in candidates)

    def of_writing(self, writing: Writing) -> int:
        """Return the tokens of a writing's prompt and answer."""
        if writing.kind == "merge":
            return self.INSTRUCTION + self.summary * (writing.block + 2)
        start = writing.block * BLOCK
        items = self.sequences[writing.user][: writing.n][start : start + BLOCK]
        summaries = 2 if writing.kind == "update" else 1
        size = self.INSTRUCTION + sum(self.items[item] for item in items)
        return min(size + self.summary * summaries, CONTEXT)


def plan_steps(corpus: Corpus, tokenizer: Tokenizer, settings: Settings) -> list[Step]:
    """Return steps of about settings.tokens tokens in all."""
    lengths, room = Lengths(corpus, tokenizer), settings.pack_tokens
    questions = corpus.questions(settings.negatives, settings.seed)
    writings = corpus.writings(settings.seed)
    pairs = zip(
        filled(questions, lengths.of_question, room),
        filled(writings, lengths.of_writing, room // WRITINGS_SHARE),
        strict=False,
    )
    plan, planned = [], 0
    for (asked, n), (written, m) in pairs:
        plan.append((asked, written))
        planned += n + m
        if planned >= settings.tokens:
            return plan
    raise AssertionError("questions and writings never end")


def filled(
    examples: Iterator, size_of: Callable[[object], int], room: int
) -> Iterator[tuple[list, int]]:
    """Yield examples in groups that fit into room, with the tokens of each group."""
    held, total = [], 0
    for example in examples:
        size = size_of(example)
        if held and total + size > room:
            yield held, total
            held, total = [], 0
        held.append(example)
        total += size


# ---- Steps: their packs


class Steps(Dataset):
    """Each step's packs of questions and of writings, made by whichever process asks."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, plan: list[Step], pack_tokens: int, pad_to: int
    ):
        self.corpus, self.tokenizer, self.plan = corpus, tokenizer, plan
        self.pack_tokens, self.pad_to = pack_tokens, pad_to
        self.form = Plain(tokenizer)
        self.answers = trsr.answer_ids(self.form.encode, corpus.domain)
        budget = trsr.Budget(CONTEXT - 1, self.form.encode, Counter())  # one token is the answer's
        self.recommender = trsr.Recommender("none", corpus.domain, corpus.texts, {}, RECENT, budget)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> tuple[list[Pack], list[Pack]]:
        questions, writings = self.plan[step]
        trees = [self.question_tree(question) for question in questions]
        room = self.pack_tokens
        asked = pack_trees(trees, room, min(room, self.pad_to), last_only=True)

        trees = [self.writing_tree(writing) for writing in writings]
        room = self.pack_tokens // WRITINGS_SHARE
        written = [
            weighted(pack, trees) for pack in pack_trees(trees, room, min(room, self.pad_to))
        ]
        return asked, written

    def question_tree(self, question: Question) -> Tree:
        """Return the prompts of the positive and the negatives, each with its answer."""
        example, summary = self.corpus.example(question)
        recommender = replace(self.recommender, paradigm=question.paradigm, summaries={"": summary})
        prompts = recommender.prompt_ids(example, [example.positive, *example.negatives])
        yes, no = self.answers
        return make_tree([[*ids, no if i else yes] for i, ids in enumerate(prompts)])

    def writing_tree(self, writing: Writing) -> Tree:
        """Return the prompt, its answer and the end token, as a tree with one branch."""
        budget = replace(self.recommender.budget, tokens=CONTEXT - 150)
        prompt, answer = self.corpus.written(writing, budget)
        (begin,), (ids,) = self.form.encode([prompt]), self.form.encode([prompt], answer)
        return Tree(begin, [[*ids[len(begin) :], CONFIG["eos_token_id"]]])


def weighted(pack: Pack, trees: list[Tree]) -> Pack:
    """Return a pack of one-branch trees, with weight PROMPT_WEIGHT for targets in a prefix."""
    answers = torch.zeros(len(pack.ids), dtype=torch.bool)
    for (t, _), last in pack.leaves.items():
        answers[last + 1 - len(trees[t].branches[0]) : last + 1] = True
    # No prompt is the start of another, so a row's targets are either all in prefixes, like the
    # next row, or all in answers.
    shares = torch.where(answers[pack.rows + 1], 1.0, PROMPT_WEIGHT)
    return replace(pack, weights=pack.weights * shares)


# ---- Training


def mean_loss(model: Llama, packs: list[Pack], weight: float, device: torch.device) -> Tensor:
    """Run the backward pass of weight times the packs' mean loss; return the mean loss."""
    count, total = sum(pack.weights.sum().item() for pack in packs), torch.zeros((), device=device)
    for pack in packs:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(pack.to(device)) / count
        (loss * weight).backward()
        total += loss.detach()
    return total


def train(model: Llama, steps: Steps, lr: float, device: torch.device) -> dict:
    """Train for all steps; return each kind's tokens and final loss, and the seconds.

    The final loss is the mean over the last tenth of the steps.
    """
    optimizers, workers = make_optimizers(model, lr), host_workers(device)
    ahead = 2 if workers else None
    loader = DataLoader(steps, batch_size=None, num_workers=workers, prefetch_factor=ahead)
    tokens, losses, began = Counter(), [], time.perf_counter()
    with Bar(loader, unit="step") as bar:
        for step, (asked, written) in enumerate(bar):
            pair = [
                mean_loss(model, asked, QUESTION_WEIGHT, device),
                mean_loss(model, written, WRITING_WEIGHT, device),
            ]
            losses.append(torch.stack(pair))
            update(model, optimizers, learning_rate(step, len(steps), lr))
            tokens["questions"] += sum(pack.tokens for pack in asked)
            tokens["writings"] += sum(pack.tokens for pack in written)

            # Reading the losses more often would make the GPU wait.
            if (step + 1) % LOG_EVERY == 0 or step + 1 == len(steps):
                of_questions, of_writings = torch.stack(losses[-LOG_EVERY:]).mean(0).tolist()
                found = f"loss of questions {of_questions:.4f}, of writings {of_writings:.4f}"
                speed = tokens.total() / (time.perf_counter() - began)
                bar.set_postfix_str(f"{found}, {speed:.0f} tokens/s")

    seconds = time.perf_counter() - began
    last = torch.stack(losses[-max(1, len(losses) // 10) :]).mean(0).tolist()
    loss = dict(zip(("questions", "writings"), last, strict=True))
    return {"tokens": dict(tokens), "loss": loss, "seconds": round(seconds, 1)}


# ---- The command


def main() -> None:
    """Train the base model."""
    settings = parse_settings(Settings, __doc__)
    check(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Otherwise threads add up the gradients of a pack's rows in the order they come.
    torch.use_deterministic_algorithms(device.type == "cpu")

    # What the model will see. base.json is written last, so a folder that has one is complete.
    corpus, out = Corpus.load(settings.data), settings.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "base.json").unlink(missing_ok=True)
    write_config(out, configuration(settings, dtype))
    try:
        tokenizer = write_tokenizer(out, corpus.tokenizer_lines(), settings.vocabulary)
    except RuntimeError as error:
        raise InputError(f"--vocabulary {settings.vocabulary}: {error}") from None
    plan = plan_steps(corpus, tokenizer, settings)
    pad_to = settings.pack_tokens if device.type == "cuda" else 1
    steps = Steps(corpus, tokenizer, plan, settings.pack_tokens, pad_to)

    model = Llama(load_config(out))
    initialize(model, settings.seed)
    model.to(device)
    if device.type == "cuda":
        compile_layers(model)
    record = seen(corpus, plan, settings)
    parameters = sum(p.numel() for p in model.parameters())
    announce(settings, record, parameters, len(plan), device)
    found = train(model, steps, settings.lr, device)
    save(model, out, dtype)
    made = {"parameters": parameters, "device": device.type, "torch": torch.__version__}
    kept = vars(settings) | {"out": str(out), "steps": len(plan)}
    write_json(out / "base.json", record | found | made | {"settings": kept})
    conclude(settings, found, peak_memory(device))


def configuration(settings: Settings, dtype: torch.dtype) -> dict:
    """Return the model's config.json."""
    heads = settings.hidden_size // HEAD
    return CONFIG | {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden_size,
        "intermediate_size": -(-settings.hidden_size * 8 // 3 // HEAD) * HEAD,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD,
        "max_position_embeddings": CONTEXT,
        "torch_dtype": str(dtype).split(".")[1],
    }


def seen(corpus: Corpus, plan: list[Step], settings: Settings) -> dict:
    """Return what base.json records of the data: its sources, and the number of examples."""
    examples: Counter = Counter()
    for questions, _ in plan:
        examples.update(question.paradigm for question in questions)
    asked = examples.total()
    for _, writings in plan:
        examples.update(writing.kind for writing in writings)
    return {
        "data": settings.data,
        "sources": read_json(Path(settings.data) / "meta.json").get("sources", []),
        "split": "train",
        "users": len(corpus.sequences),
        "texts": len(corpus.texts),
        "positives": len(corpus.positions()),
        "examples": {kind: examples[kind] for kind in (*QUESTIONS, *WRITINGS)},
        "answers": {"Yes": asked, "No": asked * settings.negatives},
        "facets": corpus.rule.facets,
        "common_words": sorted(corpus.rule.common),
    }


def announce(
    settings: Settings, record: dict, parameters: int, steps: int, device: torch.device
) -> None:
    """Print what is about to be learned."""
    asked = sum(record["examples"][kind] for kind in QUESTIONS)
    written = sum(record["examples"][kind] for kind in WRITINGS)
    size = f"{parameters / 1e6:.1f}M parameters from seed {settings.seed}"
    epochs = f"{asked / record['positives']:.2f} epochs"
    rooms = f"{settings.pack_tokens} + {settings.pack_tokens // WRITINGS_SHARE}"
    users = f"{record['users']} training users"
    print(f"data    {settings.data}: {users}, {record['texts']} texts of items")
    print(f"model   {size}, {settings.vocabulary} pieces, on {device.type}")
    print(f"learns  {asked} questions, {epochs}, and {written} writings")
    print(f"steps   {steps}, each of up to {rooms} tokens")


def conclude(settings: Settings, found: dict, peak: str) -> None:
    """Print what was learned and written, and the next command."""
    data, out = settings.data, settings.out
    losses = ", ".join(f"{name} {value:.4f}" for name, value in found["loss"].items())
    tokens = sum(found["tokens"].values())
    print(f"learned {tokens} tokens in {found['seconds']} s; loss {losses}")
    print(f"wrote   {out}; peak {peak}")
    print(f"next    python summarize.py --data {data} --model {out} --run runs/{out.name}")


if __name__ == "__main__":
    run_main(main)
