"""Train and rank with the paper's baselines: python -m baselines --data DIR --run DIR

    python -m baselines                                         # all of them on the demo, over models/tiny's states
    python -m baselines --data data/games --run runs/games --encoder PATH_OR_HUB_ID --models sasrec narm --seeds 0 1 2

Each model learns from the training users alone, by softmax over the target (with --every-position each item of the
histories too, after those before it), the file's negatives and others that are drawn anew in every epoch as `prepare`
draws them (uniform, never the target or an item of the history); the epoch with the best validation recall ranks the
test users. Writes RUN/baselines/NAME-SEED/scores-test.jsonl and results.json, and prints one table.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import trsr
from baselines.encode import embeddings
from baselines.models import MODELS, Baseline
from files.jsonl import write_json, write_jsonl
from launch.command import natural, positive, run_main
from llama import CheckpointError
from prepare.dataset import load_dataset
from runfolder.compare import format_table
from runfolder.scores import means_and_intervals, table_of


class Users:
    """A split as tensors of item numbers: histories (n, L), padded with -1 at the end, and candidates (n, C)."""

    def __init__(
        self,
        examples: list[trsr.Example],
        number: dict[str, int],
        candidates: list[list[str]],
        longest: int,
    ):
        histories = [[number[i] for i in e.history][-longest:] for e in examples]
        width = max(1, max(map(len, histories)))
        self.examples, self.names = examples, candidates
        self.histories = torch.tensor([h + [-1] * (width - len(h)) for h in histories])
        self.candidates = torch.tensor([[number[i] for i in items] for items in candidates])


def every_position(examples: list[trsr.Example]) -> list[trsr.Example]:
    """Return each item of the histories but the first as a target after the items before it, and the targets."""
    made = []
    for example in examples:
        sequence = [*example.history, example.positive]
        for i in range(1, len(sequence)):
            if (
                sequence[i] not in sequence[:i]
            ):  # as in the dataset, no target is in its own history
                made.append(replace(example, history=sequence[:i], positive=sequence[i]))
    return made


def draw_negatives(users: Users, n_items: int, n: int, rng: np.random.Generator) -> torch.Tensor:
    """Return n items (users, n) for each user, uniform over those that are neither target nor in the history (with
    --every-position the one before the target: one that follows can be drawn, as seldom as any other).
    """
    drawn = rng.integers(n_items, size=(len(users.examples), n))
    taken = np.concatenate((users.histories.numpy(), users.candidates[:, :1].numpy()), axis=1)
    while (wrong := (drawn[:, :, None] == taken[:, None]).any(2)).any():
        drawn[wrong] = rng.integers(n_items, size=int(wrong.sum()))
    return torch.from_numpy(drawn)


@torch.no_grad()
def scores_of(model: Baseline, users: Users, device: torch.device) -> torch.Tensor:
    """Return the scores (n, C) of all candidates."""
    model.eval()
    parts = zip(users.histories.split(256), users.candidates.split(256), strict=True)
    return torch.cat([model.score(h.to(device), c.to(device)).float().cpu() for h, c in parts])


def ranked(model: Baseline, users: Users, device: torch.device) -> tuple[list, list[int]]:
    """Return each user's scores and the target's rank, by the same functions as the language model's."""
    logits = scores_of(model, users, device)
    pairs = {(u, c): (x, 0.0) for u, row in enumerate(logits.tolist()) for c, x in enumerate(row)}
    return trsr.rank_users(users.examples, users.names, pairs)


def recall_sum(ranks: list[int], ks: list[int]) -> float:
    """Return the sum of the recalls at ks."""
    return sum(
        float(v.mean())
        for name, v in trsr.metrics_at(ranks, ks).items()
        if name.startswith("Recall")
    )


def fit(
    model: Baseline, users: dict[str, Users], args, seed: int, device: torch.device, name: str
) -> None:
    """Train model, and leave it as it was after the epoch with the best validation recall."""
    train, val, n_items = users["train"], users["val"], len(model.texts)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    best, kept, since = -1.0, {}, 0
    with tqdm(range(args.epochs), name, unit="epoch") as bar:
        for _ in bar:
            model.train()
            wanted = torch.cat(
                (train.candidates, draw_negatives(train, n_items, args.negatives, rng)), 1
            )
            for part in torch.randperm(len(wanted), generator=generator).split(args.batch_size):
                history, candidates = train.histories[part].to(device), wanted[part].to(device)
                target = torch.zeros(len(part), dtype=torch.long, device=device)
                loss = F.cross_entropy(model.score(history, candidates), target)
                if hasattr(model, "auxiliary_loss"):
                    loss = loss + model.auxiliary_loss(
                        model.items(history.clamp(min=0)), history >= 0
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            recall = recall_sum(ranked(model, val, device)[1], args.k)
            bar.set_postfix_str(f"loss {loss.item():.3f}, validation recalls {recall:.3f}")
            since += 1
            if recall > best:
                best, since = recall, 0
                kept = {key: value.detach().clone() for key, value in model.state_dict().items()}
            if since == args.patience:
                break
    model.load_state_dict(kept)


def main() -> None:
    """Train every model with every seed and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=Path, default=Path("data/demo"))
    flag("--run", type=Path, default=Path("runs/demo"))
    flag(
        "--encoder",
        default="llama:models/tiny",
        help="of the items' texts: llama:FOLDER, or what transformers loads",
    )
    flag("--models", nargs="+", choices=MODELS, default=list(MODELS))
    flag("--seeds", type=natural, nargs="+", default=[0])
    flag("--k", type=positive, nargs="+", default=[3, 5, 10])
    flag("--size", type=positive, default=64, help="dimensions of an item")
    flag("--dropout", type=float, default=0.2)
    flag("--lr", type=float, default=1e-3)
    flag("--weight-decay", type=float, default=1e-4)
    flag("--batch-size", type=positive, default=128, help="targets a step")
    flag("--negatives", type=positive, default=20, help="drawn for each target in every epoch")
    flag("--epochs", type=positive, default=60)
    flag(
        "--patience",
        type=positive,
        default=8,
        help="epochs without a better validation recall before training ends",
    )
    flag(
        "--every-position",
        action="store_true",
        help="learn every item but the first after those before it",
    )
    flag(
        "--longest",
        type=positive,
        default=200,
        help="most recent items of a history that are looked at",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, items, splits = load_dataset(args.data, ("train", "val", "test"))
    number = {name: i for i, name in enumerate(items)}
    texts = embeddings(args.encoder, items, args.run / "baselines", device).to(device)
    print(
        f"data    {args.data}: {', '.join(f'{len(e)} {s}' for s, e in splits.items())} users, {len(items)} items"
    )
    print(
        f"items   {args.encoder}: {texts.shape[1]} dimensions, frozen; {args.size} in the models, on {device.type}"
    )
    candidates = {
        split: [trsr.shuffled_candidates(e) for e in splits[split]] for split in ("val", "test")
    }
    examples = (
        splits | {"train": every_position(splits["train"])} if args.every_position else splits
    )
    candidates["train"] = [[e.positive, *e.negatives] for e in examples["train"]]
    users = {
        split: Users(examples[split], number, candidates[split], args.longest) for split in splits
    }
    print(
        f"learns  {len(examples['train'])} targets, each against its file's and {args.negatives} more negatives"
    )
    table = {}
    for name in args.models:
        all_ranks = []
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = MODELS[name](texts, args.size, args.dropout).to(device)
            fit(model, users, args, seed, device, f"{name}, seed {seed}")
            scores, ranks = ranked(model, users["test"], device)
            folder = args.run / "baselines" / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            columns = ([e.user for e in splits["test"]], ranks, candidates["test"], scores)
            fields = ("user", "rank", "candidates", "scores")
            rows = (dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True))
            write_jsonl(folder / "scores-test.jsonl", rows)
            report = {
                "data": str(args.data),
                "model": name,
                "targets": len(examples["train"]),
                "table": means_and_intervals(ranks, args.k),
            }
            write_json(folder / "results.json", report)
            all_ranks.append(ranks)
        table = table | table_of(name, all_ranks, splits["test"], splits["train"], args.k)
    print(format_table(table))
    seeds = f", {len(args.seeds)} seeds together" if len(args.seeds) > 1 else ""
    print(f"below each mean is its 95 % interval over users{seeds}")
    write_json(
        args.run / "baselines" / "results.json",
        {"data": str(args.data), "users": len(splits["test"]), "table": table},
    )
    print(f"wrote   {args.run / 'baselines'}")


if __name__ == "__main__":
    run_main(main, CheckpointError)
