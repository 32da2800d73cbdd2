"""evaluate.py: scores against separate prompts, and a table that says what the scores say."""

import re
import shutil

import pytest
import torch
from helpers import CPU, last_logits, read_lines, run, scores, write_model
from safetensors.torch import load_file, save_file

import evaluate
import trsr
from batches import prompts
from files.jsonl import read_json
from llama import load_model
from lora import load_adapter
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_folder, model_folder):
    """A run from summaries to results."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run("summarize.py", data=data_folder, model=model_folder, run=folder, max_new_tokens=12)
    run("train.py", run=folder, epochs=2, batch_size=8, lr=0.01)
    run("evaluate.py", run=folder, k=[1, 3])
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


# ---- Scores


def test_scores_equal_separate_prompts(trained, data_folder, model_folder):
    domain, items, splits = load_dataset(data_folder, ("test",))
    model = load_model(model_folder, CPU, torch.float32)
    load_adapter(model, trained / "adapter")
    form = Plain(Tokenizer(model_folder, 640))
    answers = list(trsr.answer_ids(form.encode, domain))
    lines = read_lines(trained / "summaries.jsonl")
    summaries = {line["user"]: line["summary"] for line in lines}
    records = scores(trained)
    assert [r["user"] for r in records] == [e.user for e in splits["test"]]
    for record, example in zip(records, splits["test"], strict=True):
        assert sorted(record["candidates"]) == sorted([example.positive, *example.negatives])
        shown = summaries[example.user], [items[i] for i in example.history[-3:]]
        for item, score in zip(record["candidates"], record["scores"], strict=True):
            parts = "hierarchical", domain, *shown, [items[item]]
            (ids,) = form.encode(trsr.recommendation_prompts(*parts))
            logits = last_logits(model.eval(), ids)[answers]
            assert score == pytest.approx(torch.softmax(logits, 0)[0].item(), abs=1e-4)
        of_positive = record["scores"][record["candidates"].index(example.positive)]
        assert record["rank"] == sum(s >= of_positive for s in record["scores"])


def test_smaller_packs_give_the_same_scores(trained, copied):
    run("evaluate.py", run=copied, k=[1, 3], pack_tokens=300)
    for ours, theirs in zip(scores(copied), scores(trained), strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_two_processes_give_the_same_result(trained, copied):
    run("evaluate.py", run=copied, k=[1, 3], processes=2)
    assert (copied / "results.json").read_bytes() == (trained / "results.json").read_bytes()
    for ours, theirs in zip(scores(copied), scores(trained), strict=True):
        assert ours["candidates"] == theirs["candidates"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_worker_processes_tokenize_the_same(trained, copied, monkeypatch):
    monkeypatch.setattr(prompts, "host_workers", lambda device: 2)
    run("evaluate.py", run=copied, k=[1, 3])
    name = "scores-test.jsonl"
    assert (copied / name).read_bytes() == (trained / name).read_bytes()


def test_a_worker_process_reports_bad_input_in_one_line(copied, monkeypatch):
    def refuse(*_):
        raise trsr.InputError("no room")

    monkeypatch.setattr(prompts, "host_workers", lambda device: 2)
    done = run("evaluate.py", run=copied, k=1, check=False)
    assert done.returncode == 0
    monkeypatch.setattr(trsr.Recommender, "prompt_ids", refuse)
    done = run("evaluate.py", run=copied, k=1, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(": no room")
    assert "Traceback" not in done.stderr


def test_the_untrained_model_is_ranked_without_the_adapter(copied):
    done = run("evaluate.py", run=copied, untrained=True, split="val", users=2)
    assert "untrained" in done.stdout
    untrained = scores(copied, "scores-val-untrained-2-users.jsonl")
    assert len(untrained) == 2
    run("evaluate.py", run=copied, split="val", users=2)
    assert scores(copied, "scores-val-2-users.jsonl")[0]["scores"] != untrained[0]["scores"]


# ---- The table


def test_the_table_follows_from_the_scores(trained):
    results = read_json(trained / "results.json")
    ranks = [r["rank"] for r in scores(trained)]
    assert results["users"] == len(ranks) == 4
    assert list(results["table"]) == ["random", "popularity", "trained"]
    for name, values in trsr.metrics_at(ranks, [1, 3]).items():
        entry = results["table"]["trained"][name]
        assert entry["mean"] == pytest.approx(values.mean())
        assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
    assert results["table"]["random"]["Recall@3"]["mean"] == pytest.approx(3 / 6)


def test_the_terminal_shows_the_table_and_where_it_is(copied):
    lines = run("evaluate.py", run=copied, k=[3, 5]).stdout.splitlines()
    header = next(line for line in lines if "Recall@3" in line)
    assert header.split() == ["Recall@3", "Recall@5", "MRR@3", "MRR@5", "NDCG@3", "NDCG@5"]
    rows = [line for line in lines if line.startswith(("random", "popular", "trained"))]
    assert [line.split()[0] for line in rows] == ["random", "popularity", "trained"]
    assert str(copied / "results.json") in lines[-1]


def test_a_model_that_says_the_same_of_all_is_no_better_than_chance(
    tmp_path, data_folder, model_folder
):
    constant, folder = shutil.copytree(model_folder, tmp_path / "constant"), tmp_path / "run"
    tensors = load_file(constant / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, constant / "model.safetensors")
    train = {"data": data_folder, "model": constant, "paradigm": "recent-only", "epochs": 1}
    run("train.py", run=folder, **train)
    run("evaluate.py", run=folder, untrained=True, k=[1, 3])
    ranks = [line["rank"] for line in scores(folder, "scores-test-untrained.jsonl")]
    assert ranks == [6] * 4
    table = read_json(folder / "results-untrained.json")["table"]
    for name, entry in table["untrained"].items():
        assert entry["mean"] <= table["random"][name]["mean"]


# ---- What is refused


def test_what_evaluate_needs_is_named(tmp_path, trained, tokenizer_model):
    def message(**settings):
        done = run("evaluate.py", **settings, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "first run python train.py --run" in message(run=tmp_path)
    write_model(tmp_path / "other", seed=9, tokenizer=tokenizer_model)
    assert "not the model that" in message(run=trained, model=tmp_path / "other")
    assert "no dataset" in message(run=trained, data=tmp_path / "nothing")


def test_scores_that_are_not_finite_are_refused(copied):
    tensors = load_file(copied / ADAPTER)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, copied / ADAPTER)
    (copied / "results.json").unlink()
    done = run("evaluate.py", run=copied, check=False)
    assert done.returncode == 2
    assert re.search(r"user 'test\d': a score is not finite", done.stderr)
    assert not (copied / "results.json").exists()


def test_out_of_memory_is_one_line(trained, monkeypatch, capsys, run_script_here):
    def full(*_, **_options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(evaluate, "scored", full)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", str(trained)])
    assert run_script_here(evaluate.main) == 2
    assert "evaluate: out of memory on the device; lower --pack-tokens" in capsys.readouterr().err


def test_the_probability_of_both_answers_is_that_of_the_whole_vocabulary(
    trained, model_folder, data_folder
):
    domain, items, splits = load_dataset(data_folder, ("test",))
    model = load_model(model_folder, CPU, torch.float32)
    load_adapter(model, trained / "adapter")
    form, shares = Plain(Tokenizer(model_folder, 640)), []
    answers = list(trsr.answer_ids(form.encode, domain))
    summaries = {r["user"]: r["summary"] for r in read_lines(trained / "summaries.jsonl")}
    for example in splits["test"]:
        shown = summaries[example.user], [items[i] for i in example.history[-3:]]
        candidates = [items[i] for i in (example.positive, *example.negatives)]
        messages = trsr.recommendation_prompts("hierarchical", domain, *shown, candidates)
        for ids in form.encode(messages):
            shares.append(torch.softmax(last_logits(model.eval(), ids), 0)[answers].sum().item())
    found = read_json(trained / "results.json")["answer_mass"]
    assert found == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    assert 0 < found < 1
