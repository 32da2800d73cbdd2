"""batches/catalogue.py: all items ranked as if each prompt were alone, however it is packed."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CPU, last_logits, run, scores, write_dataset

import trsr
from batches.candidates import ALL, with_candidates
from batches.catalogue import CUT, Beginnings, CatalogueRanking, Tails, split_packs
from batches.prompts import Batching
from batches.stream import own_packs
from evaluate import score_packs, score_users
from files.jsonl import read_json
from llama import load_model
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset


@pytest.fixture
def copied(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def recommender_of(data_folder, model_folder, tokens=1023, paradigm="recent-only"):
    """The recommender of a dataset, its test users, and their examples with all other items."""
    domain, items, splits = load_dataset(data_folder, ("test",))
    form = Plain(Tokenizer(model_folder, 640))
    budget = trsr.Budget(tokens, form.encode, Counter())
    made = trsr.Recommender(paradigm, domain, items, {}, 3, budget)
    return made, splits["test"], with_candidates(ALL, splits["test"], items)


def alone(model, recommender, example):
    """Logits of Yes and No of each item that the user has not had, each prompt by itself."""
    answers = list(trsr.answer_ids(recommender.budget.encode, recommender.domain))
    names = [item for item in recommender.items if item not in example.history]
    found = {}
    for name in names:
        recent = [recommender.items[item] for item in example.history[-3:]]
        parts = recommender.paradigm, recommender.domain, "", recent, [recommender.items[name]]
        (ids,) = recommender.budget.encode(trsr.recommendation_prompts(*parts))
        found[name] = last_logits(model, ids)[answers].tolist()
    return found


# ---- Exact


@pytest.mark.parametrize(
    "batching", [Batching(300, 1, 0), Batching(4096, 1, 0), Batching(256, 256, 0)]
)
def test_every_item_has_the_logits_of_its_own_prompt(batching, data_folder, model_folder):
    recommender, shown, ranked = recommender_of(data_folder, model_folder)
    model = load_model(model_folder, CPU, torch.float32)
    answers = trsr.answer_ids(recommender.budget.encode, recommender.domain)
    ranking = CatalogueRanking.among(recommender, shown, ranked)
    packs = list(own_packs(ranking, batching, show=False))
    assert any(pack.shared_prefix for pack in packs) == (batching.pack_tokens < 4096)
    found = score_packs(model, packs, answers)
    users, _ = score_users(model, iter(packs), answers, ranking)
    for u, example in enumerate(shown):
        expected = alone(model, recommender, example)
        names = ranking.candidates[u]
        assert set(names) == set(expected)
        for c, name in enumerate(names):
            assert found[u, c] == pytest.approx(expected[name], abs=1e-4)
        margins = {name: yes - no for name, (yes, no) in expected.items()}
        least = margins[example.positive]
        assert users[u].rank == sum(margin >= least - 1e-6 for margin in margins.values())
        listed = [margins[name] for name in users[u].candidates]
        assert listed == pytest.approx(sorted(margins.values(), reverse=True), abs=1e-4)
        scores_by_text = {}
        for name, score in zip(users[u].candidates, users[u].scores, strict=True):
            assert scores_by_text.setdefault(recommender.items[name], score) == score
        assert len(scores_by_text) < len(names)  # some items have the same text, and tie
        assert users[u].number == len(names)


def test_on_gpus_all_packs_have_one_shape_and_padding_changes_nothing(tiny):
    rng = np.random.default_rng(0)
    tails = [rng.integers(3, 600, rng.integers(1, 9)) for _ in range(20)]
    scored = []
    for batching in (Batching(40, 1, 0), Batching(40, 40, 0)):
        packs = [
            pack
            for user, n in enumerate((30, 33))
            for pack in split_packs(user, list(range(5, 5 + n)), tails, batching, 100)
        ]
        scored.append(score_packs(tiny, packs, [17, 400]))
        if batching.pad_to > 1:
            assert {(len(pack.ids), pack.shared_prefix) for pack in packs} == {(552, 512)}
    assert scored[0].keys() == scored[1].keys()
    for key, found in scored[0].items():
        assert found == pytest.approx(scored[1][key], abs=1e-4)


def test_a_tokenizer_that_joins_across_the_boundary_is_noticed(data_folder, model_folder):
    recommender, shown, ranked = recommender_of(data_folder, model_folder)
    right = CatalogueRanking.among(recommender, shown, ranked)
    wrong = Tails([ids[::-1].copy() for ids in right.tails.ids], right.tails.places)
    for user in range(len(shown)):
        (good, _), (whole, _) = (
            Beginnings(replace(right, tails=tails), [user])[0] for tails in (right.tails, wrong)
        )
        assert not good.own
        names = right.candidates[user]
        assert len(whole.own) == len(names)
        both = [
            [made.prefix + tail.tolist() for tail in made.tails(right.tails, names)]
            for made in (good, whole)
        ]
        assert both[0] == both[1]


def test_over_all_users_every_item_is_checked(data_folder, model_folder):
    recommender, shown, ranked = recommender_of(data_folder, model_folder)
    ranking = CatalogueRanking.among(recommender, shown, ranked)
    users = range(len(shown))
    for wrong in range(len(ranking.tails.ids)):
        ids = [np.append(t, 5) if i == wrong else t for i, t in enumerate(ranking.tails.ids)]
        tails = Tails(ids, ranking.tails.places)
        made = Beginnings(replace(ranking, tails=tails), users)
        assert any(made[user][0].own for user in users)


# ---- What is trimmed


def test_the_beginning_does_not_depend_on_how_many_are_ranked(tmp_path, model_folder):
    data = write_dataset(tmp_path / "data")
    lines = (data / "items.jsonl").read_text().splitlines()
    long = lines[59].replace('"Title": "', '"Title": "' + "much longer than all others " * 12)
    (data / "items.jsonl").write_text("\n".join([*lines[:59], long]) + "\n")
    recommender, shown, ranked = recommender_of(data, model_folder, tokens=230)
    ranking = CatalogueRanking.among(recommender, shown, ranked)
    cut = 0
    for user, example in enumerate(shown):
        if "i59" in [*example.history, example.positive, *example.negatives]:
            continue
        own = recommender.prompt_ids(example, [example.positive, *example.negatives])
        made, trimmed = Beginnings(ranking, [user])[0]
        names = ranking.candidates[user]
        whole = [made.prefix + tail.tolist() for tail in made.tails(ranking.tails, names)]
        assert whole[0] == own[0]
        (place,) = made.own
        assert names[place] == "i59"
        assert trimmed == {CUT: 1}
        assert recommender.budget.tokens - 8 <= len(whole[place]) <= recommender.budget.tokens
        cut += 1
    assert cut


# ---- The command


def test_evaluate_ranks_all_items(copied, data_folder):
    before = (copied / "results.json").read_bytes() if (copied / "results.json").exists() else None
    out = run("evaluate.py", run=copied, candidates="all", k=[1, 10], csv=True).stdout
    _, items, splits = load_dataset(data_folder, ("test",))
    found = scores(copied, "scores-test-all.jsonl")
    for line, example in zip(found, splits["test"], strict=True):
        assert line["ranked"] == len(items) - len(example.history)
        assert set(line["candidates"]) == set(items) - set(example.history)
        assert line["scores"] == sorted(line["scores"], reverse=True)
        assert line["candidates"][line["rank"] - 1] == example.positive
        assert line["score"] == line["scores"][line["rank"] - 1]
    results = read_json(copied / "results-all.json")
    assert results["candidates"] == "all"
    mean = sum(len(items) - len(e.history) for e in splits["test"]) / len(splits["test"])
    assert results["mean_candidates"] == pytest.approx(mean)
    chance = [1 / (len(items) - len(e.history)) for e in splits["test"]]
    assert results["table"]["random"]["Recall@1"]["mean"] == pytest.approx(np.mean(chance))
    assert f"{mean:.10g} candidates each" in out
    now = (copied / "results.json").read_bytes() if (copied / "results.json").exists() else None
    assert before == now
    assert (copied / "results-all.csv").is_file()
    assert (copied / "scores-test-all.csv").is_file()


def test_the_own_candidates_have_the_scores_that_they_have_without_the_others(copied):
    run("evaluate.py", run=copied, pack_tokens=300)
    run("evaluate.py", run=copied, candidates="all", pack_tokens=300)
    for own, line in zip(scores(copied), scores(copied, "scores-test-all.jsonl"), strict=True):
        among = dict(zip(line["candidates"], line["scores"], strict=True))
        for item, score in zip(own["candidates"], own["scores"], strict=True):
            assert among[item] == pytest.approx(score, abs=1e-6)


def test_two_processes_rank_the_same(copied):
    run("evaluate.py", run=copied, candidates="all", pack_tokens=300)
    alone = (copied / "results-all.json").read_bytes()
    lines = scores(copied, "scores-test-all.jsonl")
    run("evaluate.py", run=copied, candidates="all", pack_tokens=300, processes=2)
    assert (copied / "results-all.json").read_bytes() == alone
    for ours, theirs in zip(scores(copied, "scores-test-all.jsonl"), lines, strict=True):
        assert ours["candidates"] == theirs["candidates"]
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-6)


def test_drawn_candidates_and_those_of_a_file_have_files_of_their_own(copied, tmp_path):
    run("evaluate.py", run=copied, candidates=7)
    assert {line["ranked"] for line in scores(copied, "scores-test-7-drawn.jsonl")} == {8}
    (tmp_path / "shelf.txt").write_text("i1\ni2\ni3\n")
    run("evaluate.py", run=copied, candidates=tmp_path / "shelf.txt")
    for line in scores(copied, "scores-test-candidates-shelf.jsonl"):
        assert set(line["candidates"]) <= {"i1", "i2", "i3", line["positive"]}
    done = run("evaluate.py", run=copied, candidates=99, check=False)
    assert done.returncode == 2
    assert "choose all" in done.stderr.splitlines()[-1]
    done = run("evaluate.py", run=copied, candidates="nothing.txt", check=False)
    assert "expected all, a number or a file, not 'nothing.txt'" in done.stderr
