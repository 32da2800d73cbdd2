"""evaluate.py as a command: scores against 21 separate prompts, and a table that says what the scores say."""

import gc
import itertools
import json
import multiprocessing
import random
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import run, write_model
from safetensors.torch import load_file, save_file

import evaluate
import trsr
from batches.stream import stream_packs, user_packs
from launch.processes import prefetch, run_script
from llama import load_model
from lora import load_adapter
from models.tokenizer import Tokenizer
from ops.packs import Tree
from prepare.dataset import load_dataset
from runfolder.scores import popularity_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_folder, model_folder):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(
        "summarize.py",
        "--data",
        data_folder,
        "--model",
        model_folder,
        "--run",
        folder,
        "--max-new-tokens",
        12,
    )
    run("train.py", "--run", folder, "--epochs", 2, "--batch-size", 8, "--lr", 0.01)
    run("evaluate.py", "--run", folder, "--k", 1, 3)
    return folder


def scores(folder, name="scores-test.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_scores_equal_separate_prompts(trained, data_folder, model_folder):
    domain, items, splits = load_dataset(data_folder, ("test",))
    model = load_model(model_folder, torch.device("cpu"), torch.float32)
    load_adapter(model, trained / "adapter")
    tokenizer = Tokenizer(model_folder, 640)
    yes, no = trsr.answer_ids(tokenizer.encode, domain)
    summaries = {
        json.loads(line)["user"]: json.loads(line)["summary"]
        for line in (trained / "summaries.jsonl").open()
    }
    records = scores(trained)
    assert [r["user"] for r in records] == [e.user for e in splits["test"]]
    for record, example in zip(records, splits["test"], strict=True):
        assert sorted(record["candidates"]) == sorted([example.positive, *example.negatives])
        recent = [items[i] for i in example.history[-3:]]
        for item, score in zip(record["candidates"], record["scores"], strict=True):
            summary = summaries[example.user]
            (prompt,) = trsr.recommendation_prompts(
                "hierarchical", domain, summary, recent, [items[item]]
            )
            with torch.no_grad():
                logits = model.eval()(torch.tensor(tokenizer.encode([prompt])))[0, -1]
            assert score == pytest.approx(torch.softmax(logits[[yes, no]], 0)[0].item(), abs=1e-4)
        of_positive = record["scores"][record["candidates"].index(example.positive)]
        assert record["rank"] == sum(s >= of_positive for s in record["scores"])


def test_the_table_follows_from_the_scores(trained):
    report = json.loads((trained / "results.json").read_text())
    ranks = [r["rank"] for r in scores(trained)]
    assert report["users"] == len(ranks) == 4
    assert list(report["table"]) == ["random", "popularity", "trained"]
    for name, values in trsr.metrics_at(ranks, [1, 3]).items():
        entry = report["table"]["trained"][name]
        assert entry["mean"] == pytest.approx(values.mean())
        assert entry["interval"][0] <= entry["mean"] <= entry["interval"][1]
    assert report["table"]["random"]["Recall@3"]["mean"] == pytest.approx(3 / 6)


def test_two_processes_give_the_same_result(trained):
    table, records = (trained / "results.json").read_text(), scores(trained)
    run("evaluate.py", "--run-dir", trained, "--k", 1, 3, processes=2)
    assert (trained / "results.json").read_text() == table
    for ours, theirs in zip(records, scores(trained), strict=True):
        assert ours["candidates"] == theirs["candidates"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_the_untrained_model_is_ranked_without_the_adapter(trained):
    done = run("evaluate.py", "--run", trained, "--untrained", "--split", "val", "--users", 2)
    assert "untrained" in done.stdout
    assert len(scores(trained, "scores-val-untrained.jsonl")) == 2
    run("evaluate.py", "--run", trained, "--split", "val", "--users", 2)
    assert (
        scores(trained, "scores-val.jsonl")[0]["scores"]
        != scores(trained, "scores-val-untrained.jsonl")[0]["scores"]
    )


def test_the_terminal_shows_the_table_and_where_it_is(trained):
    done = run("evaluate.py", "--run", trained, "--k", 3, 5)
    lines = done.stdout.splitlines()
    header = next(line for line in lines if "Recall@3" in line)
    assert header.split() == ["Recall@3", "Recall@5", "MRR@3", "MRR@5", "NDCG@3", "NDCG@5"]
    assert [
        line.split()[0] for line in lines if line.startswith(("random", "popular", "trained"))
    ] == [
        "random",
        "popularity",
        "trained",
    ]
    assert str(trained / "results.json") in lines[-1]
    run("evaluate.py", "--run", trained, "--k", 1, 3)


def test_popularity_ranks_by_counts_with_ties_in_random_order():
    examples = [trsr.Example(f"u{n}", [], "p", ["a", "b"]) for n in range(2000)]
    ranks = popularity_ranks(examples, trsr.Counter({"p": 2, "a": 3}), 0)
    assert set(ranks) == {2}
    ranks = popularity_ranks(examples, trsr.Counter({"p": 1, "a": 1}), 0)
    assert ranks.count(1) == pytest.approx(1000, abs=100)
    assert set(ranks) == {1, 2}


def test_what_evaluate_needs_is_named(tmp_path, trained, data_folder, model_folder):
    def message(*flags):
        done = run("evaluate.py", *flags, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "first run python train.py --run" in message("--run", tmp_path)
    write_model(tmp_path / "other", seed=9)
    (tmp_path / "other" / "tokenizer.model").write_bytes(
        (model_folder / "tokenizer.model").read_bytes()
    )
    assert "not the model that" in message("--run", trained, "--model", tmp_path / "other")
    assert "no dataset" in message("--run", trained, "--data", tmp_path / "nothing")


def test_scores_that_are_not_finite_are_refused(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run/adapter/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    (tmp_path / "run/results.json").unlink()
    done = run("evaluate.py", "--run", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "user 'test0': a score is not finite" in done.stderr
    assert not (tmp_path / "run/results.json").exists()


def test_a_model_that_says_the_same_of_all_is_no_better_than_chance(
    tmp_path, data_folder, model_folder
):
    shutil.copytree(model_folder, tmp_path / "constant")
    tensors = load_file(tmp_path / "constant/model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, tmp_path / "constant/model.safetensors")
    flags = ("--data", data_folder, "--model", tmp_path / "constant", "--run", tmp_path / "run")
    run("train.py", *flags, "--paradigm", "recent-only", "--epochs", 1)
    run("evaluate.py", "--run", tmp_path / "run", "--untrained", "--k", 1, 3)
    assert [line["rank"] for line in scores(tmp_path / "run", "scores-test-untrained.jsonl")] == [
        6
    ] * 4
    table = json.loads((tmp_path / "run/results-untrained.json").read_text())["table"]
    for name, entry in table["untrained"].items():
        assert entry["mean"] <= table["random"][name]["mean"]


def test_out_of_memory_is_one_line(trained, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(evaluate, "score_packs", full)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--run", str(trained)])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as end:
        run_script(evaluate.main)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert end.value.code == 2
    assert "evaluate: out of memory on the device; lower --pack-tokens" in capsys.readouterr().err


def test_smaller_packs_give_the_same_scores(trained):
    before = scores(trained)
    run("evaluate.py", "--run", trained, "--k", 1, 3, "--pack-tokens", 300)
    for ours, theirs in zip(before, scores(trained), strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)
    run("evaluate.py", "--run", trained, "--k", 1, 3)


def test_worker_processes_tokenize_the_same(trained, monkeypatch):
    before = (trained / "scores-test.jsonl").read_bytes()
    monkeypatch.setattr(evaluate, "host_workers", lambda device: 2)
    run("evaluate.py", "--run", trained, "--k", 1, 3)
    assert (trained / "scores-test.jsonl").read_bytes() == before


def test_a_worker_process_reports_bad_input_in_one_line(trained, monkeypatch):
    monkeypatch.setattr(evaluate, "host_workers", lambda device: 2)
    done = run("evaluate.py", "--run", trained, "--k", 1, check=False)
    assert done.returncode == 0
    monkeypatch.setattr(
        trsr.Recommender, "prompt_ids", lambda *_: (_ for _ in ()).throw(trsr.InputError("no room"))
    )
    done = run("evaluate.py", "--run", trained, "--k", 1, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(": no room")
    assert "Traceback" not in done.stderr


class Refusing:
    """A recommender that has no prompts for user 50."""

    budget = SimpleNamespace(trimmed=Counter())

    def prompt_ids(self, user, _items):
        if user == 50:
            raise trsr.InputError("no room")
        return [[1, 2, 3], [1, 2, 4]]


def test_an_error_ends_the_worker_processes_at_once_and_not_when_garbage_is_collected():
    gc.collect(), gc.disable()
    try:
        users, args = range(400), SimpleNamespace(workers=2, pack_tokens=64, pad_to=1)
        packs = user_packs(Refusing(), users, [[]] * 400, users, args, show=False)
        assert multiprocessing.active_children()
        with pytest.raises(trsr.InputError, match="no room"):
            list(prefetch(packs))
        del packs
        assert not multiprocessing.active_children()
        packs = user_packs(Refusing(), users, [[]] * 400, users, args, show=False)
        del packs  # as an error does that comes before the first one is asked for
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize("seed", range(12))
def test_packs_that_come_as_users_do_hold_every_prompt_once(seed):
    rng = random.Random(seed)
    room, n = rng.choice([64, 300, 2000]), rng.randrange(1, 300)
    begin = ids(rng, rng.randrange(20))
    trees = [
        Tree(begin + ids(rng, 40), [ids(rng, 15) for _ in range(rng.randrange(1, 9))])
        for _ in range(n)
    ]
    args, found, split = SimpleNamespace(pack_tokens=room, pad_to=rng.choice([1, room])), {}, []
    for pack in stream_packs(enumerate(trees), n, args):
        for (user, branch), row in pack.leaves.items():
            assert (user, branch) not in found
            path = pack.ids[: row + 1][pack.ends[: row + 1] > row]
            found[user, branch] = path.tolist()
        split += {user for user, _ in pack.leaves} if pack.shared_prefix else []
    assert found == {
        (u, b): t.prefix + end for u, t in enumerate(trees) for b, end in enumerate(t.branches)
    }
    assert len(list(itertools.groupby(split))) == len(
        set(split)
    )  # one tree's packs follow one another


def ids(rng, most):
    return [rng.randrange(3, 640) for _ in range(rng.randrange(1, most + 2))]


def test_a_process_without_users_has_no_packs():
    assert list(stream_packs(iter(()), 0, SimpleNamespace(pack_tokens=256, pad_to=256))) == []
