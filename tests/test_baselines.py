"""The baselines: what each model may and may not depend on, that each learns, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import run, write_dataset

import trsr
from baselines import __main__ as command
from baselines.encode import by_llama
from baselines.models import MODELS
from files.jsonl import read_jsonl
from llama import load_model
from models.tokenizer import Tokenizer
from prepare import to_recbole
from prepare.dataset import load_dataset

CPU = torch.device("cpu")
EACH = pytest.mark.parametrize("name", MODELS)


def made(name, n_items=40, width=24, seed=0):
    torch.manual_seed(seed)
    return MODELS[name](torch.randn(n_items, width), size=16, dropout=0.1).eval()


@EACH
def test_scores_depend_on_nothing_but_the_user_and_the_candidate(name):
    model, rng = made(name), np.random.default_rng(0)
    histories = [rng.integers(40, size=n).tolist() for n in (1, 3, 12, 7)]
    candidates = torch.from_numpy(rng.integers(40, size=(4, 5)))
    padded = torch.tensor([h + [-1] * (15 - len(h)) for h in histories])
    with torch.no_grad():
        together = model.score(padded, candidates)
        for u, history in enumerate(
            histories
        ):  # alone, without padding, the candidates in another order
            alone = model.score(torch.tensor([history]), candidates[u : u + 1].flip(1))
            assert (alone[0].flip(0) - together[u]).abs().max() < 1e-5
            one = model.score(torch.tensor([history]), candidates[u : u + 1, 2:3])
            assert (one[0, 0] - together[u, 2]).abs() < 1e-5


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ncf", "din"}))
def test_sequential_models_see_the_order(name):
    model, history = made(name), torch.tensor([[3, 9, 27, 14, 5]])
    with torch.no_grad():
        scores = [model.score(h, torch.tensor([[1, 2]])) for h in (history, history.flip(1))]
    assert (scores[0] - scores[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["ncf", "din"])
def test_the_others_do_not(name):
    model, history = made(name), torch.tensor([[3, 9, 27, 14, 5]])
    with torch.no_grad():
        scores = [model.score(h, torch.tensor([[1, 2]])) for h in (history, history.flip(1))]
    assert (scores[0] - scores[1]).abs().max() < 1e-5


@EACH
def test_each_learns_which_kind_of_item_a_user_takes(name):
    rng = np.random.default_rng(1)
    kinds = rng.integers(4, size=80)  # the target is of the kind of the last items
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.eye(4)[kinds] + 0.1 * torch.randn(80, 4), dim=-1)
    model = MODELS[name](texts, size=16, dropout=0.0)
    own = rng.integers(4, size=300)
    of_kind = [np.flatnonzero(kinds == k) for k in range(4)]
    histories = torch.tensor([rng.choice(of_kind[k], 6).tolist() for k in own])
    candidates = torch.tensor([[rng.choice(of_kind[(k + j) % 4]) for j in range(4)] for k in own])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            model.score(histories[:200], candidates[:200]), torch.zeros(200).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval().score(histories[200:], candidates[200:]).argmax(1) == 0
    assert right.float().mean() > 0.9


def test_dien_s_update_by_hand():
    model = made("dien")
    h, c = torch.randn(1, 3, 16), torch.randn(1, 1, 16)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        states, _ = model.interests(h)
        weights = [float(model.attend(states)[0, t] @ c[0, 0]) for t in range(3)]
        total = sum(math.exp(w) for w in weights)
        state = torch.zeros(16)
        for t in range(3):
            new, old = model.inner(states[0, t]).chunk(3), model.outer(state).chunk(3)
            gate = torch.sigmoid(new[1] + old[1]) * math.exp(weights[t]) / total
            state = (1 - gate) * state + gate * torch.tanh(
                new[2] + torch.sigmoid(new[0] + old[0]) * old[2]
            )
        expected = model.output(torch.cat((state, c[0, 0], state * c[0, 0])))
        assert (model(h, mask, c)[0, 0] - expected[0]).abs() < 1e-5
    assert model.auxiliary_loss(torch.cat((h, -h)), mask.repeat(2, 1)) > 0


def test_drawn_negatives_are_new_and_never_the_target_or_of_the_history(tmp_path):
    _, items, splits = load_dataset(write_dataset(tmp_path), ("train",))
    number = {name: i for i, name in enumerate(items)}
    users = command.Users(
        splits["train"], number, [[e.positive, *e.negatives] for e in splits["train"]], 200
    )
    first, second = (
        command.draw_negatives(users, len(items), 20, np.random.default_rng(s)) for s in (0, 1)
    )
    assert not torch.equal(first, second)
    for row, example in zip(first.tolist(), splits["train"], strict=True):
        assert not {number[i] for i in [*example.history, example.positive]} & set(row)


def test_with_every_position_each_item_is_a_target_after_those_before_it(
    finished, model_folder, tmp_path, capsys, monkeypatch
):
    example = trsr.Example("u", ["a", "b", "a", "c"], "d", ["n"])
    made = command.every_position([example, trsr.Example("v", ["a"], "b", ["m"])])
    assert [(e.user, e.history, e.positive, e.negatives) for e in made] == [
        ("u", ["a"], "b", ["n"]),
        ("u", ["a", "b", "a"], "c", ["n"]),
        ("u", ["a", "b", "a", "c"], "d", ["n"]),
        ("v", ["a"], "b", ["m"]),
    ]
    _, _, splits = load_dataset(finished / "data", ("train",))
    flags = [
        "--data",
        str(finished / "data"),
        "--run",
        str(tmp_path),
        "--encoder",
        f"llama:{model_folder}",
    ]
    flags += ["--epochs", "1", "--size", "8", "--models", "ncf", "--every-position"]
    monkeypatch.setattr("sys.argv", ["baselines", *flags])
    command.main()
    assert (
        f"learns  {sum(len(e.history) for e in splits['train'])} targets" in capsys.readouterr().out
    )
    last, every = (
        json.loads((r / "baselines" / "results.json").read_text())
        for r in (finished / "run", tmp_path)
    )
    assert every["table"]["popularity"] == last["table"]["popularity"]


def test_texts_are_the_mean_of_the_llama_s_states(model_folder):
    texts = ["Title: red lamp", "Title: a very long blue table with many words in it", "x"]
    found = by_llama(model_folder, texts, CPU)
    model = load_model(model_folder, CPU, torch.float32)
    for row, ids in zip(found, Tokenizer(model_folder, 640).encode(texts), strict=True):
        with torch.no_grad():
            mean = model.model(torch.tensor([ids]), None, None, None)[0].mean(0)
        assert (row - mean / mean.norm()).abs().max() < 1e-5


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("baselines")
    write_dataset(folder / "data")
    flags = [
        "--data",
        str(folder / "data"),
        "--run",
        str(folder / "run"),
        "--encoder",
        f"llama:{model_folder}",
    ]
    flags += ["--epochs", "2", "--size", "8", "--seeds", "0", "1"]
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("sys.argv", ["baselines", *flags])
    command.main()
    monkeypatch.undo()
    return folder


def test_the_command_writes_scores_and_one_table(finished):
    table = json.loads((finished / "run" / "baselines" / "results.json").read_text())["table"]
    assert list(table) == ["random", "popularity", *MODELS]
    _, _, splits = load_dataset(finished / "data", ("test",))
    for name in MODELS:
        recalls = []
        for seed in (0, 1):
            lines = [
                r
                for _, r in read_jsonl(
                    finished / "run" / "baselines" / f"{name}-{seed}" / "scores-test.jsonl", {}
                )
            ]
            assert [r["candidates"] for r in lines] == [
                trsr.shuffled_candidates(e) for e in splits["test"]
            ]
            ranks = [
                trsr.rank_of_positive(r["scores"], r["candidates"].index(e.positive))
                for r, e in zip(lines, splits["test"], strict=True)
            ]
            recalls.append(np.mean([rank <= 3 for rank in ranks]))
        assert table[name]["Recall@3"]["mean"] == pytest.approx(np.mean(recalls))


def test_scores_of_another_system_get_the_same_table(finished):
    own = finished / "run" / "baselines" / "sasrec-0"
    flags = ("--data", finished / "data", "--run", finished / "other", "--k", 3, 5, 10)
    run("evaluate.py", *flags, "--scores", own / "scores-test.jsonl")
    found = json.loads((finished / "other" / "results-scores-test.json").read_text())["table"]
    expected = json.loads((own / "results.json").read_text())["table"]
    assert {m: v["mean"] for m, v in found["scores-test"].items()} == {
        m: v["mean"] for m, v in expected.items()
    }
    lines = [r for _, r in read_jsonl(own / "scores-test.jsonl", {})]
    for change, message in (
        (lambda r: r.pop(), "is missing"),
        (lambda r: r.append(r[0]), "is there twice"),
        (lambda r: r[1]["scores"].pop(), "a number for each candidate"),
        (lambda r: r[1]["scores"].__setitem__(0, float("nan")), "no finite number"),
        (lambda r: r[1]["candidates"].__setitem__(0, "i59x"), "field 'candidates'"),
    ):
        changed = json.loads(json.dumps(lines))
        change(changed)
        (finished / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
        done = run("evaluate.py", *flags, "--scores", finished / "bad.jsonl", check=False)
        assert done.returncode == 2
        assert message in done.stderr


def test_the_dataset_as_recbole_s_files(finished, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["x", "--data", str(finished / "data"), "--out", str(finished / "rec")]
    )
    to_recbole.main()
    _, items, splits = load_dataset(finished / "data", ("train", "val", "test"))
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        head, *lines = (finished / "rec" / f"rec.{name}.inter").read_text().splitlines()
        assert head == "user_id:token\titem_id_list:token_seq\titem_id:token"
        assert lines == [f"{e.user}\t{' '.join(e.history)}\t{e.positive}" for e in splits[split]]
    assert (finished / "rec" / "rec.item").read_text().splitlines()[1:] == [
        f"{i}\t{t}" for i, t in items.items()
    ]
    lines = [r for _, r in read_jsonl(finished / "rec" / "rec.candidates.jsonl", {})]
    assert [r["candidates"] for r in lines if r["split"] == "test"] == [
        trsr.shuffled_candidates(e) for e in splits["test"]
    ]


@pytest.mark.parametrize("encoder", ["llama:/nowhere/at-all", "/nowhere/at-all"])
def test_an_encoder_that_is_nowhere_is_named(finished, monkeypatch, encoder):
    flags = ["--data", str(finished / "data"), "--run", str(finished / "x"), "--encoder", encoder]
    monkeypatch.setattr("sys.argv", ["baselines", *flags])
    with pytest.raises(ValueError, match="/nowhere/at-all"):
        command.main()
