"""state/origin.py: an adapter is scored with what it was trained on, or differences are told."""

import shutil

import pytest
from helpers import change_json, read_lines, run, write_dataset, write_lines, write_model

import trsr
from files.jsonl import read_json, write_json
from prepare import domains
from state.origin import ORIGIN


@pytest.fixture
def copied(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_what_an_adapter_was_trained_on_is_beside_it(trained_run):
    origin = read_json(trained_run / "adapter" / ORIGIN)
    trained = read_json(trained_run / "config.json")["train"]
    names = ("model", "fingerprint", "paradigm", "prompt")
    assert origin == {name: trained[name] for name in names}
    assert "[Next Item]\nCANDIDATE" in origin["prompt"]


def test_an_adapter_of_another_model_is_refused(copied):
    path = copied / "adapter" / ORIGIN
    write_json(path, read_json(path) | {"fingerprint": "0" * 32, "model": "another/model"})
    done = run("evaluate.py", run=copied, check=False)
    assert done.returncode == 2
    assert "trained on another model (another/model)" in done.stderr
    assert not (copied / "results.json").exists()


def test_an_adapter_of_another_rank_base_or_targets_is_told_in_one_line(copied, tmp_path):
    """As if a user had put another adapter in the run's folder."""
    train = {"data": tmp_path / "data", "paradigm": "recent-only", "batch_size": 2, "epochs": 1}
    write_dataset(tmp_path / "data")
    model = read_json(copied / "config.json")["train"]["model"]
    other = ("--lora-r", 3, "--lora-targets", "q_proj")
    run("train.py", *other, run=tmp_path / "other", model=model, **train)
    shutil.rmtree(copied / "adapter")
    shutil.copytree(tmp_path / "other/adapter", copied / "adapter")
    change_json(copied / "adapter/adapter_config.json", base_model_name_or_path="someone/base")
    (line,) = [
        line
        for line in run("evaluate.py", run=copied).stdout.splitlines()
        if line.startswith("adapter not as the run's settings say")
    ]
    assert "lora_r 3 (the run: 8)" in line
    assert "lora_targets ['q_proj'] (the run: [" in line
    assert "base model someone/base" in line


def test_other_words_in_the_prompt_are_refused_after_training(copied, monkeypatch):
    words = trsr.recommendation_prompts

    def reworded(*arguments):
        return [prompt.replace("Decide", "Say") for prompt in words(*arguments)]

    monkeypatch.setattr(trsr, "recommendation_prompts", reworded)
    done = run("evaluate.py", run=copied, check=False)
    assert done.returncode == 2
    assert "the prompt has other words than in training" in done.stderr
    done = run("train.py", run=copied, check=False)
    assert done.returncode == 2
    assert "the prompt has other words now" in done.stderr


def test_the_words_are_in_the_results(copied):
    run("evaluate.py", run=copied)
    prompt = read_json(copied / "results.json")["prompt"]
    assert prompt == domains.wording("recent-only", domains.DOMAINS["products"])["recommend"]


def test_summaries_know_the_words_of_their_prompts(
    tmp_path, data_folder, model_folder, monkeypatch
):
    common = {"data": data_folder, "model": model_folder, "run": tmp_path, "max_new_tokens": 4}
    run("summarize.py", **common)
    before = read_lines(tmp_path / "summaries.jsonl")
    build = trsr.build_prompt
    monkeypatch.setattr(trsr, "build_prompt", lambda *parts: build(*parts) + " ")
    done = run("summarize.py", **common, check=False)
    assert done.returncode == 2
    assert "the prompts have other words now" in done.stderr
    assert read_lines(tmp_path / "summaries.jsonl") == before


def test_an_untouched_model_is_recognized(copied, model_folder, tmp_path):
    write_model(tmp_path / "other", seed=5, tokenizer=model_folder / "tokenizer.model")
    done = run("evaluate.py", run=copied, model=tmp_path / "other", check=False)
    assert done.returncode == 2
    assert "not the model that" in done.stderr


def test_a_dataset_that_was_prepared_again_is_not_evaluated_with_the_run(copied, tmp_path):
    config = read_json(copied / "config.json")
    data = shutil.copytree(config["train"]["data"], tmp_path / "data")
    config["train"]["data"] = str(data)
    write_json(copied / "config.json", config)
    for path in copied.glob("results*.json"):
        path.unlink()
    run("evaluate.py", run=copied)
    for path in copied.glob("results*.json"):
        path.unlink()

    # A user less to train on, who is in another split now, perhaps.
    lines = read_lines(data / "train.jsonl")
    write_lines(data / "train.jsonl", lines[1:])
    done = run("evaluate.py", run=copied, check=False)
    assert done.returncode == 2
    assert "the training users are not those that" in done.stderr
    write_lines(data / "train.jsonl", lines)

    # The text of an item that no training user has is nobody's concern, that of another one is.
    items = read_lines(data / "items.jsonl")
    users = read_lines(data / "train.jsonl")
    learned = {item for user in users for item in (*user["history"], user["positive"])}
    changed = [next(i for i in items if (i["id"] in learned) == known) for known in (False, True)]
    for item, code in zip(changed, (0, 2), strict=True):
        item["attributes"]["Title"] += " again"
        write_lines(data / "items.jsonl", items)
        done = run("evaluate.py", run=copied, check=False)
        assert done.returncode == code, done.stderr
        for path in copied.glob("results*.json"):
            path.unlink()
    assert "the texts of their items are not those that" in done.stderr

    write_lines(data / "train.jsonl", lines[1:])
    del config["train"]["learned"], config["train"]["learned_texts"]  # as in earlier runs
    write_json(copied / "config.json", config)
    run("evaluate.py", run=copied)
