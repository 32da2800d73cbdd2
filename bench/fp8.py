"""Measure what fp8 changes: logits, the order of candidates, Recall, and the course of training.

    python -m bench.fp8                                 # models/tiny on the demo's data
    python -m bench.fp8 --run runs/demo --seeds 0 1 2   # with the run's summaries
    python -m bench.fp8 --model FOLDER --data FOLDER --paradigm whole-history --users 200

For each seed an adapter is trained plainly and another one in fp8, from the same start and on the
same steps. Each of them, and the model without an adapter, ranks the test users' candidates plainly
and in fp8. On a CPU fp8 is emulated (ops/fp8.py): with the same numbers, but slowly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import trsr
from batches.prompts import Batching, Prompts, Ranking, tokenize
from batches.steps import make_step, step_batches
from batches.stream import user_packs
from evaluate import make_recommender
from launch import numbers
from launch.bars import Bar
from launch.command import option, parse_settings, run_main
from llama import CheckpointError, Llama
from lora import AdapterError, LoRAConfig, adapter_tensors, apply_lora
from models.chat import Plain
from models.hub import DTYPES, attention_names, load_config, load_model
from models.tokenizer import Tokenizer
from ops.int8 import told
from ops.packs import Pack, Tree
from prepare.dataset import load_dataset
from runfolder.scores import means_and_intervals, paired_differences
from train import Passes, train_step

KINDS = {"plain": None, "fp8": "training"}  # how the frozen matrices are held, when training


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: Path = option(Path("models/tiny"), "model folder", Path)
    data: str = option("data/demo", "dataset folder made by prepare")
    run: Path | None = option(None, "run folder that lends its summaries", Path)
    paradigm: str = option("recent-only", "what the prompt shows", choices=trsr.PARADIGMS)
    history_items: int = option(3, "recent items in the prompt", numbers.natural)
    max_length: int = option(2048, "longest prompt with its answer, in tokens", numbers.positive)
    dtype: str = option("auto", "auto: bf16 on GPUs, fp32 on CPUs", choices=("auto", *DTYPES))
    users: int | None = option(None, "only the first test users (unset: all)", numbers.positive)
    pack_tokens: int | None = option(
        None, "tokens per pass (unset: 8192, on CPUs 4096)", numbers.positive
    )
    k: tuple = option((1, 3, 5), "cut-offs of Recall", numbers.positive, nargs="+")

    seeds: tuple = option(
        (0, 1, 2), "one training each", numbers.seed_number, "training", nargs="+"
    )
    epochs: int = option(1, "passes over the training users", numbers.positive)
    lr: float = option(2e-3, "learning rate", numbers.positive_real)
    batch_size: int = option(16, "examples per step", numbers.positive)
    loss: str = option(
        "answer", "of Yes and No alone, or of every token", choices=("answer", "prompt")
    )


# ---- What is the same for all: prompts, steps and candidates


@dataclass(frozen=True)
class Task:
    """The training users' trees, and the test users' packs and candidates."""

    settings: Settings
    device: torch.device
    batching: Batching
    trees: list[Tree]
    ranking: Ranking
    packs: list[Pack]
    answers: tuple[int, int]  # the token ids of Yes and No

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> "Task":
        """Return the task of the flags."""
        domain, items, splits = load_dataset(settings.data, ("train", "test"))
        train, test = splits["train"], splits["test"][: settings.users]
        form = Plain(Tokenizer(settings.model, load_config(settings.model).vocab_size))
        made = make_recommender(settings, settings.model, form, domain, items, train + test)
        recommender, answers = made
        batching = Batching.on(device, settings.pack_tokens, on_gpus=8192)
        prompts = Prompts.to_learn(recommender, train, answers)
        trees = list(tokenize(prompts, batching.workers, show=False))
        ranking = Ranking.of(recommender, test)
        packs = list(user_packs(ranking, range(len(test)), batching, show=False))
        if split := next((pack for pack in packs if pack.shared_prefix), None):
            user, _ = next(iter(split.leaves))
            what = f"user {test[user].user!r} fills more than a pack of {batching.pack_tokens}"
            raise trsr.InputError(f"test.jsonl: {what} tokens; raise --pack-tokens")
        return cls(settings, device, batching, trees, ranking, packs, answers)

    def load(self, fp8: str | None) -> Llama:
        """Return the model with an adapter that does nothing yet."""
        name = {"cuda": "bf16"}.get(self.device.type, "fp32")
        name = name if self.settings.dtype == "auto" else self.settings.dtype
        model = load_model(self.settings.model, self.device, DTYPES[name], fp8=fp8)
        targets = attention_names(self.settings.model)
        return apply_lora(model, LoRAConfig(targets=targets)).eval()


# ---- Training, and ranking


def train(task: Task, fp8: str | None, seed: int) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each step, and the trained adapter's tensors."""
    settings, losses = task.settings, []
    torch.manual_seed(seed)
    model = task.load(fp8).train()
    adapter = adapter_tensors(model)
    optimizer = torch.optim.AdamW(adapter.values(), settings.lr, (0.9, 0.95), weight_decay=5e-4)
    passes, sizes = Passes(model), [len(tree.leaves) for tree in task.trees]
    for epoch in range(settings.epochs):
        for users in step_batches(sizes, settings.batch_size, seed, epoch):
            step = make_step(task.trees, users, settings.loss, task.batching)
            torch.manual_seed(seed * 1_000_003 + len(losses))  # of dropout
            try:
                losses.append(train_step(passes, optimizer, step).read()[0])
            except FloatingPointError as error:
                raise trsr.InputError(f"step {len(losses) + 1}: {error}; lower --lr") from None
    return losses, {name: tensor.detach().clone() for name, tensor in adapter.items()}


@torch.no_grad()
def logits_of(task: Task, model: Llama, adapter: dict[str, Tensor] | None) -> dict:
    """Return {(user, candidate): fp32 logits (V,)} of a model with an adapter, or without."""
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(adapter[name] if adapter else torch.zeros_like(tensor))
    found = {}
    for pack in task.packs:
        here, rows = pack.to(task.device), torch.tensor(list(pack.leaves.values()))
        select = (torch.zeros_like(rows).to(task.device), rows.to(task.device))
        logits = model(here.ids[None], here.positions[None], here.mask(), None, select)
        found |= zip(pack.leaves, logits.float().cpu(), strict=True)
    return found


@dataclass(frozen=True)
class Compared:
    """How an adapter, or the model without one, ranks the candidates plainly and in fp8."""

    error: float  # relative, of the logits in fp8
    same_order: float  # the share of a user's pairs of candidates that both put in the same order
    ranks: dict[str, list[int]]  # of the positives, by kind

    @classmethod
    def of(cls, task: Task, models: dict[str, Llama], adapter=None) -> "Compared":
        """Return what comes of scoring all test users with each model."""
        found = {kind: logits_of(task, model, adapter) for kind, model in models.items()}
        plain, fp8 = (torch.stack([f[place] for place in sorted(f)]) for f in found.values())
        error = ((fp8 - plain).norm() / plain.norm()).item()

        ranking, (yes, no), ranks, orders = task.ranking, task.answers, {}, []
        for kind, logits in found.items():
            pairs = {place: (row[yes].item(), row[no].item()) for place, row in logits.items()}
            _, ranks[kind] = trsr.rank_users(ranking.examples, ranking.candidates, pairs)
            signs = []
            for user, items in enumerate(ranking.candidates):
                odds = np.array([np.subtract(*pairs[user, c]) for c in range(len(items))])
                signs.append(np.sign(odds[:, None] - odds)[np.triu_indices(len(odds), 1)])
            orders.append(np.concatenate(signs))
        return cls(error, float((orders[0] == orders[1]).mean()), ranks)


# ---- The tables


def print_recalls(ks: Sequence[int], base: Compared, trained: dict[str, list[Compared]]) -> None:
    """Print the Recall of each way to train and to score, and what fp8 changes of it."""
    ranks = {("not", kind): [base.ranks[kind]] for kind in KINDS}
    for how, of_seeds in trained.items():
        ranks |= {(how, kind): [found.ranks[kind] for found in of_seeds] for kind in KINDS}
    print(f"\n{'trained':<9}{'scored':<9}" + "".join(f"{f'Recall@{k}':>27}" for k in ks))
    for (how, kind), found in ranks.items():
        print(f"{how:<9}{kind:<9}{cells(means_and_intervals(found, ks), ks)}")

    print("\ndifference from scoring plainly what was trained plainly, or not, user by user")
    for (how, kind), found in ranks.items():
        plain = ranks["not" if how == "not" else "plain", "plain"]
        if found is not plain:
            print(f"{how:<9}{kind:<9}{cells(paired_differences(found, plain, ks), ks, '+')}")


def cells(metrics: dict[str, dict], ks: Sequence[int], sign: str = "") -> str:
    """Return each Recall with its interval."""
    found = [metrics[f"Recall@{k}"] for k in ks]
    pairs = [(m["mean"], "{:{s}.3f} to {:{s}.3f}".format(*m["interval"], s=sign)) for m in found]
    return "".join(f"{f'{mean:{sign}.3f} ({interval})':>27}" for mean, interval in pairs)


def print_scores(base: Compared, trained: dict[str, list[Compared]]) -> None:
    """Print how far the scores of one model in fp8 are from its plain ones."""
    print(f"\n{'scored in fp8':<30}relative error of the logits   pairs in the same order")
    rows = {"no adapter": [base]} | {f"adapters trained {how}": c for how, c in trained.items()}
    for name, found in rows.items():
        error, same = (np.mean([vars(c)[what] for c in found]) for what in ("error", "same_order"))
        print(f"{name:<30}{error:>28.2%}{same:>26.2%}")


def print_losses(losses: dict[tuple[int, str], list[float]], seeds: Sequence[int]) -> None:
    """Print the curves' means over quarters of the training, and how far they are apart."""
    steps = len(next(iter(losses.values())))
    parts = [part for part in np.array_split(np.arange(steps), min(4, steps)) if len(part)]
    titles = [f"steps {part[0] + 1}-{part[-1] + 1}" for part in parts]
    print(f"\n{'mean loss':<20}" + "".join(f"{title:>16}" for title in titles))
    for seed in seeds:
        for kind in KINDS:
            curve = np.array(losses[seed, kind])
            cells = "".join(f"{curve[part].mean():>16.4f}" for part in parts)
            print(f"{f'seed {seed}, {kind}':<20}{cells}")

    def apart(pairs) -> np.ndarray:
        """Return the mean distance of curves' steps, in each part."""
        found = [np.abs(np.subtract(losses[a], losses[b])) for a, b in pairs]
        return np.mean([[gaps[part].mean() for part in parts] for gaps in found], axis=0)

    rows = {"fp8 from plain": [((s, "fp8"), (s, "plain")) for s in seeds]}
    rows["seed from seed"] = [((a, "plain"), (b, "plain")) for a, b in combinations(seeds, 2)]
    for name, pairs in rows.items():
        if pairs:
            print(f"{name:<20}" + "".join(f"{gap:>16.4f}" for gap in apart(pairs)))


def main() -> None:
    """Train, score, and print the tables."""
    settings = parse_settings(Settings, __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.paradigm in trsr.SUMMARIZED and settings.run is None:
        raise trsr.InputError(
            f"--paradigm {settings.paradigm} needs --run, whose summaries it shows"
        )
    task = Task.of(settings, device)
    models = {kind: task.load(fp8 and "scoring") for kind, fp8 in KINDS.items()}
    print_task(task, models["fp8"])

    base = Compared.of(task, models)
    losses, trained = {}, {how: [] for how in KINDS}
    with Bar(desc="train and score", total=2 * len(settings.seeds), unit="adapter") as bar:
        for seed, how in product(settings.seeds, KINDS):
            losses[seed, how], adapter = train(task, KINDS[how], seed)
            trained[how].append(Compared.of(task, models, adapter))
            bar.update()
    print_scores(base, trained)
    print_recalls(settings.k, base, trained)
    print_losses(losses, settings.seeds)


def print_task(task: Task, model: Llama) -> None:
    """Print what is measured, and on what."""
    settings, card = task.settings, "a CPU"
    if task.device.type == "cuda":
        card = torch.cuda.get_device_name()
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    where = f"torch {torch.__version__} on {card}"
    print(f"{settings.model} on {settings.data}, {settings.paradigm}, {where}")
    print(f"plain: {dtype}; fp8: {dtype}{told(model)}")
    steps = f"epochs {settings.epochs}, lr {settings.lr:g}, {settings.batch_size} examples a step"
    print(f"{len(task.trees)} training users, {len(task.ranking.examples)} test users; {steps}")


if __name__ == "__main__":
    run_main(main, CheckpointError, AdapterError)
