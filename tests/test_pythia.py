"""The scripts on a Pythia: the same chain as on a Llama, with the defaults that it needs."""

import pytest
import torch
from helpers import CPU, NEOX, losses, random_ids, read_lines, run, scores
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPTNeoXForCausalLM

import trsr
from files.jsonl import read_json
from models.chat import Plain
from models.hub import load_model
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset

ADAPTER = "adapter/adapter_model.safetensors"


def test_the_chain_from_summaries_to_the_table(tmp_path, data_folder, pythia_folder):
    common = {"data": data_folder, "model": pythia_folder, "run": tmp_path}
    run("summarize.py", **common, max_new_tokens=8)
    settings = {"run": tmp_path, "epochs": 2, "batch_size": 8, "lr": 0.01}
    run("train.py", **settings)
    done = run("evaluate.py", run=tmp_path)
    assert "trained (adapter)" in done.stdout
    targets = list(NEOX.attention)  # the default follows the model
    assert read_json(tmp_path / "adapter/adapter_config.json")["target_modules"] == targets
    assert read_json(tmp_path / "config.json")["train"]["lora_targets"] == targets
    assert len(load_file(tmp_path / ADAPTER)) == 2 * 2 * 2

    # The scores are those of the slow way: each candidate's prompt alone, the adapter in PEFT,
    # and transformers' model.
    domain, items, splits = load_dataset(data_folder, ("test",))
    base = GPTNeoXForCausalLM.from_pretrained(pythia_folder)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    form = Plain(Tokenizer(pythia_folder, 640))
    answers = list(trsr.answer_ids(form.encode, domain))
    lines = read_lines(tmp_path / "summaries.jsonl")
    summaries = {line["user"]: line["summary"] for line in lines}
    found = scores(tmp_path)
    assert len(found) == len(splits["test"]) == 4
    for record, example in zip(found, splits["test"], strict=True):
        shown = summaries[example.user], [items[i] for i in example.history[-3:]]
        texts = [items[i] for i in record["candidates"]]
        prompts = trsr.recommendation_prompts("hierarchical", domain, *shown, texts)
        for prompt, score in zip(prompts, record["scores"], strict=True):
            with torch.no_grad():
                logits = theirs(torch.tensor(form.encode([prompt]))).logits[0, -1, answers]
            assert score == pytest.approx(torch.softmax(logits, 0)[0].item(), abs=1e-4)

    refused = run("train.py", **settings, lora_targets="dense_h_to_4h", check=False)
    assert "lora_targets ['query_key_value', 'dense'] (now ['dense_h_to_4h'])" in refused.stderr


def test_targets_that_are_asked_for_and_bf16(tmp_path, data_folder, pythia_folder):
    common = {"data": data_folder, "model": pythia_folder, "paradigm": "recent-only"}
    common |= {"batch_size": 8, "dtype": "bf16"}
    lora, whole = tmp_path / "lora", tmp_path / "whole"
    targets = ("dense_h_to_4h", "dense_4h_to_h")
    run("train.py", **common, run=lora, epochs=1, lr=0.01, lora_targets=targets)
    kinds = [f"mlp.{target}.lora_{part}.weight" for target in targets for part in "AB"]
    names = {f"base_model.model.gpt_neox.layers.{i}.{kind}" for i in range(2) for kind in kinds}
    assert set(load_file(lora / ADAPTER)) == names
    run("train.py", **common, run=whole, epochs=2, lr=0.003, lora_r=0)  # under autocast
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    for folder in (lora, whole):
        run("evaluate.py", run=folder, split="val")
        assert read_json(folder / "results-val.json")["users"] == 4


@pytest.mark.parametrize(("rank", "shard"), [(8, "zero3"), (0, "zero2")])
def test_two_processes_train_the_same_model(tmp_path, data_folder, pythia_folder, rank, shard):
    common = {"data": data_folder, "model": pythia_folder, "paradigm": "recent-only"}
    common |= {"batch_size": 8, "lr": 0.01, "epochs": 1, "lora_dropout": 0}
    common |= {"lora_r": rank, "shard": shard}
    one, two = tmp_path / "one", tmp_path / "two"
    run("train.py", **common, run=one)
    run("train.py", **common, run=two, activation_checkpointing=True, processes=2)
    found, expected = ([loss for _, loss, _ in losses(folder)] for folder in (two, one))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(found) == 3
    if rank == 0:
        run("evaluate.py", run=two, split="val")
        reference = GPTNeoXForCausalLM.from_pretrained(two / "model").eval()
        model, base = (load_model(f, CPU, torch.float32) for f in (two / "model", pythia_folder))
        with torch.no_grad():
            ids = random_ids(2, 30)
            assert (model(ids) - reference(ids).logits).abs().max() < 1e-4
            assert (model(ids) - base(ids)).abs().max() > 1e-2
