"""Rank every user's candidates by the probability of Yes (section 4.3): RUN/results.json

    python evaluate.py --k 3 5 10                               # data/demo, models/tiny
    python evaluate.py --run runs/mind --split test             # data, model and prompt as trained
    torchrun --nproc_per_node 8 evaluate.py --run-dir runs/mind # users are shared out

Writes RUN/scores-SPLIT.jsonl, one line per user, and RUN/results.json, the table of Recall, MRR and
NDCG at K. From top to bottom: a user's prompts become a tree, whose branches are the candidates;
trees fill packs; the model gives each branch's logits of Yes and No (equation 2); their softmax
(equation 3) ranks the candidates. train.py validates with the same functions.
"""

import launch.waiting  # noqa: F401  # before torch
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import trsr
from batches.candidates import Choice, about_candidates, choice, with_candidates
from batches.catalogue import CatalogueRanking
from batches.prompts import Batching, Ranking, shown_prompt
from batches.stream import own_packs
from launch import announce, numbers
from launch.bars import Bar
from launch.command import Shared, option, parse_settings
from launch.embedded import DATA, make_missing
from launch.processes import gather, join_processes, peak_memory, prefetch, ranks, run_script
from llama import Llama, compile_layers
from lora import load_adapter
from models.chat import Form
from models.hub import DTYPES, find_model, load_config, load_form, load_model
from ops.cache import PrefixCache
from ops.checkpoint import fingerprint
from ops.graph import Graphs, wanted
from ops.masks import tree_mask
from ops.packs import Pack, padded_rows
from ops.transfer import HostCopy, on_device
from prepare.dataset import load_dataset, warn_of_cut_histories
from prepare.domains import wording
from runfolder.compare import format_table
from runfolder.page import write_report
from runfolder.results import Question, check_replaced, parts_of, tell, write_results
from runfolder.scores import table_of
from runfolder.systems import rank_by_file
from runfolder.tally import BEST, Ranked, Tally
from state.checkpoint import epochs_done
from state.lending import lender_of
from state.origin import check_learned, check_trained_on, differences
from state.settings import read_config
from state.summaries import load_summaries
from state.zeroshot import PROMPT, check_prompt_flags, untrained_settings
from trsr import Example, InputError, Recommender

# What an evaluation takes from the run's training, unless a flag says otherwise; dtype too.
INHERITED = ("data", "model", "revision", *PROMPT)


@dataclass(frozen=True)
class Settings(Shared):
    """What is evaluated: the flags, and what the run's training adds to them."""

    split: str = option("test", "whom to rank for", choices=("val", "test"), group="evaluation")
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", numbers.positive, nargs="+")
    candidates: Choice = option(
        None, "rank all items, N drawn ones, or a file's (unset: the dataset's own)", choice
    )
    untrained: bool = option(False, "the base model; needs no training")
    users: int | None = option(None, "only the first so many users (unset: all)", numbers.positive)
    pack_tokens: int | None = option(
        None, "tokens per pass (unset: 16384, on CPUs 4096)", numbers.positive
    )
    fp8: bool = option(False, "matrices in 8-bit floating point; GPUs from Ada on")
    cuda_graphs: bool | None = option(None, "on a GPU, launch passes whole (unset: if it pays)")
    seed: int = option(0, "of intervals, popularity's ties, candidates", numbers.seed_number)
    scores: Path | None = option(None, "rank by a file's scores, like scores-test.jsonl", Path)
    report: bool = option(False, "write RUN/report.html too, for a browser")
    csv: bool = option(False, "write the table and the scores as CSV too")

    paradigm: str | None = option(
        None, "what it shows", choices=tuple(trsr.PARADIGMS), group="prompt, with --untrained"
    )
    history_items: int = option(3, "recent items in the prompt", numbers.natural)
    max_length: int = option(2048, "longest prompt with its answer, in tokens", numbers.positive)
    chat: bool = option(False, "ask in the form of the model's chat template")

    # Resolved from the run.
    kind: str = ""  # what training wrote: adapter or model; empty if nothing was trained
    epochs: str = ""  # how many of how many, if not all are trained
    question: Question | None = None  # which names the files

    @property
    def row(self) -> str:
        """Its name in the table."""
        return "untrained" if self.untrained else "trained"


def resolve(flags: Settings, device: torch.device) -> Settings:
    """Return the settings, completed by the run's; InputError if a training is needed first."""
    data = read_config(flags.run).get("train", {}).get("data", DATA)
    summaries = not flags.untrained or flags.paradigm in trsr.SUMMARIZED
    make_missing(flags, data, summaries, training=not flags.untrained)
    trained = read_config(flags.run).get("train", {})
    kind = "" if not trained else "adapter" if trained["lora_r"] else "model"
    if not flags.untrained and not (kind and (flags.run / kind).is_dir()):
        first = f"first run python train.py --run {flags.run}, or evaluate.py with --untrained"
        raise InputError(f"{flags.run}: nothing trained here yet; {first}")

    asked = {name: getattr(flags, name) for name in PROMPT if name in flags.given}
    if trained:
        check_prompt_flags(flags.run, trained, asked)
    known = trained or untrained_settings(flags.run, flags.data, flags.model)
    names = INHERITED + (() if flags.dtype != "auto" else ("dtype",))
    settings = flags.inherit({name: known[name] for name in names if name in known})
    done, whole = epochs_done(flags.run), trained.get("epochs")  # None if unknown
    unfinished = not flags.untrained and None not in (done, whole) and done < whole
    epochs = f"{done} of {whole} epochs" if unfinished else ""
    parts = ["untrained" if flags.untrained else "interim" if unfinished else ""]
    parts += [] if trained else [f"{name}-{value}" for name, value in asked.items()]
    parts.append(Path(settings.data).name if settings.data != known["data"] else "")
    parts += parts_of(flags.candidates, flags.users, flags.seed, flags.fp8)
    question = Question(flags.run, flags.split, [part for part in parts if part])
    dtype = settings.dtype_on(device.type)
    return replace(settings, kind=kind, epochs=epochs, question=question, dtype=dtype)


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

    settings: train.py's or this script's, of which it reads run, paradigm, history_items,
    max_length and, if it has them, summaries. InputError if a user's summary is needed and missing.
    """
    needed, source = settings.paradigm in trsr.SUMMARIZED, lender_of(settings)
    summaries = load_summaries(source, items, examples) if needed else {}
    budget = prompt_budget(folder, form, settings.max_length)
    prompt = settings.paradigm, domain, items, summaries, settings.history_items
    return Recommender(*prompt, budget), trsr.answer_ids(budget.encode, domain)


# ---- From packs to logits of Yes and No


@dataclass(frozen=True)
class Scorer:
    """Computes the fp32 logits of some columns, or of all and their logsumexp (total)."""

    model: Llama
    columns: torch.Tensor  # ids of the vocabulary, on the device
    total: bool

    def logits(self, ids, positions, ends, rows, first: int = 0, cache=None) -> torch.Tensor:
        """Return the logits at rows of a pack (N, columns), whose first rows the cache has."""
        inputs = ids[None, first:], positions[None, first:], tree_mask(ends, first)
        select = torch.zeros_like(rows), rows - first
        vocabulary = None if self.total else self.columns
        logits = self.model(*inputs, cache, select, vocabulary).float()
        if not self.total:
            return logits
        return torch.cat((logits[:, self.columns], logits.logsumexp(-1, keepdim=True)), dim=-1)


@torch.no_grad()
def scored(
    model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int], total=False, graphs=None
) -> Iterator[tuple[Pack, list]]:
    """Yield (pack, fp32 logits of vocabulary after each leaf's last token), pack by pack.

    total: followed by the log of the sum of exp(logit) over the whole vocabulary. graphs: launch
    passes as CUDA graphs (ops/graph.py); None: where it pays.
    """
    device = next(model.parameters()).device
    # The answers' columns are chosen on the device: a list as index would make the host wait.
    scorer = Scorer(model, on_device(torch.tensor(vocabulary), device), total)
    passes = Graphs(device, wanted(graphs, model))
    split_tree, prefix = None, None  # the tree that spans packs, and its prefix in every layer
    running: deque[tuple[Pack, HostCopy]] = deque()
    for pack in packs:
        inputs = pack.ids, pack.positions, pack.ends, padded_rows(pack.leaves.values(), device)
        if not pack.shared_prefix:
            logits = passes.run(scorer.logits, *inputs)
        else:
            tree, first = next(iter(pack.leaves))[0], pack.shared_prefix
            if tree != split_tree:  # else the prefix is in the cache
                split_tree, first = tree, 0
                prefix = [PrefixCache(pack.shared_prefix) for _ in model.model.layers]
            here = (on_device(tensor, device) for tensor in inputs)
            logits = scorer.logits(*here, first, prefix)
        running.append((pack, HostCopy(logits[: len(pack.leaves)])))

        # A result is read only when the GPU has the next pack to work on.
        if len(running) > 1:
            done, copy = running.popleft()
            yield done, copy.tolist()
    for done, copy in running:  # what is left when the packs have run out
        yield done, copy.tolist()


def score_packs(
    model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int], graphs=None
) -> dict:
    """Return {(tree, branch): fp32 logits of vocabulary after its last token} of all packs."""
    scores = {}
    for pack, logits in scored(model, packs, vocabulary, graphs=graphs):
        scores.update(zip(pack.leaves, logits, strict=True))
    return scores


def score_users(
    model: Llama, packs: Iterator[Pack], answers: Sequence[int], ranking: Ranking, graphs=None
) -> tuple[list[Ranked], Counter]:
    """Score and rank this process's users; every process gets all users, and what was trimmed."""
    best = BEST if isinstance(ranking, CatalogueRanking) else None
    tally = Tally(ranking.examples, ranking.candidates, best)
    # A thread fills the next packs while this one is on the GPU.
    for pack, found in scored(model, prefetch(packs), answers, total=True, graphs=graphs):
        lengths = pack.positions[list(pack.leaves.values())] + 1  # a leaf ends its prompt
        of_row = dict(zip(pack.leaves.values(), found, strict=True))  # candidates can share one
        found = [of_row[row] for row in pack.leaves.values()]
        tally.add(pack.leaves, found, lengths.tolist())

    ranked, trimmed = {}, Counter()  # what all processes found
    for part, cut in gather((tally.ranked, ranking.recommender.budget.trimmed)):
        ranked |= part
        trimmed.update(cut)
    return [ranked[user] for user in range(len(ranking.examples))], trimmed


@dataclass(frozen=True)
class Validation:
    """A ranking and its packs, to be scored again and again while a model is trained."""

    ranking: Ranking
    packs: list[Pack]  # of all users, on every process
    answers: Sequence[int]
    graphs: bool | None = None

    def recall(self, model: Llama, ks: Sequence[int]) -> dict[str, float]:
        """Return the recall at each k; the processes share the packs."""
        rank, world = ranks()
        # Under FSDP all must run equally often, so some processes score the first pack once more.
        mine = (self.packs[rank::world] + self.packs[:1])[: -(-len(self.packs) // world)]
        logits = {}
        with Bar(total=len(mine), desc="score", unit="pack", leave=False, disable=rank > 0) as bar:
            for pack, found in scored(model, mine, self.answers, graphs=self.graphs):
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
    settings = resolve(flags, device)
    batching = Batching.on(device, settings.pack_tokens, on_gpus=16384)

    # The users, and what makes their prompts.
    folder = find_model(settings.model, settings.revision)
    form = load_form(folder, settings.chat)
    domain, items, splits = load_dataset(settings.data, ("train", settings.split))
    shown = splits[settings.split][: settings.users]
    examples = with_candidates(settings.candidates, shown, items, settings.seed)
    words = wording(settings.paradigm, domain, form.show)["recommend"]
    if settings.kind:
        check_trained_on(settings.run, settings.model, fingerprint(folder), words)
        check_learned(settings.run, settings.data, splits["train"], items)
    check_replaced(settings.question, settings.data, settings.model, settings.candidates)
    recommender, answers = make_recommender(settings, folder, form, domain, items, shown)
    if rank == 0:
        tokens = recommender.budget.tokens
        announce.evaluation(settings, examples, tokens, f"{world} x {device.type}")
        warn_of_cut_histories(settings.data, drawn=bool(settings.candidates))
    ranking = Ranking.of(recommender, examples)
    if settings.candidates:
        ranking = CatalogueRanking.among(recommender, shown, examples, show=rank == 0)

    # Worker processes tokenize while the weights are loaded.
    packs = own_packs(ranking, batching, show=rank == 0)
    model = load_weights(settings, folder, device)
    start = time.perf_counter()  # on a GPU, the first users are tokenized by now
    ranked, trimmed = score_users(model, packs, answers, ranking, settings.cuda_graphs)
    if rank == 0:  # all have the same now, and one reports
        print(f"{len(examples)} users in {time.perf_counter() - start:.1f} s", end="; ")
        print(f"peak {peak_memory(device)}")
        about = {"prompt": words, "trimmed": trimmed}
        about["example"] = shown_prompt(recommender, form.show, examples[0])
        report(settings, examples, splits["train"], ranked, about)


def report(
    settings: Settings, examples: list, train: list, ranked: list[Ranked], about: dict
) -> None:
    """Print and write the table, and write the users' lines; about: what else to record."""
    found = [user.rank for user in ranked]
    table = table_of(settings.row, found, examples, train, settings.k, settings.seed)
    print(format_table(table))
    print("below each mean is its 95 % interval over users")
    tell(ranked, about["trimmed"])
    names = ("data", "split", "model", "row", "paradigm", "epochs")
    about |= {name: getattr(settings, name) for name in names} | {"table": table}
    about |= about_candidates(settings.candidates, examples, settings.seed)
    written = write_results(settings.question, about, examples, ranked, settings.csv)
    if settings.report or settings.question.report.is_file():  # no older one stays behind
        written.append(write_report(settings.question))
    print(f"wrote   {', '.join(map(str, written))}")


def load_weights(settings: Settings, folder: Path, device: torch.device) -> Llama:
    """Return the model to evaluate: the base with the run's adapter, or the run's own model."""
    trained = settings.row == "trained"
    if trained and settings.kind == "model":
        folder = settings.run / "model"
    model = load_model(folder, device, DTYPES[settings.dtype], fp8=settings.fp8 and "scoring")
    if trained and settings.kind == "adapter":
        adapter = load_adapter(model, settings.run / "adapter")
        if ranks()[0] == 0 and (odd := differences(settings.run, adapter)):
            print(f"adapter not as the run's settings say: {odd}")
    model.eval()  # without dropout
    if device.type == "cuda" and not settings.no_compile:
        compile_layers(model)
    return model


if __name__ == "__main__":
    run_script(main)
