"""Train the paper's baselines and rank the test users with them: RUN/baselines/

    python -m baselines                                         # all, on the demo with models/tiny
    python -m baselines --data data/games --run runs/games --encoder FOLDER --seeds 0 1 2

The models learn from the training users alone, by a softmax over the target and its negatives:
those in the file, and others drawn again in every epoch. The drawn ones are uniform and, as in
`prepare`, neither the target nor in the history. With --every-position, each item of a history is a
target too, given the items before it. The epoch with the best validation recall ranks the test
users.

Writes RUN/baselines/NAME-SEED/ with scores-test.jsonl and results.json, and prints one table. With
--every-position, NAME ends with +positions. With --candidates all, each folder has
scores-test-all.jsonl and results-all.json too.
"""

import re
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import trsr
from baselines.encode import ENCODER, default_encoder, embeddings
from baselines.models import MODELS, Baseline
from baselines.ranking import Tests, rank_among
from batches.candidates import Choice, choice
from launch.bars import Bar
from launch.command import option, parse_settings, run_main
from launch.numbers import fraction, positive, positive_real, real, seed_number
from llama import CheckpointError
from prepare.dataset import load_dataset
from runfolder.compare import format_table
from trsr import Example


def folder_name(text: str) -> str:
    """Return a part of a folder's name; ArgumentTypeError for any other text."""
    if not re.fullmatch(r"[\w.+-]*", text):
        raise ArgumentTypeError(f"expected letters, digits, '.', '+', '-' or '_', not {text!r}")
    return text


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: Path = option(Path("data/demo"), "dataset folder made by prepare", Path, "files")
    run: Path = option(Path("runs/demo"), "run folder", Path)
    encoder: str | None = option(None, f"of the items' texts: {ENCODER}")
    models: tuple[str, ...] = option(
        tuple(MODELS), "which models to train", choices=MODELS, nargs="+", group="models"
    )
    seeds: tuple[int, ...] = option((0,), "one training per seed", seed_number, nargs="+")
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", positive, nargs="+")
    size: int = option(64, "dimensions of an item", positive)
    dropout: float = option(0.2, "on the vectors that the models combine", fraction)
    longest: int = option(200, "how many of the most recent items a model sees", positive)
    label: str = option("", "added to the names of the models' folders", folder_name)
    candidates: Choice = option(
        None, "also rank all items, N drawn ones, or a file's, as evaluate.py does", choice
    )

    users: int | None = option(
        None, "only the first so many test users, for --candidates (unset: all)", positive
    )

    lr: float = option(1e-3, "learning rate", positive_real, "training")
    weight_decay: float = option(1e-4, "AdamW's weight decay", real)
    batch_size: int = option(128, "targets per step", positive)
    negatives: int = option(20, "negatives drawn per target in every epoch", positive)
    epochs: int = option(60, "most passes over the training users", positive)
    patience: int = option(
        8, "stop after so many epochs without a better validation recall", positive
    )
    every_position: bool = option(
        False, "also learn to predict each item of a history from those before it"
    )

    def row(self, name: str) -> str:
        """Return the name of a model's row, and of its folders without the seed."""
        name += "+positions" if self.every_position else ""
        return f"{name}-{self.label}" if self.label else name


# ---- Users


class Users:
    """A split as item numbers: histories (n, L), padded with -1 at the end, candidates (n, C)."""

    def __init__(
        self,
        examples: list[Example],
        number: dict[str, int],
        candidates: list[list[str]],
        longest: int,
    ):
        histories = [[number[i] for i in e.history][-longest:] for e in examples]
        width = max(1, max(map(len, histories)))
        self.examples, self.names = examples, candidates
        self.lengths = torch.tensor([len(h) for h in histories])
        self.histories = torch.tensor([h + [-1] * (width - len(h)) for h in histories])
        self.candidates = torch.tensor([[number[i] for i in items] for items in candidates])

    def batches(
        self, order: Tensor, candidates: Tensor, size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield histories (b, l) and candidates (b, C) of `size` users at a time, in this order.

        A batch is as wide as its longest history. All are moved to the device at once, so that it
        never waits for the next batch.
        """
        widths = [max(1, int(part.max())) for part in self.lengths[order].split(size)]
        histories, rows = (t[order].to(device).split(size) for t in (self.histories, candidates))
        for width, history, row in zip(widths, histories, rows, strict=True):
            yield history[:, :width], row


def every_position(examples: list[Example]) -> list[Example]:
    """Return an example for each item of a history but the first, and for the target."""
    made = []
    for example in examples:
        sequence = [*example.history, example.positive]
        for i in range(1, len(sequence)):
            # As in the dataset, no target is in its own history.
            if sequence[i] not in sequence[:i]:
                made.append(replace(example, history=sequence[:i], positive=sequence[i]))
    return made


def draw_negatives(users: Users, n_items: int, n: int, rng: np.random.Generator) -> Tensor:
    """Return n uniform items for each user (users, n), neither the target nor in the history.

    With --every-position, the history is what comes before the target, so the user's later items
    can be drawn like any other.
    """
    drawn = rng.integers(n_items, size=(len(users.examples), n))
    taken = np.concatenate((users.histories.numpy(), users.candidates[:, :1].numpy()), axis=1)
    # An item at a time: all at once would need an array of users x n x history.
    wrong = np.zeros(drawn.shape, dtype=bool)
    for column in taken.T:
        wrong |= drawn == column[:, None]
    rows, places = wrong.nonzero()
    while len(rows):
        drawn[rows, places] = rng.integers(n_items, size=len(rows))
        again = (drawn[rows, places, None] == taken[rows]).any(1)
        rows, places = rows[again], places[again]
    return torch.from_numpy(drawn)


# ---- Scores


@torch.no_grad()
def scores_of(model: Baseline, users: Users, device: torch.device) -> Tensor:
    """Return the scores (n, C) of all candidates."""
    model.eval()
    order = torch.arange(len(users.examples))
    batches = users.batches(order, users.candidates, 256, device)
    return torch.cat([model.score(*batch) for batch in batches]).float().cpu()


def ranked(model: Baseline, users: Users, device: torch.device) -> tuple[list, list[int]]:
    """Return each user's scores and the target's rank, computed as in evaluate.py."""
    logits = {}
    for u, row in enumerate(scores_of(model, users, device).tolist()):
        logits |= {(u, c): (score, 0.0) for c, score in enumerate(row)}
    return trsr.rank_users(users.examples, users.names, logits)


def recalls_of(ranks: list[int], ks: Sequence[int]) -> dict[str, float]:
    """Return the recall at each of ks."""
    metrics = trsr.metrics_at(ranks, ks)
    return {name: float(v.mean()) for name, v in metrics.items() if name.startswith("Recall")}


# ---- Training


class Training:
    """Trains one model with one seed."""

    def __init__(self, model: Baseline, users: dict[str, Users], settings: Settings, seed: int):
        self.model, self.users, self.settings = model, users, settings
        self.device = model.texts.device
        self.validation: dict[str, float] = {}  # the recalls of the epoch that is kept
        self.rng, self.generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    def fit(self, name: str) -> None:
        """Train the model and restore its weights of the epoch with the best validation."""
        best, kept, since = -1.0, {}, 0
        with Bar(range(self.settings.epochs), name, unit="epoch") as bar:
            for _ in bar:
                loss = self.train_epoch()
                _, ranks = ranked(self.model, self.users["val"], self.device)
                recalls = recalls_of(ranks, self.settings.k)
                recall = sum(recalls.values())
                bar.set_postfix_str(f"loss {loss:.3f}, validation recalls {recall:.3f}")
                since += 1
                if recall > best:
                    best, since, self.validation = recall, 0, recalls
                    kept = {key: t.detach().clone() for key, t in self.model.state_dict().items()}
                if since == self.settings.patience:
                    break
        self.model.load_state_dict(kept)

    def train_epoch(self) -> float:
        """Make a pass over the training users; return the loss of its last step."""
        self.model.train()
        train, settings = self.users["train"], self.settings
        drawn = draw_negatives(train, len(self.model.texts), settings.negatives, self.rng)
        candidates = torch.cat((train.candidates, drawn), 1)  # the target comes first
        order = torch.randperm(len(candidates), generator=self.generator)
        for batch in train.batches(order, candidates, settings.batch_size, self.device):
            loss = self.loss(*batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def loss(self, history: Tensor, candidates: Tensor) -> Tensor:
        """Return the cross-entropy of the first candidate, and DIEN's auxiliary loss."""
        model = self.model
        target = torch.zeros(len(history), dtype=torch.long, device=self.device)
        loss = F.cross_entropy(model.score(history, candidates), target)
        if hasattr(model, "auxiliary_loss"):
            loss = loss + model.auxiliary_loss(model.items(history.clamp(min=0)), history >= 0)
        return loss


# ---- The command


def main() -> None:
    """Train every model with every seed and print the table."""
    settings = parse_settings(Settings, __doc__)
    encoder = settings.encoder or default_encoder(settings.data)
    settings = replace(settings, encoder=encoder)
    out = settings.run / "baselines"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, items, splits = load_dataset(settings.data, ("train", "val", "test"))
    texts = embeddings(settings.encoder, items, out, device).to(device)
    users = load_users(settings, items, splits)
    announce(settings, texts, {split: len(examples) for split, examples in splits.items()})
    n_targets = len(users["train"].examples)
    negatives = f"{settings.negatives} more negatives"
    print(f"learns  {n_targets} targets, each against its file's and {negatives}")

    tests = Tests.of(settings, splits, items)
    number = {name: i for i, name in enumerate(items)}
    for name in settings.models:
        row = settings.row(name)
        for seed in settings.seeds:
            torch.manual_seed(seed)
            model = MODELS[name](texts, settings.size, settings.dropout).to(device)
            training = Training(model, users, settings, seed)
            training.fit(f"{name}, seed {seed}")
            about = {"model": name, "targets": n_targets, "lr": settings.lr}
            about |= {"validation": training.validation}
            for kind, examples in tests.kinds.items():
                found = own_lines(model, users["test"], device)
                if kind is not None:
                    histories = users["test"].histories[: len(examples)]
                    found = rank_among(model, examples, histories, number)
                tests.add(kind, out / f"{row}-{seed}", row, found, about)
        tests.tabulate(row)

    several = f", {len(settings.seeds)} seeds together" if len(settings.seeds) > 1 else ""
    for kind, table in tests.tables.items():
        print(f"candidates: {', '.join(tests.names[kind]) or 'as in the dataset'}")
        print(format_table(table))
        print(f"below each mean is its 95 % interval over users{several}")
    tests.write(out)
    print(f"wrote   {out}")


def load_users(
    settings: Settings, items: dict[str, str], splits: dict[str, list[Example]]
) -> dict[str, Users]:
    """Return each split's users; val and test have the candidates that evaluate.py ranks."""
    number = {name: i for i, name in enumerate(items)}
    train = splits["train"]
    if settings.every_position:
        train = every_position(train)
    own = [[example.positive, *example.negatives] for example in train]
    users = {"train": Users(train, number, own, settings.longest)}
    for split in ("val", "test"):
        candidates = [trsr.shuffled_candidates(example) for example in splits[split]]
        users[split] = Users(splits[split], number, candidates, settings.longest)
    return users


def announce(settings: Settings, texts: Tensor, sizes: dict[str, int]) -> None:
    """Print what the models are trained on."""
    users = ", ".join(f"{n} {split}" for split, n in sizes.items())
    print(f"data    {settings.data}: {users} users, {len(texts)} items")
    frozen = f"{texts.shape[1]} dimensions, frozen"
    where = f"{settings.size} in the models, on {texts.device.type}"
    print(f"items   {settings.encoder}: {frozen}; {where}")


def own_lines(model: Baseline, users: Users, device: torch.device) -> tuple[list[dict], list[int]]:
    """Return each user's line with the dataset's own candidates, and the target's rank."""
    scores, ranks = ranked(model, users, device)
    columns = zip(users.examples, ranks, users.names, scores, strict=True)
    lines = [
        {"user": example.user, "rank": rank, "candidates": candidates, "scores": row}
        for example, rank, candidates, row in columns
    ]
    return lines, ranks


if __name__ == "__main__":
    run_main(main, CheckpointError)
