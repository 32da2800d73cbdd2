"""Rank every user's candidates by the probability of Yes (section 4.3): RUN/results.json

    python evaluate.py --k 3 5 10                               # the embedded default
    python evaluate.py --run runs/mind --split test             # data, model and prompt as trained
    torchrun --nproc_per_node 8 evaluate.py --run-dir runs/mind # users are shared out

Writes RUN/scores-SPLIT.jsonl, one line per user, and RUN/results.json, the table of Recall, MRR and
NDCG at K. From top to bottom: a user's prompts become a tree, whose branches are the candidates;
trees fill packs; the model gives each branch's logits of Yes and No (equation 2); their softmax
(equation 3) ranks the candidates. train.py validates with the same functions.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import trsr
from batches.prompts import Batching
from batches.stream import user_packs
from files.jsonl import write_json
from launch.command import Shared, natural, option, parse_settings, positive
from launch.processes import (
    gather,
    join_processes,
    peak_memory,
    prefetch,
    ranks,
    run_script,
    share_out,
)
from llama import Config, Llama, compile_layers
from lora import load_adapter
from models.hub import DTYPES, find_model, load_config, load_model
from models.tokenizer import Tokenizer
from ops.cache import PrefixCache
from ops.checkpoint import fingerprint
from ops.packs import Pack, padded_select
from ops.transfer import HostCopy, on_device
from prepare.dataset import load_dataset
from runfolder.compare import format_table
from runfolder.page import write_report
from runfolder.scores import read_scores, table_of, write_scores
from state.settings import read_config
from state.summaries import load_summaries
from trsr import Example, InputError, Recommender

# What an evaluation takes from the run's training, unless a flag says otherwise.
INHERITED = ("data", "model", "revision", "dtype", "paradigm", "history_items", "max_length")


@dataclass(frozen=True)
class Settings(Shared):
    """What is evaluated: the flags, and what the run's training adds to them."""

    split: str = option("test", "whom to rank for", choices=("val", "test"), group="evaluation")
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", positive, nargs="+")
    untrained: bool = option(False, "the base model, without the run's adapter")
    users: int | None = option(None, "only the first so many users (unset: all)", positive)
    pack_tokens: int | None = option(
        None, "tokens in a forward pass (unset: 16384 on GPUs, 4096 on CPUs)", positive
    )
    seed: int = option(0, "of the intervals' resampling and of popularity's ties", natural)
    scores: Path | None = option(None, "rank by a file's scores, like scores-test.jsonl", Path)
    report: bool = option(False, "write RUN/report.html too, for a browser")

    # Resolved from the run's training.
    kind: str = ""  # what training wrote: adapter or model
    fingerprint: str = ""  # of the base model
    paradigm: str = ""
    history_items: int = 0
    max_length: int = 0

    @property
    def row(self) -> str:
        """Its name in the table."""
        return "untrained" if self.untrained else "trained"

    @property
    def suffix(self) -> str:
        """What the names of the result files end in."""
        return "-untrained" if self.untrained else ""


def resolve(flags: Settings) -> Settings:
    """Return the settings, completed by the run's; InputError if nothing was trained there."""
    trained = read_config(flags.run).get("train")
    kind = "adapter" if trained and trained["lora_r"] else "model"
    if trained is None or not (flags.untrained or (flags.run / kind).is_dir()):
        first = f"first run python train.py --run {flags.run}"
        raise InputError(f"{flags.run}: nothing trained here yet; {first}")
    # A flag that was given wins over what the run was trained with.
    given = {name for name in INHERITED if getattr(flags, name) not in (None, "auto", "", 0)}
    inherited = {name: trained.get(name) for name in INHERITED if name not in given}
    return replace(flags, kind=kind, fingerprint=trained["fingerprint"], **inherited)


# ---- From users to packs


def prompt_budget(folder: Path, config: Config, max_length: int) -> trsr.Budget:
    """Return the token budget of a recommendation prompt for the model in folder."""
    tokenizer = Tokenizer(folder, config.vocab_size)
    context = min(max_length, config.max_position_embeddings)
    return trsr.Budget(context - 1, tokenizer.encode, Counter())  # one token is the answer's


def make_recommender(
    settings, folder: Path, domain: trsr.Domain, items: dict[str, str], examples: list[Example]
) -> tuple[Recommender, tuple[int, int]]:
    """Return what makes the examples' prompts for the model in folder, and the answers' ids.

    settings: train.py's or this script's, of which it reads run, paradigm, history_items and
    max_length. InputError if a user's summary is needed and missing.
    """
    needed = settings.paradigm in trsr.SUMMARIZED
    summaries = load_summaries(settings.run, items, examples) if needed else {}
    budget = prompt_budget(folder, load_config(folder), settings.max_length)
    prompt = settings.paradigm, domain, items, summaries, settings.history_items
    return Recommender(*prompt, budget), trsr.answer_ids(budget.encode, domain)


def own_packs(
    recommender: Recommender,
    examples: Sequence[Example],
    candidates: Sequence[list[str]],
    batching: Batching,
    show: bool,
) -> Iterator[Pack]:
    """Return the packs of this process's users, shared out by the length of their candidates."""
    rank, world = ranks()
    # Candidates dominate the cost of a user, since the prefix is computed once.
    sizes = [sum(len(recommender.items[i]) for i in items) for items in candidates]
    users = sorted(share_out(sizes, world)[rank])
    return user_packs(recommender, examples, candidates, users, batching, show)


# ---- From packs to logits of Yes and No


@torch.no_grad()
def scored(
    model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int]
) -> Iterator[tuple[Pack, list]]:
    """Yield (pack, fp32 logits of vocabulary after each leaf's last token), pack by pack."""
    device = next(model.parameters()).device
    # The answers' columns are chosen on the device: a list as index would make the host wait.
    columns = on_device(torch.tensor(vocabulary), device)
    split_tree, prefix = None, None  # the tree that spans packs, and its prefix in every layer
    running: deque[tuple[Pack, HostCopy]] = deque()
    for pack in packs:
        first = 0
        if pack.shared_prefix:
            tree = next(iter(pack.leaves))[0]
            if tree == split_tree:  # the prefix is in the cache
                first = pack.shared_prefix
            else:
                split_tree = tree
                prefix = [PrefixCache(pack.shared_prefix) for _ in model.model.layers]

        here = pack.to(device)
        inputs = here.ids[None, first:], here.positions[None, first:], here.mask(first)
        cache = prefix if pack.shared_prefix else None
        select = padded_select([row - first for row in pack.leaves.values()], device)
        logits = model(*inputs, cache, select=select, vocabulary=columns)[: len(pack.leaves)]
        running.append((pack, HostCopy(logits.float())))

        # A result is read only when the GPU has the next pack to work on.
        if len(running) > 1:
            done, copy = running.popleft()
            yield done, copy.tolist()
    for done, copy in running:  # what is left when the packs have run out
        yield done, copy.tolist()


def score_packs(model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int]) -> dict:
    """Return {(tree, branch): fp32 logits of vocabulary after its last token} of all packs."""
    scores = {}
    for pack, logits in scored(model, packs, vocabulary):
        scores.update(zip(pack.leaves, logits, strict=True))
    return scores


@dataclass(frozen=True)
class Scores:
    """What scoring found, of all processes together."""

    logits: dict[tuple[int, int], list[float]]  # (Yes, No) by (user, candidate)
    prompt_tokens: Counter  # the longest prompt by user
    trimmed: Counter


def score_users(
    model: Llama, packs: Iterator[Pack], answers: Sequence[int], budget: trsr.Budget
) -> Scores:
    """Score this process's packs; every process gets the scores of all."""
    logits, longest = {}, Counter()
    # A thread fills the next packs while this one is on the GPU.
    for pack, found in scored(model, prefetch(packs), answers):
        logits.update(zip(pack.leaves, found, strict=True))
        for (user, _), row in pack.leaves.items():  # a leaf's position is its prompt's length
            longest[user] = max(longest[user], int(pack.positions[row]) + 1)

    whole = Scores({}, Counter(), Counter())
    for part in gather(Scores(logits, longest, budget.trimmed)):
        whole.logits.update(part.logits)
        whole.prompt_tokens.update(part.prompt_tokens)
        whole.trimmed.update(part.trimmed)
    return whole


@dataclass(frozen=True)
class Validation:
    """A split's packs, ready to be scored again and again while a model is trained."""

    examples: Sequence[Example]
    candidates: Sequence[list[str]]
    packs: list[Pack]  # of all users, on every process
    answers: Sequence[int]

    @classmethod
    def of(
        cls,
        recommender: Recommender,
        examples: Sequence[Example],
        answers: Sequence[int],
        batching: Batching,
        show: bool,
    ) -> "Validation":
        """Return the validation on these users."""
        candidates = [trsr.shuffled_candidates(example) for example in examples]
        users = range(len(examples))
        packs = user_packs(recommender, examples, candidates, users, batching, show)
        return cls(examples, candidates, list(packs), answers)

    def recall(self, model: Llama, ks: Sequence[int]) -> dict[str, float]:
        """Return the recall at each k; the processes share the packs."""
        rank, world = ranks()
        # Under FSDP all must run equally often, so some processes score the first pack once more.
        mine = (self.packs[rank::world] + self.packs[:1])[: -(-len(self.packs) // world)]
        logits = {}
        with tqdm(total=len(mine), desc="score", unit="pack", leave=False, disable=rank > 0) as bar:
            for pack, found in scored(model, mine, self.answers):
                logits.update(zip(pack.leaves, found, strict=True))
                bar.update()

        whole = {}
        for part in reversed(gather(logits)):  # the first process's own scores win
            whole |= part
        _, found_ranks = trsr.rank_users(self.examples, self.candidates, whole)
        metrics = trsr.metrics_at(found_ranks, ks)
        return {name: float(v.mean()) for name, v in metrics.items() if "Recall" in name}


# ---- The command


def main() -> None:
    """Score and rank the candidates of a split."""
    flags = parse_settings(Settings, __doc__)
    if flags.scores:
        return rank_by_file(flags)
    rank, world, device = join_processes()
    settings = resolve(flags)
    batching = Batching.on(device, settings.pack_tokens, on_gpus=16384)

    # The users, and what makes their prompts.
    folder = find_base(settings)
    domain, items, splits = load_dataset(settings.data, ("train", settings.split))
    examples = splits[settings.split][: settings.users]
    candidates = [trsr.shuffled_candidates(example) for example in examples]
    recommender, answers = make_recommender(settings, folder, domain, items, examples)
    if rank == 0:
        tokens = recommender.budget.tokens
        announce(settings, len(examples), tokens, f"{world} x {device.type}")

    # Worker processes tokenize while the weights are loaded.
    packs = own_packs(recommender, examples, candidates, batching, show=rank == 0)
    model = load_weights(settings, folder, device)
    start = time.perf_counter()  # on a GPU, the first users are tokenized by now
    scores = score_users(model, packs, answers, recommender.budget)
    seconds = time.perf_counter() - start
    if rank > 0:
        return

    # One process ranks and reports.
    table = write_results(settings, examples, candidates, scores, splits["train"])
    print(format_table(table))
    print("below each mean is its 95 % interval over users")
    print(f"{len(examples)} users in {seconds:.1f} s; peak {peak_memory(device)}")
    for what, number in scores.trimmed.items():
        print(f"trimmed to the context: {number} {what}")
    suffix, run = settings.suffix, settings.run
    page = f", {write_report(run, settings.split, suffix)}" if settings.report else ""
    lines = run / f"scores-{settings.split}{suffix}.jsonl"
    print(f"wrote   {run / f'results{suffix}.json'}, {lines}{page}")


def find_base(settings: Settings) -> Path:
    """Return the base model's folder; InputError unless it is the model of the training."""
    folder = find_model(settings.model, settings.revision)
    if fingerprint(folder) != settings.fingerprint:
        trained = read_config(settings.run)["train"]["model"]
        what = f"not the model that {settings.run} was trained on ({trained})"
        raise InputError(f"{settings.model}: {what}")
    return folder


def announce(settings: Settings, n_users: int, tokens: int, where: str) -> None:
    """Print what is about to be evaluated."""
    row, recent = f"{settings.row} ({settings.kind})", f"{settings.history_items} recent items"
    print(f"data    {settings.data}: {n_users} users of {settings.split}.jsonl")
    print(f"model   {settings.model}, {row}, {settings.dtype}, on {where}")
    print(f"prompt  {settings.paradigm}, {recent}, {tokens} tokens at most")


def load_weights(settings: Settings, folder: Path, device: torch.device) -> Llama:
    """Return the model to evaluate: the base with the run's adapter, or the run's own model."""
    trained = settings.row == "trained"
    if trained and settings.kind == "model":
        folder = settings.run / "model"
    model = load_model(folder, device, DTYPES[settings.dtype])
    if trained and settings.kind == "adapter":
        load_adapter(model, settings.run / "adapter")
    model.eval()
    if device.type == "cuda" and not settings.no_compile:
        compile_layers(model)
    return model


def write_results(
    settings: Settings,
    examples: Sequence[Example],
    candidates: Sequence[list[str]],
    scores: Scores,
    train: Sequence[Example],
) -> dict:
    """Rank the candidates, write the scores and the results, and return the table."""
    probabilities, found_ranks = trsr.rank_users(examples, candidates, scores.logits)
    path = settings.run / f"scores-{settings.split}{settings.suffix}.jsonl"
    lengths = [scores.prompt_tokens[u] for u in range(len(examples))]
    write_scores(path, examples, candidates, found_ranks, probabilities, lengths)

    table = table_of(settings.row, found_ranks, examples, train, settings.k, settings.seed)
    about = {
        name: getattr(settings, name) for name in ("data", "split", "model", "row", "paradigm")
    }
    about |= {"users": len(examples), "table": table, "trimmed": dict(scores.trimmed)}
    write_json(settings.run / f"results{settings.suffix}.json", about)
    return table


def rank_by_file(flags: Settings) -> None:
    """Print the table of the scores in flags.scores, and write it to RUN/results-NAME.json."""
    data = flags.data or read_config(flags.run).get("train", {}).get("data", "data/demo")
    _, _, splits = load_dataset(data, ("train", flags.split))
    examples = splits[flags.split][: flags.users]
    candidates = [trsr.shuffled_candidates(example) for example in examples]
    scores = read_scores(flags.scores, examples, candidates)
    _, found_ranks = trsr.rank_users(examples, candidates, scores)

    name = flags.scores.stem
    table = table_of(name, found_ranks, examples, splits["train"], flags.k, flags.seed)
    print(format_table(table))
    about = {"data": data, "split": flags.split, "users": len(examples), "row": name}
    flags.run.mkdir(parents=True, exist_ok=True)
    write_json(flags.run / f"results-{name}.json", about | {"paradigm": name, "table": table})
    print(f"wrote   {flags.run / f'results-{name}.json'}")


if __name__ == "__main__":
    run_script(main)
