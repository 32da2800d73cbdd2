"""experiments/ruled.py: summaries by rule that the other scripts take as a model's."""

import pytest
from helpers import read_lines, run, write_dataset, write_lines

from experiments.corpus import Corpus
from prepare.dataset import load_dataset
from runfolder import show
from state.settings import read_config
from state.summaries import load_summaries


@pytest.fixture
def ruled(tmp_path):
    """Return the function that writes a dataset's summaries into a run folder, by user."""
    data = write_dataset(tmp_path / "data", history=(6, 12))

    def made(name, **settings):
        folder = tmp_path / name
        run("experiments.ruled.py", data=data, run=folder, **settings)
        return folder, {line["user"]: line for line in read_lines(folder / "summaries.jsonl")}

    made.data = data
    return made


@pytest.mark.parametrize("paradigm", ["hierarchical", "recurrent"])
def test_every_user_s_summary_counts_the_history(ruled, paradigm):
    folder, lines = ruled("run", paradigm=paradigm, block_size=4)
    _, items, splits = load_dataset(ruled.data, ("train", "val", "test"))
    rule = Corpus.load(str(ruled.data)).rule
    examples = [*splits["train"], *splits["val"], *splits["test"]]
    summaries = load_summaries(folder, items, examples)  # with the keys that it expects
    assert len(summaries) == len(examples)
    for example in examples:
        texts = [items[i] for i in example.history]
        # Six colors are too many for a facet of so few items, so they are words like the others.
        counted = rule.read(summaries[example.user])["Words"]
        assert counted
        for word, n in counted.items():  # a block lists only its most frequent words
            assert n <= sum(word in text for text in texts)
        steps = list(show.steps(lines[example.user]["tree"]))
        spans = [span for _, _, span, _ in steps if span != [0, 0]]
        size = len(example.history)
        assert spans == [[i, min(i + 4, size)] for i in range(0, size, 4)]
        assert steps[-1][-1] == summaries[example.user]
    assert read_config(folder)["summarize"]["block_size"] == 4


def test_the_rule_is_that_of_the_training_split(ruled):
    _, before = ruled("before")
    test = read_lines(ruled.data / "test.jsonl")
    for line in test:
        line["history"] = line["history"][:3]
    write_lines(ruled.data / "test.jsonl", test)
    _, after = ruled("after")
    others = {user for user in before if not user.startswith("test")}
    assert all(after[user] == before[user] for user in others)
    assert all(after[user] != before[user] for user in before.keys() - others)
