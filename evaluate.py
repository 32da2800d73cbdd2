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
from batches.prompts import Batching, Ranking
from batches.stream import own_packs
from files.jsonl import write_json
from launch import numbers
from launch.command import Shared, option, parse_settings
from launch.embedded import DATA, make_missing
from launch.processes import (
    gather,
    join_processes,
    peak_memory,
    prefetch,
    ranks,
    run_script,
)
from llama import Llama, compile_layers
from lora import load_adapter
from models.chat import Form
from models.hub import DTYPES, find_model, load_config, load_form, load_model
from ops.cache import PrefixCache
from ops.checkpoint import fingerprint
from ops.packs import Pack, padded_select
from ops.transfer import HostCopy, on_device
from prepare.dataset import load_dataset
from prepare.domains import wording
from runfolder.compare import format_table
from runfolder.page import write_report
from runfolder.results import Question
from runfolder.scores import answer_mass, table_of, table_of_file, write_scores
from state.checkpoint import epochs_done
from state.origin import check_trained_on, differences
from state.settings import read_config
from state.summaries import load_summaries
from trsr import Example, InputError, Recommender

# What an evaluation takes from the run's training, unless a flag says otherwise; dtype too.
INHERITED = ("data", "model", "revision", "paradigm", "history_items", "max_length")
INHERITED += ("prompt", "chat")


@dataclass(frozen=True)
class Settings(Shared):
    """What is evaluated: the flags, and what the run's training adds to them."""

    split: str = option("test", "whom to rank for", choices=("val", "test"), group="evaluation")
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", numbers.positive, nargs="+")
    untrained: bool = option(False, "the base model, without the run's adapter")
    users: int | None = option(None, "only the first so many users (unset: all)", numbers.positive)
    pack_tokens: int | None = option(
        None, "tokens per pass (unset: 16384, on CPUs 4096)", numbers.positive
    )
    seed: int = option(0, "of intervals, and of popularity's ties", numbers.seed_number)
    scores: Path | None = option(None, "rank by a file's scores, like scores-test.jsonl", Path)
    report: bool = option(False, "write RUN/report.html too, for a browser")

    # Resolved from the run.
    kind: str = ""  # what training wrote: adapter or model
    paradigm: str = ""
    history_items: int = 0
    max_length: int = 0
    prompt: str | None = None  # its words, with placeholders for texts
    chat: bool = False  # in the form of the model's chat template
    epochs: str = ""  # how many of how many, if not all are trained
    question: Question | None = None  # which names the files

    @property
    def row(self) -> str:
        """Its name in the table."""
        return "untrained" if self.untrained else "trained"


def resolve(flags: Settings) -> Settings:
    """Return the settings, completed by the run's; InputError if nothing was trained there."""
    data = read_config(flags.run).get("train", {}).get("data", DATA)
    make_missing(flags, data, summaries=True, training=True)
    trained = read_config(flags.run).get("train")
    kind = "adapter" if trained and trained["lora_r"] else "model"
    if trained is None or not (flags.untrained or (flags.run / kind).is_dir()):
        first = f"first run python train.py --run {flags.run}"
        raise InputError(f"{flags.run}: nothing trained here yet; {first}")

    names = INHERITED + (() if flags.dtype != "auto" else ("dtype",))
    settings = flags.inherit({name: trained.get(name) for name in names})
    done, wanted = epochs_done(flags.run), trained.get("epochs")  # None if unknown
    unfinished = not flags.untrained and None not in (done, wanted) and done < wanted
    epochs = f"{done} of {wanted} epochs" if unfinished else ""
    other = Path(settings.data).name if settings.data != trained["data"] else ""
    which = "untrained" if flags.untrained else "interim" if unfinished else ""
    users = f"{flags.users}-users" if flags.users else ""
    question = Question(flags.run, flags.split, [part for part in (which, other, users) if part])
    return replace(settings, kind=kind, epochs=epochs, question=question)


# ---- From users to packs


def prompt_budget(folder: Path, form: Form, max_length: int) -> trsr.Budget:
    """Return the token budget of a recommendation prompt for the model in folder."""
    context = min(max_length, load_config(folder).max_position_embeddings)
    return trsr.Budget(context - 1, form.encode, Counter())  # one token is the answer's


def make_recommender(
    settings,
    folder: Path,
    form: Form,
    domain: trsr.Domain,
    items: dict[str, str],
    examples: list[Example],
) -> tuple[Recommender, tuple[int, int]]:
    """Return what makes the examples' prompts for the model in folder, and the answers' ids.

    settings: train.py's or this script's, of which it reads run, paradigm, history_items and
    max_length. InputError if a user's summary is needed and missing.
    """
    needed = settings.paradigm in trsr.SUMMARIZED
    summaries = load_summaries(settings.run, items, examples) if needed else {}
    budget = prompt_budget(folder, form, settings.max_length)
    prompt = settings.paradigm, domain, items, summaries, settings.history_items
    return Recommender(*prompt, budget), trsr.answer_ids(budget.encode, domain)


# ---- From packs to logits of Yes and No


@torch.no_grad()
def scored(
    model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int], total: bool = False
) -> Iterator[tuple[Pack, list]]:
    """Yield (pack, fp32 logits of vocabulary after each leaf's last token), pack by pack.

    total: followed by the log of the sum of exp(logit) over the whole vocabulary.
    """
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
        logits = model(*inputs, cache, select, None if total else columns).float()
        if total:
            logits = torch.cat((logits[:, columns], logits.logsumexp(-1, keepdim=True)), dim=-1)
        running.append((pack, HostCopy(logits[: len(pack.leaves)])))

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

    # Yes, No, and the log of the sum over the vocabulary, by (user, candidate).
    logits: dict[tuple[int, int], list[float]]
    prompt_tokens: Counter  # the longest prompt by user
    trimmed: Counter


def score_users(
    model: Llama, packs: Iterator[Pack], answers: Sequence[int], budget: trsr.Budget
) -> Scores:
    """Score this process's packs; every process gets the scores of all."""
    logits, longest = {}, Counter()
    # A thread fills the next packs while this one is on the GPU.
    for pack, found in scored(model, prefetch(packs), answers, total=True):
        logits.update(zip(pack.leaves, found, strict=True))
        for (user, _), row in pack.leaves.items():  # a leaf's position is its prompt's length
            longest[user] = max(longest[user], int(pack.positions[row]) + 1)

    whole = Scores({}, Counter(), Counter())  # what all processes found
    for part in gather(Scores(logits, longest, budget.trimmed)):
        whole.logits.update(part.logits)
        whole.prompt_tokens.update(part.prompt_tokens)
        whole.trimmed.update(part.trimmed)
    return whole


@dataclass(frozen=True)
class Validation:
    """A ranking and its packs, to be scored again and again while a model is trained."""

    ranking: Ranking
    packs: list[Pack]  # of all users, on every process
    answers: Sequence[int]

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
        _, found_ranks = trsr.rank_users(self.ranking.examples, self.ranking.candidates, whole)
        metrics = trsr.metrics_at(found_ranks, ks)
        return {name: float(v.mean()) for name, v in metrics.items() if "Recall" in name}


# ---- The command


def main() -> None:
    """Score and rank the candidates of a split."""
    flags = parse_settings(Settings, __doc__)
    if flags.scores:
        return rank_by_file(flags)
    rank, world, device = join_processes(flags.timeout)
    settings = resolve(flags)
    batching = Batching.on(device, settings.pack_tokens, on_gpus=16384)

    # The users, and what makes their prompts.
    folder = find_model(settings.model, settings.revision)
    form = load_form(folder, settings.chat)
    domain, items, splits = load_dataset(settings.data, ("train", settings.split))
    examples = splits[settings.split][: settings.users]
    words = wording(settings.paradigm, domain, form.show)["recommend"]
    check_trained_on(settings.run, settings.model, fingerprint(folder), words)
    recommender, answers = make_recommender(settings, folder, form, domain, items, examples)
    ranking = Ranking.of(recommender, examples)
    if rank == 0:
        tokens = recommender.budget.tokens
        announce(settings, len(examples), tokens, f"{world} x {device.type}")

    # Worker processes tokenize while the weights are loaded.
    packs = own_packs(ranking, batching, show=rank == 0)
    model = load_weights(settings, folder, device)
    start = time.perf_counter()  # on a GPU, the first users are tokenized by now
    scores = score_users(model, packs, answers, recommender.budget)
    seconds = time.perf_counter() - start
    if rank > 0:  # all have the same scores now
        return

    # One process ranks and reports.
    table = write_results(settings, ranking, scores, splits["train"])
    print(format_table(table))
    print("below each mean is its 95 % interval over users")
    print(f"{len(examples)} users in {seconds:.1f} s; peak {peak_memory(device)}")
    tell(scores)
    question = settings.question
    page = f", {write_report(question)}" if settings.report else ""
    print(f"wrote   {question.results}, {question.scores}{page}")


def tell(scores: Scores) -> None:
    """Print what is worth knowing of the prompts."""
    mass = answer_mass(scores.logits.values())
    print(f"Yes and No together have {mass:.1%} of the probability of the next token")
    for what, number in scores.trimmed.items():
        print(f"trimmed to the context: {number} {what}")


def announce(settings: Settings, n_users: int, tokens: int, where: str) -> None:
    """Print what is about to be evaluated."""
    row, recent = f"trained ({settings.kind})", f"{settings.history_items} recent items"
    if settings.untrained:
        row = "untrained"
    elif settings.epochs:
        row += f", unfinished: the best of {settings.epochs}"
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
        adapter = load_adapter(model, settings.run / "adapter")
        if ranks()[0] == 0 and (odd := differences(settings.run, adapter)):
            print(f"adapter not as the run's settings say: {odd}")
    model.eval()  # without dropout
    if device.type == "cuda" and not settings.no_compile:
        compile_layers(model)
    return model


def write_results(
    settings: Settings, ranking: Ranking, scores: Scores, train: Sequence[Example]
) -> dict:
    """Rank the candidates, write the scores and the results, and return the table."""
    examples, candidates = ranking.examples, ranking.candidates
    probabilities, found_ranks = trsr.rank_users(examples, candidates, scores.logits)
    lengths = [scores.prompt_tokens[u] for u in range(len(examples))]
    path = settings.question.scores
    write_scores(path, examples, candidates, found_ranks, probabilities, lengths)

    table = table_of(settings.row, found_ranks, examples, train, settings.k, settings.seed)
    names = ("data", "split", "model", "row", "paradigm", "prompt", "epochs")
    about = {name: getattr(settings, name) for name in names}
    about |= {"users": len(examples), "table": table, "trimmed": dict(scores.trimmed)}
    # Rounded, since the order of the packs may change the last digits.
    about["answer_mass"] = round(answer_mass(scores.logits.values()), 6)
    write_json(settings.question.results, about)
    return table


def rank_by_file(flags: Settings) -> None:
    """Print the table of the scores in flags.scores, and write it to RUN/results-NAME.json."""
    data = flags.data or read_config(flags.run).get("train", {}).get("data", DATA)
    _, _, splits = load_dataset(data, ("train", flags.split))
    examples, name = splits[flags.split][: flags.users], flags.scores.stem
    table = table_of_file(flags.scores, examples, splits["train"], flags.k, flags.seed)
    print(format_table(table))
    about = {"data": data, "split": flags.split, "users": len(examples), "row": name}
    question = Question(flags.run, flags.split, [name])
    flags.run.mkdir(parents=True, exist_ok=True)
    write_json(question.results, about | {"paradigm": name, "table": table})
    print(f"wrote   {question.results}")


if __name__ == "__main__":
    run_script(main)
