"""ops/checkpoint.py and loading: what a model folder holds; all that does not fit is named."""

import json
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    LLAMA,
    LLAMA3,
    NEOX,
    change_json,
    partial_rope,
    random_ids,
    rope,
    write_model,
    write_neox,
)
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

import llama
from llama import CheckpointError, load_model
from models import neox
from models.hub import load_model as load_any_model
from ops.checkpoint import fingerprint

# ---- config.json


def test_old_and_new_config_layout_are_the_same(tmp_path):
    write_model(tmp_path, **rope("llama3", 5e5, **LLAMA3))
    new = llama.load_config(tmp_path)
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    change_json(tmp_path / "config.json", rope_parameters=None, **old)
    assert llama.load_config(tmp_path) == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_old_and_new_config_layout_of_a_pythia_are_the_same(tmp_path):
    path = tmp_path / "config.json"
    write_neox(tmp_path, **partial_rope(0.5, theta=5e4))
    new = neox.load_config(tmp_path)
    reference = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    change_json(path, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=50000)
    assert neox.load_config(tmp_path) == new
    assert (new.rotary_pct, new.rope_theta, new.rotary_dim, new.head_dim) == (0.5, 5e4, 8, 16)
    with torch.no_grad():
        ids = random_ids(2, 40)
        ours = load_any_model(tmp_path, CPU, torch.float32)(ids)
        assert (ours - reference(ids).logits).abs().max() < 1e-4
    change_json(path, rotary_pct=None, rotary_emb_base=None, attention_bias=None)
    assert neox.load_config(tmp_path).rotary_pct == 0.25
    assert neox.load_config(tmp_path).rope_theta == 10000.0
    assert neox.load_config(tmp_path).attention_bias


BAD_LLAMAS = [
    ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (
        {"intermediate_size": 100},
        "mlp.down_proj.weight has shape (48, 96), expected shape (48, 100)",
    ),
    ({"num_hidden_layers": 3}, "lack 9 tensors, the first is model.layers.2."),
    ({"num_hidden_layers": 1}, "config.json has no place for it"),
]
BAD_PYTHIAS = [
    ({"model_type": "gptj"}, "model_type is 'gptj', only 'llama' and 'gpt_neox' are supported"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": "llama", "hidden_act": None, **rope()}, "config.json has no place for it"),
    ({"model_type": "llama", "hidden_act": None}, "partial_rotary_factor is 0.25"),
    (
        {"hidden_act": "relu"},
        "hidden_act is 'relu', only gelu, gelu_new, gelu_fast, gelu_pytorch_tanh",
    ),
    ({"hidden_act": ["gelu"]}, "hidden_act is ['gelu']"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"rope_parameters": [1]}, "the rope parameters are [1]"),
    (partial_rope(1.5), "rotates 24 of a head's 16 dimensions"),
    (partial_rope(0.2), "rotates 3 of a head's 16 dimensions"),
    (partial_rope("all"), "field rotary_pct is 'all'"),
    (partial_rope(0.0), "field rotary_pct is 0.0"),
    ({"num_attention_heads": None}, "field 'num_attention_heads' is missing"),
    ({"layer_norm_eps": "small"}, "field layer_norm_eps is 'small'"),
    ({"use_parallel_residual": 1}, "field use_parallel_residual is 1, expected bool"),
    ({"num_attention_heads": 7}, "hidden_size 64 is no multiple of num_attention_heads 7"),
    (
        {"intermediate_size": 100},
        "dense_4h_to_h.weight has shape (64, 96), expected shape (64, 100)",
    ),
    ({"attention_bias": False}, "config.json has no place for it"),
    ({"num_hidden_layers": 3}, "lack 12 tensors, the first is gpt_neox.layers.2."),
]
BAD_ANY = [
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "field 'factor' is missing"),
    ({"hidden_size": None}, "field 'hidden_size' is missing"),
]


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        *((LLAMA, *case) for case in BAD_LLAMAS + BAD_ANY),
        *((NEOX, *case) for case in BAD_PYTHIAS + BAD_ANY),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_named(tmp_path, architecture, changes, message):
    architecture.write(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as error:
        architecture.load(tmp_path, CPU, torch.float32)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- Weights


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_weights_are_the_mapped_file_and_not_a_copy(model_folder):
    model = load_model(model_folder, CPU, torch.float32)
    path = str(model_folder / "model.safetensors")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in maps if line[-1] == path]
    spans = [(int(a, 16), int(b, 16)) for a, b in spans]
    for name, parameter in model.named_parameters():
        assert any(a <= parameter.data_ptr() < b for a, b in spans), name


def test_only_the_rotary_frequencies_may_be_left_over(tmp_path):
    write_model(tmp_path)
    path, ids = tmp_path / "model.safetensors", torch.arange(3, 20)[None]
    whole, expected = load_file(path), load_model(tmp_path, CPU, torch.float32)(ids)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path)
    assert torch.equal(load_model(tmp_path, CPU, torch.float32)(ids), expected)
    save_file(whole | {"model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, path)
    message = r"tensor .*q_norm.weight has shape \(6,\), config.json has no place"
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, CPU, torch.float32)


def test_tensors_that_real_pythias_have_besides_are_ignored(tmp_path, pythia_folder):
    path = tmp_path / "model.safetensors"
    tensors = {n: t.half() for n, t in load_file(pythia_folder / "model.safetensors").items()}
    for i in range(2):
        name = f"gpt_neox.layers.{i}.attention."
        tensors[name + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors[name + "masked_bias"] = torch.tensor(-1e9)
        tensors[name + "rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path)
    (tmp_path / "config.json").write_text((pythia_folder / "config.json").read_text())
    models = (load_any_model(f, CPU, torch.float32) for f in (tmp_path, pythia_folder))
    with torch.no_grad():
        ours, whole = (model(random_ids(1, 9)) for model in models)
    assert (ours - whole).abs().max() < 1e-1

    save_file(tensors | {"gpt_neox.layers.0.attention.extra": torch.ones(2)}, path)
    message = r"attention\.extra has shape \(2,\), config.json has no place for it"
    with pytest.raises(CheckpointError, match=message):
        load_any_model(tmp_path, CPU, torch.float32)


def test_bad_weight_files_are_named(tmp_path):
    write_model(tmp_path, shards=3)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        load_model(tmp_path, CPU, torch.float32)
    for shard in shards[:2]:
        shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing {shards[0].name}, {shards[1].name}"):
        load_model(tmp_path, CPU, torch.float32)
    index = tmp_path / "model.safetensors.index.json"
    for unsafe in ("../x.safetensors", "/tmp/x.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {"a": unsafe}}))
        with pytest.raises(CheckpointError, match="not the plain name"):
            load_model(tmp_path, CPU, torch.float32)


def test_fingerprint_tells_models_apart(tmp_path):
    write_model(tmp_path / "a", seed=0)
    write_model(tmp_path / "b", seed=0)
    write_model(tmp_path / "c", seed=1)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    # It may say that a text begins with a token, and then every prompt is another.
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert fingerprint(tmp_path / "b") != a


# ---- Two sets of weights, and tied ones


def logits_of(folder):
    with torch.no_grad():
        return load_model(folder, CPU, torch.float32)(random_ids(1, 12))


def test_a_whole_file_goes_before_an_index_whose_shards_are_gone(tmp_path):
    write_model(tmp_path, shards=3)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    reference = write_model(tmp_path, seed=1)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        expected = reference(random_ids(1, 12)).logits
    assert (logits_of(tmp_path) - expected).abs().max() < 1e-4


def test_two_sets_of_weights_are_refused(tmp_path):
    write_model(tmp_path / "whole", seed=1)
    write_model(tmp_path / "both", shards=3)
    whole = (tmp_path / "whole/model.safetensors").read_bytes()
    (tmp_path / "both/model.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"two sets of weights.*delete the one"):
        load_model(tmp_path / "both", CPU, torch.float32)
    with pytest.raises(CheckpointError, match="two sets of weights"):
        fingerprint(tmp_path / "both")


def test_a_tied_model_s_own_head_is_refused_if_it_differs(tmp_path):
    write_model(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    expected, tensors = logits_of(tmp_path), load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    # The same tensor under both names, and under the head's alone, as save_model writes it.
    save_file(tensors | {"lm_head.weight": embedding.clone()}, path)
    assert torch.equal(logits_of(tmp_path), expected)
    others = {name: t for name, t in tensors.items() if name != "model.embed_tokens.weight"}
    save_file(others | {"lm_head.weight": embedding}, path)
    assert torch.equal(logits_of(tmp_path), expected)

    save_file(tensors | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens"):
        load_model(tmp_path, CPU, torch.float32)
