"""experiments/base.py and corpus.py: a model from the training split alone and its own prompts."""

import re
from collections import Counter
from itertools import islice

import pytest
import torch
from helpers import CPU, flags, read_lines, run, run_here, write_dataset, write_lines
from torch.utils.data import DataLoader

import trsr
from batches.prompts import Prompts
from experiments import base
from experiments.corpus import Corpus, Question, Writing
from experiments.rule import Rule
from files.jsonl import read_json
from models.chat import Plain
from models.hub import load_model
from models.tokenizer import Tokenizer
from prepare.domains import DOMAINS

SMALL = {"hidden_size": 64, "layers": 1, "vocabulary": 480, "seed": 3}
SMALL |= {"tokens": 75000, "pack_tokens": 1536, "lr": 5e-3}
WEIGHTS = "model.safetensors"


def make(folder, out, gpu=False, check=True, **settings):
    """Run the script inside this process, without a GPU if not asked for one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: gpu)
        arguments = flags(**{"data": folder, "out": out} | SMALL | settings)
        try:
            done = run_here(base.main, "base.py", arguments)
        finally:
            torch.use_deterministic_algorithms(False)
    if not check:
        return done
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def shown(user):
    """Return the items that a training user's prompts show."""
    return {*user["history"], user["positive"], *user["negatives"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset in which the texts of the training users' items say Train, all others Other."""
    folder = write_dataset(tmp_path_factory.mktemp("data"), users=(16, 4, 4))
    users, items = read_lines(folder / "train.jsonl"), read_lines(folder / "items.jsonl")
    seen = set().union(*map(shown, users))
    assert any(item["id"] not in seen for item in items)
    chosen = {item for user in users for item in [*user["history"], user["positive"]]}
    assert seen - chosen  # an item that is nothing but a negative
    for item in items:
        item["attributes"]["Brand"] = "Train" if item["id"] in seen else "Other"
    write_lines(folder / "items.jsonl", items)
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A base model, and the trees that were packed for it."""
    trees, pack_trees = [], base.pack_trees

    def recorded(some, *lengths, **options):
        trees.extend((tree, options.get("last_only", False)) for tree in some)
        return pack_trees(some, *lengths, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "pack_trees", recorded)
        return make(data, tmp_path_factory.mktemp("base") / "model"), trees


@pytest.fixture(scope="module")
def steps(data, made):
    corpus, tokenizer = Corpus.load(str(data)), Tokenizer(made[0], 480)
    settings = base.Settings(out=data, tokens=12000, pack_tokens=1536, negatives=4, seed=0)
    plan = base.plan_steps(corpus, tokenizer, settings)
    return base.Steps(corpus, tokenizer, plan, 1536, 1)


# ---- What the model sees


def test_neither_other_splits_nor_their_items_are_seen(data, made, steps, tmp_path):
    folder, trees = made
    alone = tmp_path / "data"
    alone.mkdir()
    for name in ("items.jsonl", "train.jsonl", "meta.json"):
        (alone / name).write_bytes((data / name).read_bytes())
    again = make(alone, tmp_path / "model")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (again / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not any("Other" in line for line in steps.corpus.tokenizer_lines())
    assert steps.corpus.texts.keys() == set().union(*map(shown, read_lines(data / "train.jsonl")))
    ids = ([*tree.prefix, *branch] for tree, _ in trees for branch in tree.branches)
    texts = [steps.tokenizer.decode(text) for text in ids]
    assert sum("Train" in text for text in texts) > 50
    assert not any("Other" in text for text in texts)


def test_every_epoch_asks_for_every_positive_with_new_negatives(steps):
    corpus = steps.corpus
    n = sum(len(sequence) - 1 for sequence in corpus.sequences)  # no history repeats an item
    two = list(islice(corpus.questions(4, seed=0), 2 * n))
    assert two == list(islice(corpus.questions(4, seed=0), 2 * n))
    drawn = []
    for epoch in (two[:n], two[n:]):
        assert sorted((q.user, q.position) for q in epoch) == corpus.positions()
        drawn.append({(q.user, q.position): q.negatives for q in epoch})
    assert drawn[0] != drawn[1]
    for question in two:
        assert len(set(question.negatives) - set(corpus.sequences[question.user])) == 4
        assert set(question.negatives) <= corpus.texts.keys()


def test_an_item_of_the_own_history_is_no_positive(steps):
    rule = Rule(("Color",), frozenset({"with"}))
    corpus = Corpus(steps.corpus.domain, steps.corpus.texts, [["a", "b", "a", "c"]], rule)
    assert corpus.positions() == [(0, 1), (0, 3)]


@pytest.mark.parametrize("paradigm", list(base.QUESTIONS))
def test_questions_are_the_prompts_of_train(steps, paradigm):
    corpus, user, budget = steps.corpus, 2, steps.recommender.budget
    sequence = corpus.sequences[user]
    negatives = [i for i in corpus.texts if i not in sequence][:2]
    example = trsr.Example("someone", sequence[:-1], sequence[-1], negatives)
    texts, summaries = [corpus.texts[i] for i in example.history], {"someone": ""}
    if paradigm in trsr.SUMMARIZED:
        summaries["someone"], _ = solved(paradigm, steps, texts)
    recommender = trsr.Recommender(paradigm, corpus.domain, corpus.texts, summaries, 3, budget)
    candidates = [example.positive, *negatives]
    expected, _ = Prompts(recommender, [(example, candidates)], steps.answers)[0]
    assert steps.question_tree(Question(user, len(sequence) - 1, paradigm, negatives)) == expected


def solved(paradigm, steps, texts):
    """Return the summary by the rule in the method's own course, and (prompt, answer) pairs."""
    corpus, found = steps.corpus, []

    def answers(prompts):
        given = [answer_to(corpus, prompt) for prompt in prompts]
        found.extend(zip(prompts, given, strict=True))
        return given

    task = getattr(trsr, paradigm)(texts, corpus.domain, steps.recommender.budget, 5)
    return trsr.solve(task, answers)["summary"], found


def answer_to(corpus, prompt):
    """Return the rule's summary of what the prompt shows, read off its text."""
    sections = dict(re.findall(r"\[([^]\n]+)\]\n(.*?)(?:\n\n|\Z)", prompt, re.DOTALL))
    lists = {
        name: [line.partition(". ")[2] for line in body.splitlines()]
        for name, body in sections.items()
    }
    before = [sections[name] for name in sections if name == "Previous Preference Summary"]
    items = lists.get(corpus.domain.history, []) + lists.get(corpus.domain.recent, [])
    return corpus.rule.summary(items, [*before, *lists.get("User Preferences Summaries", [])])


def test_writings_are_the_prompts_of_summarize_and_end(steps):
    corpus, budget = steps.corpus, steps.recommender.budget
    lengths = list(map(len, corpus.sequences))
    n = max(lengths)
    user = lengths.index(n)
    texts = [corpus.texts[i] for i in corpus.sequences[user]]
    expected = {pair for paradigm in trsr.SUMMARIZED for pair in solved(paradigm, steps, texts)[1]}
    kinds = [("block", 0), ("block", 1), ("update", 1), ("merge", 1)]
    writings = [Writing(kind, user, n, block) for kind, block in kinds]
    assert {corpus.written(writing, budget) for writing in writings} == expected
    for writing in writings:
        tree, (prompt, answer) = steps.writing_tree(writing), corpus.written(writing, budget)
        ids = [*tree.prefix, *tree.branches[0]]
        begin = steps.form.encode([prompt])[0]
        assert (ids[: len(begin)], ids[-1]) == (begin, 2)
        assert steps.tokenizer.decode(ids[len(begin) : -1]) == answer


def test_a_prompt_weighs_less_than_its_summary(steps):
    trees = [steps.writing_tree(writing) for writing in steps.plan[0][1]]
    answers, full, total = Counter(), Counter(), 0.0
    for tree in trees:
        answers.update(tree.branches[0])
        total += len(tree.branches[0]) + base.PROMPT_WEIGHT * (len(tree.prefix) - 1)
    for pack in steps[0][1]:
        total -= pack.weights.sum().item()
        # A target of the trunk counts for all trees, where there are several.
        trunk = len(pack.leaves) > 1 and (pack.ends == len(pack.ids)).int().argmin()
        apart = pack.rows >= trunk
        full.update(pack.next_ids[apart & (pack.weights == 1)].tolist())
    assert full == answers
    assert abs(total) < 1e-2


def test_packs_are_the_same_for_any_number_of_workers(steps):
    alone = [steps[i] for i in range(len(steps))]
    shared = list(DataLoader(steps, batch_size=None, num_workers=2))
    assert len(alone) == len(shared) > 2
    for one, other in zip(alone, shared, strict=True):
        for a, b in zip(one, other, strict=True):
            assert [pack.ids.tolist() for pack in a] == [pack.ids.tolist() for pack in b]


# ---- The folder


def test_the_same_seed_makes_the_same_weights_and_another_others(data, made, tmp_path):
    weights = (made[0] / WEIGHTS).read_bytes()
    assert (make(data, tmp_path / "same") / WEIGHTS).read_bytes() == weights
    assert (make(data, tmp_path / "other", seed=4) / WEIGHTS).read_bytes() != weights


def test_base_json_counts_what_was_packed_and_it_learned(made, data):
    folder, trees = made
    record, model = read_json(folder / "base.json"), load_model(folder, CPU, torch.float32)
    yes, no = trsr.answer_ids(Plain(Tokenizer(folder, 480)).encode, DOMAINS["products"])
    asked, written = ([tree for tree, last in trees if last == kind] for kind in (True, False))
    ends = Counter(branch[-1] for tree in asked for branch in tree.branches)
    assert record["answers"] == {"Yes": ends[yes], "No": ends[no]}
    assert ends[no] == 4 * ends[yes] > 0
    examples = record["examples"]
    assert sum(examples[kind] for kind in base.QUESTIONS) == len(asked)
    assert examples["block"] + examples["merge"] + examples["update"] == len(written) > 0
    for name, some in (("questions", asked), ("writings", written)):
        apart = sum(tree.size for tree in some)  # without what the trees of a pack have in common
        assert 0.8 * apart < record["tokens"][name] <= apart
    assert 0.7 < sum(record["tokens"].values()) / record["settings"]["tokens"] < 1.2
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert (record["users"], record["positives"]) == (16, len(Corpus.load(str(data)).positions()))
    assert model.config.eos_token_id == (2,)
    assert record["loss"]["questions"] < 1.0  # of ln 480 = 6.2 at first


def test_summarize_train_and_evaluate_run_on_it(data, made, tmp_path):
    common = {"data": data, "model": made[0], "run": tmp_path}
    run("summarize.py", **common, max_new_tokens=20)
    run("train.py", **common, epochs=1, lora_r=2, batch_size=8)
    run("evaluate.py", run=tmp_path)
    assert read_json(tmp_path / "results.json")["users"] == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_bf16(data, tmp_path):
    folder = make(data, tmp_path, gpu=True)
    record = read_json(folder / "base.json")
    dtype = read_json(folder / "config.json")["torch_dtype"]
    assert (record["device"], dtype) == ("cuda", "bfloat16")
    assert record["loss"]["questions"] < 1.0
    assert load_model(folder, CPU, torch.bfloat16).lm_head.weight.isfinite().all()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"vocabulary": 90000}, "--vocabulary 90000"),
        ({"negatives": 59}, "--negatives 59"),
        ({"data": "nowhere"}, "nowhere: no dataset"),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, setting, named):
    done = make(data, tmp_path / "model", **setting, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert named in done.stderr
