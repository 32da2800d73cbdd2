"""lora.py against PEFT: same names, same files, same logits."""

import pytest
import torch
from helpers import CPU, LLAMA, NEOX, change_json, random_ids, write_model, write_neox
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lora
from lora import (
    AdapterError,
    LoRAConfig,
    adapter_tensors,
    apply_lora,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from ops.int8 import WAYS

IDS = random_ids(2, 25, seed=0)
ADAPTERS = [
    (LLAMA, LoRAConfig()),
    (LLAMA, LoRAConfig(r=3, alpha=32, dropout=0.0, targets=("gate_proj", "v_proj"))),
    (LLAMA, LoRAConfig(16, 8, targets=(*LLAMA.attention, "gate_proj", "up_proj", "down_proj"))),
    (NEOX, LoRAConfig(targets=NEOX.attention)),
    (NEOX, LoRAConfig(r=3, alpha=32, dropout=0.0, targets=("query_key_value",))),
    (NEOX, LoRAConfig(r=4, targets=(*NEOX.attention, "dense_h_to_4h", "dense_4h_to_h"))),
]
EACH = pytest.mark.parametrize(
    ("architecture", "config"),
    ADAPTERS,
    ids=[f"{architecture}-r{config.r}" for architecture, config in ADAPTERS],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model of each architecture; attention has biases in both."""
    found = {LLAMA: tmp_path_factory.mktemp("llama"), NEOX: tmp_path_factory.mktemp("neox")}
    write_model(found[LLAMA], attention_bias=True)
    write_neox(found[NEOX])
    return found


@pytest.fixture
def folder(folders):
    return folders[LLAMA]


def load(folder, architecture=LLAMA, **options):
    return architecture.load(folder, CPU, torch.float32, **options)


def adapted(folder, config=None, architecture=LLAMA):
    """A model with an adapter that does something."""
    config = config or LoRAConfig(targets=architecture.attention)
    model = apply_lora(load(folder, architecture), config)
    torch.manual_seed(0)
    for parameter in adapter_tensors(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def save(model, path, config=None):
    save_adapter(path, adapter_tensors(model), config or LoRAConfig(), "base")


# ---- PEFT


@EACH
def test_our_adapter_gives_the_same_logits_in_peft(tmp_path, folders, architecture, config):
    folder = folders[architecture]
    model = adapted(folder, config, architecture)
    assert len(lora_layers(model)) == 2 * len(config.targets)
    save(model, tmp_path, config)
    base = architecture.reference.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        found = model(IDS)
        assert (found - load(folder, architecture)(IDS)).abs().max() > 0.1
        assert (found - theirs(IDS).logits).abs().max() < 1e-5
        merge(model)
        assert 0 < (model(IDS) - found).abs().max() < 1e-4


@EACH
def test_a_peft_adapter_gives_the_same_logits_here(tmp_path, folders, architecture, config):
    options = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
    )
    base = architecture.reference.from_pretrained(folders[architecture])
    theirs = get_peft_model(base, options).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    model = load(folders[architecture], architecture)
    targets = tuple(sorted(config.targets))
    expected = LoRAConfig(config.r, config.alpha, config.dropout, targets)
    assert load_adapter(model, tmp_path) == expected
    with torch.no_grad():
        assert (model.eval()(IDS) - theirs(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", [LLAMA, NEOX], ids=str)
def test_gradients_equal_peft(tmp_path, folders, architecture):
    config = LoRAConfig(dropout=0.0, targets=architecture.attention)
    model = adapted(folders[architecture], config, architecture)
    save(model, tmp_path, config)
    base = architecture.reference.from_pretrained(folders[architecture])
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    model(IDS).square().mean().backward()
    theirs(IDS).logits.square().mean().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(wanted) == 2 * 2 * len(architecture.attention)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = lora.PREFIX + name.replace(".weight", ".default.weight")
            assert (parameter.grad - wanted[key]).abs().max() < 1e-5
        else:
            assert parameter.grad is None


# ---- The layers


@pytest.mark.parametrize("architecture", [LLAMA, NEOX], ids=str)
def test_merged_equals_unmerged_and_back(folders, architecture):
    folder = folders[architecture]
    model = adapted(folder, None, architecture)
    with torch.no_grad():
        before = model(IDS)
        merge(model)
        merge(model)  # a second time changes nothing
        merged = model(IDS)
        assert all(layer.merged for layer in lora_layers(model))
        assert 0 < (merged - before).abs().max() < 1e-4
        merge(model, sign=-1)
        assert (model(IDS) - before).abs().max() < 1e-4
        # Merging did not write into the mapped file.
        assert (load(folder, architecture)(IDS) - before).abs().max() > 0.1


def test_a_new_adapter_changes_nothing_and_trains_alone(folder):
    base = load(folder)
    expected = base(IDS)
    model = apply_lora(load(folder), LoRAConfig())
    assert torch.equal(model(IDS), expected)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == list(adapter_tensors(model))
    assert len(trainable) == 2 * 2 * 4
    assert all(p.dtype == torch.float32 for p in adapter_tensors(model).values())


def test_dropout_is_on_the_adapter_alone(folder):
    model = adapted(folder, LoRAConfig(dropout=0.5)).train()
    torch.manual_seed(0)
    first = model(IDS)
    assert not torch.equal(first, model(IDS))
    merge(model)
    assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("way", WAYS)
def test_int8_base_takes_an_adapter_but_no_merge(folder, way):
    pytest.importorskip("bitsandbytes")
    model = apply_lora(load(folder, int8=way), LoRAConfig())
    assert model(IDS).isfinite().all()
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("layers_to_transform", [0]),
        ("target_modules", "all-linear"),
        ("r", None),
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_name(tmp_path, folder, field, value):
    save(adapted(folder), tmp_path)
    change_json(tmp_path / "adapter_config.json", **{field: value})
    with pytest.raises(AdapterError, match=field):
        load_adapter(load(folder), tmp_path)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = lora.PREFIX + "model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
        (lambda t: t.update(extra=torch.ones(2)), "tensor extra has no place"),
        (lambda t: t.update({NAME: torch.ones(48, 4)}), r"shape \(48, 4\), expected \(48, 8\)"),
        (
            lambda t: t.update({n: torch.zeros_like(v) for n, v in t.items() if "lora_B" in n}),
            "every lora_B is zero",
        ),
    ],
)
def test_adapter_files_that_do_not_fit_are_refused(tmp_path, folder, change, message):
    save(adapted(folder), tmp_path)
    edit(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(load(folder), tmp_path)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (
            {"num_hidden_layers": 1},
            {},
            r"layers\.1\..* has no place in this model; was the adapter trained on another",
        ),
        (
            {"num_hidden_layers": 3},
            {},
            r"layers\.2\..* is missing; was the adapter trained on another model",
        ),
        (
            {"hidden_size": 64},
            {},
            r"has shape \(8, 48\), expected \(8, 64\); is it for another model or rank",
        ),
        ({}, {"r": 4}, r"has shape \(8, 48\), expected \(4, 48\); is it for another model or rank"),
        ({}, {"target_modules": ["q_proj"]}, r"k_proj.* has no place"),
        (
            {},
            {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]},
            r"up_proj.* is missing",
        ),
        ({}, {"target_modules": ["query_key_value"]}, r"'query_key_value' names no linear layer"),
    ],
)
def test_an_adapter_for_another_base_rank_or_targets_is_refused(
    tmp_path, folder, base, changes, message
):
    save(adapted(folder), tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    write_model(tmp_path / "other", attention_bias=True, **base)
    with pytest.raises(AdapterError, match=message):
        load_adapter(load(tmp_path / "other"), tmp_path / "adapter")


def test_an_interrupted_save_leaves_no_weights_beside_another_configuration(tmp_path, folder):
    def breaks_off(*_, **__):
        raise KeyboardInterrupt

    model = adapted(folder)
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path, adapter_tensors(model), LoRAConfig(), "base", breaks_off)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path, adapter_tensors(model), LoRAConfig(alpha=99), "base", breaks_off)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        load_adapter(load(folder), tmp_path)


def test_a_broken_or_absent_adapter_is_named(tmp_path, folder):
    model = load(folder)
    with pytest.raises(AdapterError, match=r"train\.py makes one"):
        load_adapter(model, tmp_path)
    save(adapted(folder), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cut short"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not a JSON object"):
        load_adapter(model, tmp_path)


def test_targets_and_ranks_that_make_no_sense_are_named(folder):
    model = load(folder)
    with pytest.raises(AdapterError, match="'query_key_value' names no linear layer"):
        apply_lora(model, LoRAConfig(targets=("query_key_value",)))
    with pytest.raises(AdapterError, match="rank r is 0"):
        apply_lora(model, LoRAConfig(r=0))


# ---- PEFT's configuration: each field is read, harmless or refused


def known_fields():
    read = {"peft_type", "bias", "target_modules", "r", "lora_alpha", "lora_dropout"}
    return read | {"init_lora_weights", "use_rslora"} | {*lora._HARMLESS}


def test_a_plain_configuration_of_peft_is_read_whatever_fields_it_has(tmp_path, folder):
    save_adapter(tmp_path, adapter_tensors(adapted(folder)), LoRAConfig(), str(folder))
    plain = LoraConfig(r=8, lora_alpha=16, target_modules=list(LLAMA.attention)).to_dict()
    names = {"peft_type": "LORA", "target_modules": list(LLAMA.attention)}
    change_json(tmp_path / "adapter_config.json", **plain | names)
    assert lora.load_adapter_config(tmp_path).alpha == 16
    # Harmless are those alone whose default says something.
    for field, value in plain.items():
        assert field in known_fields() or value in (None, False, "", [], {}), field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("init_lora_weights", word) for word in ("pissa", "pissa_niter_4", "olora", "corda")),
        *(("init_lora_weights", word) for word in ("loftq", "lora_ga", "mica", "whatever", 1)),
        ("alora_invocation_tokens", [1, 2]),
        ("layers_to_transform", 0),
        ("layers_to_transform", [0]),
        ("layers_pattern", "layers"),
        ("loftq_config", {"loftq_bits": 4}),
        ("use_qalora", True),
        ("a_field_of_the_future", 1),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1),
        ("r", True),
        ("target_modules", []),
        ("target_modules", "all-linear"),
    ],
)
def test_whatever_would_change_the_adapter_is_refused_by_name(tmp_path, folder, field, value):
    save_adapter(tmp_path, adapter_tensors(adapted(folder)), LoRAConfig(), str(folder))
    change_json(tmp_path / "adapter_config.json", **{field: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {field} is .*only plain LoRA"):
        load_adapter(load(folder), tmp_path)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_read(tmp_path, folder, start):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    options = {"r": 4, "target_modules": list(LLAMA.attention), "init_lora_weights": start}
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    theirs.save_pretrained(tmp_path)
    ours = load(folder)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert (ours(IDS) - theirs.eval()(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("architecture", [LLAMA, NEOX], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"target_modules": "all-linear"}],
    ids=["rslora", "names"],
)
def test_peft_s_other_ways_of_plain_lora_give_the_same_logits(
    tmp_path, folders, architecture, options
):
    torch.manual_seed(0)
    base = architecture.reference.from_pretrained(folders[architecture])
    options = {"target_modules": list(architecture.attention)} | options
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.05)
    theirs.save_pretrained(tmp_path)
    ours = load(folders[architecture], architecture)
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        assert (ours(IDS) - theirs.eval()(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize(("architecture", "head"), [(LLAMA, "lm_head"), (NEOX, "embed_out")])
def test_the_output_head_is_refused_and_not_offered(folders, architecture, head):
    model = load(folders[architecture], architecture)
    with pytest.raises(AdapterError, match=f"{head}.*the output head cannot be adapted"):
        apply_lora(model, LoRAConfig(targets=(head,)))
    with pytest.raises(AdapterError, match="it has") as error:
        apply_lora(model, LoRAConfig(targets=("nothing",)))
    assert head not in str(error.value)
