"""What every position as a target costs: tokens that are computed for an example.

    python -m bench.targets --data data/games --model models/smollm2
    python -m bench.targets --data data/games --model models/smollm2 --run runs/games   # summaries

For each paradigm and number of targets: the tokens of an example read apart; computed with the
prefix that the examples of one position share; and computed in one tree of all positions. Only
tokens are counted, so no weights are needed and no GPU. --run has the summaries, made with
summarize.py --every-block.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import trsr
from batches.positions import ALL, EveryPosition, Targets, prompts_to_learn
from batches.prompts import Prompts
from launch.command import option, parse_settings, run_main
from launch.numbers import natural, positive
from models.hub import find_model, load_config, load_form
from ops.packs import make_tree
from prepare.dataset import load_dataset
from state.summaries import load_summaries


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: str = option("data/demo", "dataset folder made by prepare", group="files")
    model: str = option("models/tiny", "model folder or hub id, for its tokenizer")
    run: Path | None = option(None, "run folder with summaries of that dataset", Path)
    users: int = option(100, "training users to count", positive, "prompts")
    history_items: int = option(3, "recent items in the prompt", natural)
    max_length: int = option(2048, "longest prompt with its answer", positive)


@dataclass(frozen=True)
class Counted:
    """The tokens of some users' examples."""

    examples: int
    apart: int
    shared: int  # with a prefix for the examples of one position
    tree: int  # in one tree a user

    @classmethod
    def of(cls, prompts: Prompts, per_position: int) -> "Counted":
        """Return the tokens of the prompts; per_position: the examples of a position."""
        found = [0, 0, 0, 0]
        for index in range(len(prompts)):
            tree, _ = prompts[index]
            if isinstance(tree, trsr.InputError):
                raise tree
            sequences = tree.sequences()
            rows = sequences  # of one position, if it is the only one
            if isinstance(prompts, EveryPosition):
                rows = prompts.rows(prompts.users[index], prompts.recommender.budget)
            groups = [rows[i : i + per_position] for i in range(0, len(rows), per_position)]
            shared = sum(make_tree(group).size for group in groups)
            counts = len(sequences), sum(map(len, sequences)), shared, tree.size
            found = [a + b for a, b in zip(found, counts, strict=True)]
        return cls(*found)


def main() -> None:
    """Print the table."""
    settings = parse_settings(Settings, __doc__)
    domain, items, splits = load_dataset(settings.data, ("train",))
    examples, folder = splits["train"][: settings.users], find_model(settings.model)
    form, config = load_form(folder, chat=False), load_config(folder)
    context = min(settings.max_length, config.max_position_embeddings)
    budget = trsr.Budget(context - 1, form.encode, Counter())
    answers = trsr.answer_ids(form.encode, domain)
    summaries = load_summaries(settings.run, items, examples) if settings.run else {}

    print(f"{len(examples)} users of {settings.data}, tokens of {settings.model}, an example:")
    print(f"{'':24}{'examples':>10}{'apart':>9}{'shared prefix':>15}{'one tree':>10}{'saved':>9}")
    for paradigm in trsr.PARADIGMS:
        if paradigm == "none" or (paradigm in trsr.SUMMARIZED and not settings.run):
            continue
        shown = paradigm, domain, items, summaries, settings.history_items, budget
        recommender = trsr.Recommender(*shown)
        for name, most in (("last", 1), ("all", ALL)):
            made = prompts_to_learn(recommender, examples, answers, Targets(most), settings.run)
            found = Counted.of(made, 1 + len(examples[0].negatives))
            rates = [count / found.examples for count in (found.apart, found.shared, found.tree)]
            cells = "".join(f"{v:>{w}.1f}" for v, w in zip(rates, (9, 15, 10), strict=True))
            saved = f"{found.shared / found.tree:>8.2f}x"
            print(f"{f'{paradigm}, {name}':24}{found.examples:>10}{cells}{saved}")


if __name__ == "__main__":
    run_main(main)
