"""The test users ranked by trained baselines, among their own candidates and if asked among others.

Writes for each model and seed what evaluate.py writes for a run: the users' lines and the table, so
that runfolder.compare takes the folders of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import trsr
from baselines.models import Baseline
from batches.candidates import Choice, about_candidates, with_candidates
from files.jsonl import write_json, write_jsonl
from launch.bars import Bar
from runfolder.results import Question, parts_of
from runfolder.scores import table_of
from runfolder.tally import BEST
from trsr import Example, InputError

CHUNK = 2048  # candidates that are scored at once


@torch.no_grad()
def rank_among(
    model: Baseline, examples: Sequence[Example], histories: Tensor, number: dict[str, int]
) -> tuple[list[dict], list[int]]:
    """Return each user's line, with the best candidates, and the rank of each positive.

    examples: their negatives are the other candidates. histories: (n, L) item numbers, padded with
    -1 at the end. number: of an item, by its id.
    """
    model.eval()
    device, lines, ranks = model.texts.device, [], []
    users = zip(examples, histories, strict=True)
    bar = Bar(users, "test users", len(examples), unit="user", leave=False)
    for example, history in bar:
        names = [example.positive, *example.negatives]
        row = history[None, : max(1, int((history >= 0).sum()))].to(device)
        chunks = torch.tensor([number[name] for name in names]).to(device).split(CHUNK)
        scores = torch.cat([model.score(row, chunk[None])[0] for chunk in chunks])
        scores = scores.double().cpu()
        ranks.append(trsr.rank_of_positive(scores.numpy(), 0))

        # The positive is the first, so in the reverse order it comes last of those with its score.
        order = len(names) - 1 - scores.flip(0).argsort(descending=True, stable=True)[:BEST]
        scores = scores.sigmoid()  # as with the dataset's own candidates
        line = {"user": example.user, "positive": example.positive, "rank": ranks[-1]}
        line |= {"score": float(scores[0]), "ranked": len(names)}
        line |= {"candidates": [names[i] for i in order], "scores": scores[order].tolist()}
        lines.append(line)
    return lines, ranks


@dataclass
class Tests:
    """The test users, their ranks by every model, and the table of each kind of candidates."""

    data: str
    train: Sequence[Example]
    k: Sequence[int]
    kinds: dict[Choice, list[Example]]  # None: with the dataset's own candidates
    names: dict[Choice, list[str]]  # what the names of its files say
    ranks: dict[tuple[Choice, str], list] = field(default_factory=dict)  # a list for each seed
    tables: dict[Choice, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, settings, splits: dict, items: dict) -> "Tests":
        """Return the tests with the dataset's own candidates and, if asked, those of the settings.

        settings: those of `python -m baselines`, of which it reads data, k, candidates and users.
        """
        kinds, names, chosen = {None: splits["test"]}, {None: []}, settings.candidates
        if chosen is not None:
            kinds[chosen] = with_candidates(chosen, splits["test"][: settings.users], items)
            names[chosen] = parts_of(chosen, settings.users)
        elif settings.users:
            raise InputError(f"--users {settings.users}: it needs --candidates")
        return cls(str(settings.data), splits["train"], settings.k, kinds, names)

    def add(
        self, kind: Choice, folder: Path, row: str, found: tuple[list[dict], list[int]], about: dict
    ) -> None:
        """Write a model's lines and table to its folder, and keep its ranks.

        found: the users' lines, and the ranks. about: what else the table's file says.
        """
        lines, ranks = found
        examples = self.kinds[kind]
        folder.mkdir(parents=True, exist_ok=True)
        question = Question(folder, parts=self.names[kind])
        write_jsonl(question.scores, lines)
        about = about | {"data": self.data, "split": "test", "users": len(examples), "row": row}
        about |= {"paradigm": row} | about_candidates(kind, examples)
        table = table_of(row, ranks, examples, self.train, self.k)
        write_json(question.results, about | {"table": table})
        self.ranks.setdefault((kind, row), []).append(ranks)

    def tabulate(self, row: str) -> None:
        """Add a model's row to the tables, its seeds together."""
        for kind, examples in self.kinds.items():
            found = table_of(row, self.ranks[kind, row], examples, self.train, self.k)
            self.tables[kind] = self.tables.get(kind, {}) | found

    def write(self, out: Path) -> None:
        """Write the tables to out/results.json and, with candidates, out/results-NAME.json."""
        for kind, table in self.tables.items():
            question = Question(out, parts=self.names[kind])
            about = {"data": self.data, "users": len(self.kinds[kind])}
            about |= about_candidates(kind, self.kinds[kind])
            write_json(question.results, about | {"table": table})
