"""train.py in one process: a step against separate examples, what it keeps and what it refuses."""

import re
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    fresh_adapter,
    losses,
    own_lines,
    read_lines,
    run,
    same_losses,
    validations,
    write_dataset,
    write_lines,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import train
import trsr
from batches.positions import ALL, Targets, positions
from llama import load_model
from lora import adapter_tensors, load_adapter
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset

ADAPTER = "adapter/adapter_model.safetensors"


# ---- A step


def separate_examples(model_folder, data_folder, paradigm="recent-only", targets=1):
    """Return the training examples' token ids, apart, the slow way."""
    domain, items, splits = load_dataset(data_folder, ("train",))
    form = Plain(Tokenizer(model_folder, 640))
    budget = trsr.Budget(1023, form.encode, Counter())
    recommender = trsr.Recommender(paradigm, domain, items, {}, 3, budget)
    answers = trsr.answer_ids(form.encode, domain)
    found = []
    examples = [
        past
        for example in splits["train"]
        for _, past in positions(example, list(items), Targets(targets))
    ]
    for example in examples:
        for i, item in enumerate([example.positive, *example.negatives]):
            (ids,) = recommender.prompt_ids(example, [item])
            found.append([*ids, answers[min(i, 1)]])
    return found


@pytest.mark.parametrize("loss", ["prompt", "answer"])
@pytest.mark.parametrize(
    ("paradigm", "targets", "batch_size"),
    [("recent-only", "last", 24), ("recent-only", "3", 72), ("whole-history", "all", 999)],
)
def test_a_step_equals_separate_examples(
    tmp_path, data_folder, model_folder, fit, loss, paradigm, targets, batch_size
):
    step = {"epochs": 1, "lora_dropout": 0, "loss": loss, "batch_size": batch_size}
    fit(tmp_path, **step, paradigm=paradigm, targets=targets)
    model = fresh_adapter(model_folder)
    total, count = 0.0, 0
    most = {"last": 1, "3": 3, "all": ALL}[targets]
    for ids in separate_examples(model_folder, data_folder, paradigm, most):
        first = len(ids) - 2 if loss == "answer" else 0
        logits = model(torch.tensor([ids]))[0, first:-1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[first + 1 :]), reduction="sum")
        count += len(ids) - 1 - first
    (total / count).backward()
    parameters = adapter_tensors(model).values()
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    ((_, found, found_norm),) = losses(tmp_path)
    assert count == 24 or loss == "prompt" or targets != "last"
    assert abs(found - (total / count).item()) < 1e-5
    assert abs(found_norm - norm.item()) < 1e-5

    # AdamW's first step from the oracle's gradients gives the adapter that was saved.
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=5e-4).step()
    saved = load_file(tmp_path / ADAPTER)
    for name, parameter in adapter_tensors(model).items():
        if "lora_B" in name:  # A has no gradient in the first step, since B is zero
            moved = (parameter - saved["base_model.model." + name]).abs()
            # Adam's sign is noise where the gradient is near zero.
            assert (moved < 1e-5).float().mean() > 0.97, name


def test_activation_checkpointing_changes_nothing(tmp_path, fit):
    fit(tmp_path / "kept", epochs=1)  # with dropout
    fit(tmp_path / "again", epochs=1, activation_checkpointing=True)
    same_losses(tmp_path / "kept", tmp_path / "again", 1e-6, 1e-5)


def test_bf16_trains_close_to_fp32(tmp_path, alone, fit):
    fit(tmp_path, epochs=3, lora_dropout=0, dtype="bf16")
    for (_, loss, _), (_, expected, _) in zip(losses(tmp_path), losses(alone), strict=True):
        assert 0 < abs(loss - expected) < 0.05


def test_the_adapter_of_a_run_loads_in_peft(alone, model_folder):
    base = LlamaForCausalLM.from_pretrained(model_folder)
    theirs = PeftModel.from_pretrained(base, alone / "adapter").eval()
    model = load_model(model_folder, CPU, torch.float32)
    load_adapter(model, alone / "adapter")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (model.eval()(ids) - theirs(ids).logits).abs().max() < 1e-5


def test_the_best_epoch_is_the_one_kept(tmp_path, fit):
    fit(tmp_path / "all", epochs=4, k=[1, 2])
    recalls = [sum(recall.values()) for recall in validations(tmp_path / "all")]
    best = recalls.index(max(recalls))
    fit(tmp_path / "until-best", epochs=best + 1, k=[1, 2])
    kept, expected = ((tmp_path / f / ADAPTER).read_bytes() for f in ("all", "until-best"))
    assert kept == expected


# ---- Full fine-tuning


def test_full_fine_tuning_does_not_write_over_the_model_it_starts_from(tmp_path, model_folder, fit):
    shutil.copytree(model_folder, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    done = fit(tmp_path, model=tmp_path / "model", epochs=1, lora_r=0, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the trained model would replace it" in done.stderr
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


# ---- Settings and input


def test_other_settings_in_the_same_run_are_refused(alone, fit):
    done = fit(alone, epochs=3, lora_dropout=0, seed=1, check=False)
    assert done.returncode == 2
    assert "seed 0 (now 1)" in done.stderr


def test_a_dataset_that_changed_under_the_same_name_is_refused(tmp_path, fit):
    data, folder = write_dataset(tmp_path / "data"), tmp_path / "run"
    fit(folder, data=data, epochs=1)
    before = (folder / ADAPTER).read_bytes()
    first, *rest = read_lines(data / "train.jsonl")
    write_lines(data / "train.jsonl", [*rest, first])  # the same users in another order
    done = fit(folder, data=data, epochs=1, check=False)
    assert done.returncode == 2
    assert "the dataset's texts or users are other ones now; use what it was" in done.stderr
    shutil.rmtree(folder / "checkpoint")  # the adapter alone is reason enough
    assert fit(folder, data=data, epochs=1, lora_alpha=4, check=False).returncode == 2
    assert (folder / ADAPTER).read_bytes() == before


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, fit):
    done = fit(tmp_path, lr=1e30, epochs=3, check=False)
    assert done.returncode == 2
    assert "step 2: loss nan" in done.stderr or "step 2: loss inf" in done.stderr
    assert "train" in done.stderr.split("users: ")[1]
    assert [step for step, _, _ in losses(tmp_path)] == [1]


def test_out_of_memory_names_the_batch_the_pack_and_the_flags(tmp_path, fit, monkeypatch):
    def full(self, pack):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train.Llama, "loss", full)
    done = fit(tmp_path, pack_tokens=300, check=False)
    assert done.returncode == 2
    (said,) = own_lines(done.stderr, "train")
    way = "lower --pack-tokens, add --no-cuda-graphs, or add --activation-checkpointing"
    found = re.search(rf"a pack of (\d+) tokens, (\d+) of them in a batch of 8; {way}", said)
    assert 0 < int(found[1]) <= 300
    assert int(found[2]) >= 2
    assert not losses(tmp_path)


def test_what_train_needs_is_named(tmp_path, fit):
    def message(**settings):
        done = fit(tmp_path / "run", **settings, check=False)
        assert done.returncode == 2
        return done.stderr.strip().splitlines()[-1]

    assert "run python summarize.py --run" in message(paradigm="hierarchical")
    assert "7: not a multiple of the 2 examples of a user; choose 6" in message(batch_size=7)
    assert "'nothing' names no linear layer" in message(lora_targets=["nothing"])
    assert "no room for the instruction" in message(max_length=30)


# ---- What a run will take


def test_a_dry_run_reports_what_the_run_will_take_and_leaves_nothing(
    tmp_path, data_folder, model_folder, fit
):
    done = fit(tmp_path, dry_run=True)
    work = r"work    (\d+) tokens an epoch, (\S+) FLOP; each example apart: (\d+)"
    found = re.search(work, done.stdout)
    model = load_model(model_folder, CPU, torch.float32)
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1)
    # A fifth for the adapter's.
    assert float(found[2]) == pytest.approx(4 * weights * int(found[1]), rel=0.2)
    apart = sum(map(len, separate_examples(model_folder, data_folder)))
    assert int(found[1]) < int(found[3]) == apart
    assert re.search(r"memory  about [\d.]+ GiB a device", done.stdout)
    assert re.search(r"time    [\d.]+ minutes an epoch", done.stdout)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_every_position_needs_the_summaries_of_the_blocks_before(
    tmp_path, data_folder, model_folder, fit
):
    common = {"data": data_folder, "model": model_folder, "max_new_tokens": 4, "block_size": 2}
    run("summarize.py", run=tmp_path / "without", **common)
    done = fit(tmp_path / "without", paradigm=None, targets="all", check=False)
    assert done.returncode == 2
    assert "summarize.py --every-block, or --targets last" in done.stderr
    for paradigm in ("hierarchical", "recurrent"):
        whole = paradigm == "hierarchical"
        run("summarize.py", run=tmp_path / paradigm, paradigm=paradigm, every_block=whole, **common)
        fit(tmp_path / paradigm, paradigm=None, targets="all", epochs=1, batch_size=200)
        assert losses(tmp_path / paradigm)
