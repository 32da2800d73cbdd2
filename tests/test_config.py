"""ops/config.py: every field of config.json is read, harmless, or refused."""

from dataclasses import fields

import pytest
from helpers import CPU, change_json, write_model, write_neox
from transformers import GPTNeoXConfig, LlamaConfig

import llama
from llama import CheckpointError, load_model
from models import hub, neox
from ops import config


@pytest.mark.parametrize("theirs", [LlamaConfig, GPTNeoXConfig])
def test_the_tables_know_every_field_of_transformers_configurations(theirs):
    own = {field.name for field in fields(neox.Config)}
    known = own | config.READ | config.HARMLESS | config.FIXED.keys()
    assert theirs().to_dict().keys() <= known
    assert not config.HARMLESS & (own | config.FIXED.keys())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal is False, only True is supported"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, only 0.0 is supported"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1, only 0.0 is supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "say different things"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3 is no multiple of num_key_value"),
        ({"head_dim": 11}, "head_dim 11 is odd"),
        (
            {"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5},
            "48 is no",
        ),
        ({"num_hidden_layers": 1025}, "num_hidden_layers is 1025, at most 1024"),
        ({"rms_norm_eps": 0}, "field rms_norm_eps is 0, expected a number above 0"),
        ({"vocab_size": 2**31}, "field vocab_size is 2147483648"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is"),
    ],
)
def test_a_value_that_would_change_the_result_is_refused_by_name(tmp_path, changes, message):
    write_model(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        llama.load_config(tmp_path)


def rope(**parameters):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | parameters}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, only 1.0 is supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (rope(rope_type="linear", factor=0), "rope factor is 0.0, expected a number above 0"),
        (rope(rope_type="linear"), "field 'factor' is missing"),
    ],
)
def test_rotary_parameters_that_are_not_built_are_refused(tmp_path, changes, message):
    write_model(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        llama.load_config(tmp_path)


@pytest.mark.parametrize("write", [write_model, write_neox])
def test_is_causal_is_a_matter_of_every_architecture(tmp_path, write):
    write(tmp_path)
    change_json(tmp_path / "config.json", is_causal=False)
    with pytest.raises(CheckpointError, match="is_causal"):
        hub.load_config(tmp_path)


def test_both_layouts_may_stand_side_by_side_if_they_agree(tmp_path):
    write_model(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    change_json(tmp_path / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    assert llama.load_config(tmp_path).rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_a_large_rope_theta_is_read_as_real_checkpoints_have_it(tmp_path):
    model = write_model(
        tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 283461213.0}
    )
    assert llama.load_config(tmp_path).rope_theta == 283461213.0
    ours = load_model(tmp_path, CPU, model.dtype)
    ids = model.dummy_inputs["input_ids"]
    assert (ours(ids) - model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("ids", "expected"), [(None, ()), ([], ()), (-1, (-1,)), ([1, 2], (1, 2))])
def test_end_tokens_in_every_form(tmp_path, ids, expected):
    write_model(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change_json(tmp_path / "config.json", eos_token_id=ids)
    assert llama.load_config(tmp_path).eos_token_id == expected
