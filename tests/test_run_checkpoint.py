"""state/checkpoint.py: training state comes back to the bit, and what is broken is passed over."""

import pytest
import torch
from helpers import CPU, random_ids

from llama import load_model
from lora import LoRAConfig, adapter_tensors, apply_lora
from state.checkpoint import Progress, load_checkpoint, save_checkpoint, save_model, trainable
from trsr import InputError


def trained(folder, steps, r=8, fused=None):
    """Return a model with an adapter after some steps, and its optimizer."""
    torch.manual_seed(0)
    model = apply_lora(load_model(folder, CPU, torch.float32), LoRAConfig(r, dropout=0.0))
    parameters = adapter_tensors(model).values()
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=fused)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(random_ids(1, 9)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def progress(number):
    return Progress(step=number, batch=number)


@pytest.mark.parametrize("fused", [None, True])
def test_training_continues_to_the_bit_from_a_checkpoint(tmp_path, model_folder, fused):
    model, optimizer = trained(model_folder, 3, fused=fused)
    save_checkpoint(tmp_path, model, optimizer, progress(3), 0)
    other, other_optimizer = trained(model_folder, 1, fused=fused)
    assert load_checkpoint(tmp_path, other, other_optimizer, CPU) == progress(3)
    for pair in ((model, optimizer), (other, other_optimizer)):
        step(*pair)
    pairs = zip(trainable(model).items(), trainable(other).values(), strict=True)
    for (name, ours), theirs in pairs:
        assert torch.equal(ours, theirs), name


def test_only_the_newest_checkpoint_is_kept(tmp_path, model_folder):
    model, optimizer = trained(model_folder, 1)
    for number in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, progress(number), 0)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [
        "step-00000002.safetensors"
    ]


def test_checkpoints_that_are_broken_or_of_another_model_are_passed_over(
    tmp_path, model_folder, capsys
):
    model, optimizer = trained(model_folder, 1)
    assert load_checkpoint(tmp_path, model, optimizer, CPU) is None
    save_checkpoint(tmp_path, model, optimizer, progress(1), 0)
    torn = tmp_path / "checkpoint" / "step-00000009.safetensors"
    torn.write_bytes(b"torn")
    assert load_checkpoint(tmp_path, model, optimizer, CPU) == progress(1)
    assert f"{torn}: ignored, it is not intact" in capsys.readouterr().out
    assert load_checkpoint(tmp_path, *trained(model_folder, 1, r=4), CPU) is None
    assert "of another model" in capsys.readouterr().out


def test_a_saved_model_is_whole_and_in_the_dtype_asked_for(tmp_path, model_folder):
    model = load_model(model_folder, CPU, torch.float32)
    tensors = dict(model.named_parameters())
    save_model(tmp_path / "model", tensors, model_folder, torch.bfloat16)
    found = load_model(tmp_path / "model", CPU, torch.bfloat16)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, tensors[name].bfloat16()), name
    assert (tmp_path / "model" / "tokenizer.model").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, OSError)):
        save_model(tmp_path / "file" / "model", tensors, model_folder, torch.float32)
