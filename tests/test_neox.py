"""models/neox.py against transformers and PEFT, each fast path against the slow one, and the scripts on a Pythia."""

import json
import random

import pytest
import torch
from conftest import COLORS, ROOT, THINGS, run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_faults import copied, survive, times
from test_llama import LLAMA3, change_json, random_ids, random_trees, separate_loss
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import trsr
from baselines.encode import by_llama
from bench import random_model
from evaluate import score_packs
from llama import CheckpointError
from lora import (
    LoRAConfig,
    adapter_tensors,
    apply_lora,
    load_adapter,
    lora_layers,
    merge,
    save_adapter,
)
from models.hub import build_model, load_model
from models.neox import GPTNeoX, load_config
from models.tokenizer import Tokenizer
from ops.cache import KVCache
from ops.int8 import WAYS
from ops.masks import block_mask
from ops.packs import pack_trees
from prepare.dataset import load_dataset
from prepare.domains import DOMAINS
from summarize import generate

CPU = torch.device("cpu")
ATTENTION = ("query_key_value", "dense")
TINY = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def rope(part, kind="default", theta=10000.0, **more):
    return {
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": theta,
            "partial_rotary_factor": part,
            **more,
        }
    }


FAMILIES = {
    "pythia": {},
    "sequential": {"use_parallel_residual": False},
    "whole-heads": rope(1.0),
    "half-heads": rope(0.5, theta=500000.0),
    "no-attention-bias": {"attention_bias": False},
    "gelu-fast": {"hidden_act": "gelu_fast"},
    "gelu-new": {"hidden_act": "gelu_new", "use_parallel_residual": False},
    "rope-linear": rope(0.5, "linear", factor=4.0),
    "rope-llama3": rope(1.0, "llama3", **LLAMA3),
    "deep-eps": {"num_hidden_layers": 4, "layer_norm_eps": 1e-2, "num_attention_heads": 8},
}


def write_neox(folder, shards=1, seed=0, dtype=torch.float32, **changes):
    """Save a transformers GPT-NeoX with random weights of a visible size; return it in eval mode."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**(TINY | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("norm.weight")
            parameter.uniform_(0.5, 1.5) if norm else parameter.normal_(
                0, 0.08 if parameter.dim() > 1 else 0.3
            )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    return model


@pytest.fixture(scope="module")
def tokenizer_json():
    """A byte-level BPE tokenizer as Pythia's: no token at the beginning, and fewer pieces than the model has rows."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    lines = [(ROOT / "LICENSE").read_text(), *(str(domain) for domain in DOMAINS.values())] * 4
    lines += [
        f"Title: {rng.choice(COLORS)} {rng.choice(THINGS)}; Color: {rng.choice(COLORS)}"
        for _ in range(300)
    ]
    lines += ["### User:\n", "### Assistant:\nYes", "### Assistant:\nNo"] * 50
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    options = {
        "vocab_size": 600,
        "special_tokens": special,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    made.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(**options))
    return made.to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_json):
    """A tiny Pythia with random weights and a tokenizer, as a user would have it on disk."""
    path = tmp_path_factory.mktemp("pythia")
    write_neox(path)
    (path / "tokenizer.json").write_text(tokenizer_json)
    return path


@pytest.fixture
def tiny(folder):
    return load_model(folder, CPU, torch.float32)


# ---- the model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, shards):
    reference = write_neox(tmp_path, shards=shards, **FAMILIES[family])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ids = random_ids(3, 70)
    model = load_model(tmp_path, CPU, torch.float32)
    with torch.no_grad():
        ours, theirs = model(ids), reference(ids).logits
    assert theirs.std() > 0.1  # the comparison means something
    assert (ours - theirs).abs().max() < 1e-4
    files = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert {name for name, _ in model.named_parameters()} == files  # nothing is renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_equal_transformers(tmp_path, family):
    reference = write_neox(tmp_path, dtype=torch.bfloat16, **FAMILIES[family])
    ids = random_ids(2, 40)
    with torch.no_grad():
        ours = load_model(tmp_path, CPU, torch.bfloat16)(ids)
        theirs = reference(ids).logits.float()
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - theirs).norm() / theirs.norm() < 2e-2


def test_each_difference_between_the_families_shows(tmp_path):
    """Otherwise a model that ignored a field could pass for all of them."""
    write_neox(tmp_path)
    ids = random_ids(2, 40)
    with torch.no_grad():
        base = load_model(tmp_path, CPU, torch.float32)(ids)
        for family in ("sequential", "whole-heads", "half-heads", "gelu-fast"):
            change_json(
                tmp_path / "config.json", **GPTNeoXConfig(**TINY | FAMILIES[family]).to_diff_dict()
            )
            other = load_model(tmp_path, CPU, torch.float32)(ids)
            assert (other - base).abs().max() > (1e-5 if family == "gelu-fast" else 1e-2), family
            write_neox(tmp_path)


def test_old_and_new_config_layout_are_the_same(tmp_path):
    write_neox(tmp_path, **rope(0.5, theta=5e4))
    new = load_config(tmp_path)
    reference = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    change_json(
        tmp_path / "config.json", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=50000
    )
    assert load_config(tmp_path) == new
    assert (new.rotary_pct, new.rope_theta, new.rotary_dim, new.head_dim) == (0.5, 5e4, 8, 16)
    with torch.no_grad():
        ids = random_ids(2, 40)
        assert (
            load_model(tmp_path, CPU, torch.float32)(ids) - reference(ids).logits
        ).abs().max() < 1e-4
    change_json(
        tmp_path / "config.json", rotary_pct=None, rotary_emb_base=None, attention_bias=None
    )
    assert load_config(tmp_path).rotary_pct == 0.25
    assert load_config(tmp_path).rope_theta == 10000.0
    assert load_config(tmp_path).attention_bias


def test_what_real_checkpoints_have_left_over_is_tolerated(tmp_path, folder, tiny):
    tensors = {n: t.half() for n, t in load_file(folder / "model.safetensors").items()}
    for i in range(2):
        name = f"gpt_neox.layers.{i}.attention."
        tensors[name + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        tensors[name + "masked_bias"] = torch.tensor(-1e9)
        tensors[name + "rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = load_model(tmp_path, CPU, torch.float32)
    with torch.no_grad():
        assert (model(random_ids(1, 9)) - tiny(random_ids(1, 9))).abs().max() < 1e-1
    save_file(
        tensors | {"gpt_neox.layers.0.attention.extra": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"attention\.extra has shape \(2,\), config.json has no place for it"
    ):
        load_model(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gptj"}, "model_type is 'gptj', only 'llama' and 'gpt_neox' are supported"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "llama", "hidden_act": None}, "config.json has no place for it"),
        (
            {"hidden_act": "relu"},
            "hidden_act is 'relu', only gelu, gelu_new, gelu_fast, gelu_pytorch_tanh",
        ),
        ({"hidden_act": ["gelu"]}, "hidden_act is ['gelu']"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "field 'factor' is missing"),
        ({"rope_parameters": [1]}, "the rope parameters are [1]"),
        (rope(1.5), "rotates 24 of a head's 16 dimensions"),
        (rope(0.2), "rotates 3 of a head's 16 dimensions"),
        (rope("all"), "field rotary_pct is 'all'"),
        (rope(0.0), "field rotary_pct is 0.0"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"num_attention_heads": None}, "field 'num_attention_heads' is missing"),
        ({"layer_norm_eps": "small"}, "field layer_norm_eps is 'small'"),
        ({"use_parallel_residual": 1}, "field use_parallel_residual is 1, expected bool"),
        ({"num_attention_heads": 7}, "dense.weight has shape (64, 64), expected shape (64, 63)"),
        (
            {"intermediate_size": 100},
            "dense_4h_to_h.weight has shape (64, 96), expected shape (64, 100)",
        ),
        ({"attention_bias": False}, "config.json has no place for it"),
        ({"num_hidden_layers": 3}, "lack 12 tensors, the first is gpt_neox.layers.2."),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    write_neox(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path, CPU, torch.float32)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- packs


@pytest.mark.parametrize("family", ["pythia", "sequential", "whole-heads"])
@pytest.mark.parametrize("max_tokens", [999, 60])
def test_packed_logits_and_scores_equal_separate_texts(tmp_path, family, max_tokens):
    write_neox(tmp_path, **FAMILIES[family])
    model, trees = load_model(tmp_path, CPU, torch.float32), random_trees(5, 9)
    packs = pack_trees(trees, max_tokens, pad_to=16)
    assert any(pack.known for pack in packs) == (
        max_tokens == 60
    )  # a tree that was split keeps its prefix's keys
    scores = score_packs(model, packs, [17, 400])
    assert len(scores) == 45
    for pack in packs:
        with torch.no_grad():
            packed = model(pack.ids[None], pack.positions[None], pack.mask())[0]
        for (t, b), row in pack.leaves.items():
            with torch.no_grad():
                alone = model(torch.tensor([trees[t].prefix + trees[t].branches[b]]))[0, -1]
            assert (packed[row] - alone).abs().max() < 1e-4
            assert (torch.tensor(scores[t, b]) - alone[[17, 400]]).abs().max() < 1e-4


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_shared_prefix_loss_and_gradients_equal_separate_examples(tiny, lora, checkpointing):
    if lora:
        apply_lora(tiny, LoRAConfig(targets=ATTENTION, dropout=0.0))
        for parameter in adapter_tensors(tiny).values():
            torch.nn.init.normal_(parameter, std=0.1)
    trees = random_trees(7, 2)
    expected, count = separate_loss(tiny, trees)
    (expected / count).backward()
    wanted = {name: p.grad.clone() for name, p in tiny.named_parameters() if p.requires_grad}
    assert len(wanted) == (2 * 2 * 2 if lora else 2 * 12 + 4)
    tiny.zero_grad()
    tiny.model.checkpointing = checkpointing
    total = sum(tiny.train().loss(pack, chunk=20) for pack in pack_trees(trees, 100, pad_to=8))
    (total / count).backward()
    assert abs(total - expected) / expected < 1e-5
    for name, parameter in tiny.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - wanted[name]).abs().max() < 1e-5, name


def test_the_block_mask_of_gpus_gives_the_same_logits(tiny):
    (pack,) = pack_trees(random_trees(6, 4), 999, pad_to=256)
    with torch.no_grad():
        inputs = pack.ids[None], pack.positions[None]
        blocks = tiny(*inputs, block_mask(pack.ends))[0]
        assert (blocks - tiny(*inputs, pack.mask())[0])[: pack.tokens].abs().max() < 1e-4


def test_a_layer_is_one_graph_to_the_compiler(tiny):
    ids, (pack,) = random_ids(1, 40), pack_trees(random_trees(6, 4), 999)
    with torch.no_grad():
        expected = tiny(ids)
    wanted = score_packs(tiny, [pack], [17, 400])
    for layer in tiny.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (tiny(ids) - expected).abs().max() < 1e-5
    assert score_packs(tiny, [pack], [17, 400]) == {
        leaf: pytest.approx(two, abs=1e-5) for leaf, two in wanted.items()
    }


# ---- generation


def test_greedy_ids_equal_transformers_generate(folder, tiny):
    reference = GPTNeoXForCausalLM.from_pretrained(folder).eval()
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 61, 23, 40)]
    width = max(map(len, prompts))
    padded = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = reference.generate(
        padded, attention_mask=mask, max_new_tokens=48, do_sample=False, pad_token_id=1
    )
    expected = [row[: row.index(0)] if 0 in row else row for row in out[:, width:].tolist()]
    assert max(map(len, expected)) == 48
    assert generate(tiny, prompts, 48, [0], batch_size=3) == expected


def test_cached_decoding_equals_uncached(tiny):
    ids, slots = random_ids(2, 30), torch.arange(30)
    cache = KVCache(tiny.config, 2, 40, CPU, torch.float32)
    with torch.no_grad():
        whole = tiny(ids)
        tiny(
            ids[:, :20],
            slots[:20].expand(2, 20),
            (slots[:20] <= slots[:20, None])[None, None],
            cache.layers,
        )
        for t in range(20, 30):
            position = torch.full((2, 1), t)
            step = tiny(
                ids[:, t : t + 1], position, (slots[: t + 1] <= t)[None, None, None], cache.layers
            )
            assert (step[:, 0] - whole[:, t]).abs().max() < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_int8_stays_close_to_the_full_model(folder, tiny, way):
    pytest.importorskip("bitsandbytes")
    ids = random_ids(2, 30)
    model = load_model(folder, CPU, torch.float32, int8=way)
    for layer in model.model.layers:
        for linear in (
            layer.attention.query_key_value,
            layer.attention.dense,
            layer.mlp.dense_4h_to_h,
        ):
            assert linear.weight.dtype == torch.int8
    assert model.embed_out.weight.dtype == torch.float32
    with torch.no_grad():
        full = tiny(ids)
        assert 1e-5 < (model(ids) - full).norm() / full.norm() < 5e-2


# ---- adapters

ADAPTERS = [
    LoRAConfig(targets=ATTENTION),
    LoRAConfig(r=3, alpha=32, dropout=0.0, targets=("query_key_value",)),
    LoRAConfig(r=4, targets=(*ATTENTION, "dense_h_to_4h", "dense_4h_to_h")),
]


@pytest.mark.parametrize("config", ADAPTERS)
def test_our_adapter_gives_the_same_logits_in_peft(tmp_path, folder, tiny, config):
    ids = random_ids(2, 25)
    with torch.no_grad():
        base = tiny(ids)
        model = apply_lora(tiny, config).eval()
        assert len(lora_layers(model)) == 2 * len(config.targets)
        for parameter in adapter_tensors(model).values():
            torch.nn.init.normal_(parameter, std=0.1)
        save_adapter(tmp_path, adapter_tensors(model), config, "base")
        theirs = PeftModel.from_pretrained(
            GPTNeoXForCausalLM.from_pretrained(folder), tmp_path
        ).eval()
        found = model(ids)
        assert (found - base).abs().max() > 0.1
        assert (found - theirs(ids).logits).abs().max() < 1e-5
        merge(model)
        assert 0 < (model(ids) - found).abs().max() < 1e-4


@pytest.mark.parametrize("config", ADAPTERS)
def test_a_peft_adapter_gives_the_same_logits_here(tmp_path, folder, tiny, config):
    options = {"r": config.r, "lora_alpha": config.alpha, "target_modules": list(config.targets)}
    theirs = get_peft_model(
        GPTNeoXForCausalLM.from_pretrained(folder), LoraConfig(**options)
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    assert load_adapter(tiny, tmp_path).targets == tuple(sorted(config.targets))
    with torch.no_grad():
        ids = random_ids(2, 25)
        assert (tiny.eval()(ids) - theirs(ids).logits).abs().max() < 1e-5


# ---- the tokenizer


def test_a_byte_level_tokenizer_without_a_first_token(tmp_path, folder):
    tokenizer = Tokenizer(folder, 640)
    assert tokenizer.fast.get_vocab_size() == 600  # the other rows are padding
    texts = [
        "### User:\nTitle: blue lamp\n\n### Assistant:\nYes",
        "naïve £5 ☃",
        "a <|endoftext|> b",
        "",
    ]
    ids = tokenizer.encode(texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert not any(
        0 in row for row in ids
    )  # neither before a text nor for a special token that is written out in one
    assert ids[-1] == []
    for domain in DOMAINS.values():
        yes, no = trsr.answer_ids(tokenizer.encode, domain)
        assert (tokenizer.decode([yes]), tokenizer.decode([no])) == ("Yes", "No")
    for rows in (599, 600 + 512):
        with pytest.raises(
            CheckpointError, match=f"600 pieces, but the model's embedding has {rows} rows"
        ):
            Tokenizer(folder, rows)
    Tokenizer(folder, 600 + 411)  # as many rows as Pythia-12b has to spare
    asking = tokenizer.fast
    asking.enable_padding(length=64)
    asking.enable_truncation(8)
    asking.save(str(tmp_path / "tokenizer.json"))
    assert (
        Tokenizer(tmp_path, 640).encode(texts) == ids
    )  # the file's own padding and truncation are not wanted here


# ---- the scripts


def losses(run_folder):
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in lines if "loss" in record]


def test_the_chain_from_summaries_to_the_table(tmp_path, data_folder, folder):
    run(
        "summarize.py",
        "--data",
        data_folder,
        "--model",
        folder,
        "--run",
        tmp_path,
        "--max-new-tokens",
        8,
    )
    run("train.py", "--run", tmp_path, "--epochs", 2, "--batch-size", 8, "--lr", 0.01)
    done = run("evaluate.py", "--run", tmp_path)
    assert "trained (adapter)" in done.stdout
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["target_modules"] == list(ATTENTION)  # the default follows the model
    assert json.loads((tmp_path / "config.json").read_text())["train"]["lora_targets"] == list(
        ATTENTION
    )
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 2 * 2
    # The scores are those of the slow way: each candidate's prompt alone, the adapter in PEFT, transformers' model.
    domain, items, splits = load_dataset(data_folder, ("test",))
    theirs = PeftModel.from_pretrained(
        GPTNeoXForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    ).eval()
    tokenizer = Tokenizer(folder, 640)
    answers = list(trsr.answer_ids(tokenizer.encode, domain))
    lines = (tmp_path / "summaries.jsonl").read_text().splitlines()
    summaries = {line["user"]: line["summary"] for line in map(json.loads, lines)}
    found = [json.loads(line) for line in (tmp_path / "scores-test.jsonl").read_text().splitlines()]
    assert len(found) == len(splits["test"]) == 4
    for record, example in zip(found, splits["test"], strict=True):
        recent, summary = [items[i] for i in example.history[-3:]], summaries[example.user]
        texts = [items[i] for i in record["candidates"]]
        prompts = trsr.recommendation_prompts("hierarchical", domain, summary, recent, texts)
        for prompt, score in zip(prompts, record["scores"], strict=True):
            with torch.no_grad():
                logits = theirs(torch.tensor(tokenizer.encode([prompt]))).logits[0, -1, answers]
            assert score == pytest.approx(torch.softmax(logits, 0)[0].item(), abs=1e-4)
    again = ("--epochs", 2, "--batch-size", 8, "--lr", 0.01, "--lora-targets", "dense_h_to_4h")
    refused = run("train.py", "--run", tmp_path, *again, check=False)
    assert "lora_targets ['query_key_value', 'dense'] (now ['dense_h_to_4h'])" in refused.stderr


def test_targets_that_are_asked_for_and_bf16(tmp_path, data_folder, folder):
    flags = (
        "--data",
        data_folder,
        "--model",
        folder,
        "--paradigm",
        "recent-only",
        "--batch-size",
        8,
        "--dtype",
        "bf16",
    )
    targets = ("dense_h_to_4h", "dense_4h_to_h")
    run(
        "train.py",
        *flags,
        "--run",
        tmp_path / "lora",
        "--epochs",
        1,
        "--lr",
        0.01,
        "--lora-targets",
        *targets,
    )
    names = set(load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors"))
    kinds = [f"mlp.{target}.lora_{part}.weight" for target in targets for part in "AB"]
    assert names == {
        f"base_model.model.gpt_neox.layers.{i}.{kind}" for i in range(2) for kind in kinds
    }
    run(
        "train.py", *flags, "--run", tmp_path / "whole", "--epochs", 2, "--lr", 0.003, "--lora-r", 0
    )  # under autocast
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.5
    for name in ("lora", "whole"):
        run("evaluate.py", "--run", tmp_path / name, "--split", "val")
        assert json.loads((tmp_path / name / "results.json").read_text())["users"] == 4


def test_item_embeddings_for_the_baselines(folder, tiny):
    texts = ["Title: blue lamp", "Title: coral oven glove; Color: amber", "x"]
    found = by_llama(folder, texts, CPU)
    reference = GPTNeoXForCausalLM.from_pretrained(folder).eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = reference.gpt_neox(
                torch.tensor(Tokenizer(folder, 640).encode([text]))
            ).last_hidden_state[0]
        assert (vector - torch.nn.functional.normalize(states.mean(0), dim=-1)).abs().max() < 1e-5


@pytest.mark.parametrize(("rank", "shard"), [(8, "zero3"), (0, "zero2")])
def test_two_processes_train_the_same_model(tmp_path, data_folder, folder, rank, shard):
    flags = (
        "--data",
        data_folder,
        "--model",
        folder,
        "--paradigm",
        "recent-only",
        "--batch-size",
        8,
        "--lr",
        0.01,
    )
    flags += ("--epochs", 1, "--lora-dropout", 0, "--lora-r", rank, "--shard", shard)
    run("train.py", *flags, "--run-dir", tmp_path / "one")
    run(
        "train.py", *flags, "--run-dir", tmp_path / "two", "--activation-checkpointing", processes=2
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert len(losses(tmp_path / "two")) == 3
    if rank == 0:
        run("evaluate.py", "--run", tmp_path / "two", "--split", "val")
        reference = GPTNeoXForCausalLM.from_pretrained(tmp_path / "two" / "model").eval()
        model = load_model(tmp_path / "two" / "model", CPU, torch.float32)
        with torch.no_grad():
            ids = random_ids(2, 30)
            assert (model(ids) - reference(ids).logits).abs().max() < 1e-4
            assert (model(ids) - load_model(folder, CPU, torch.float32)(ids)).abs().max() > 1e-2


def test_random_weights_of_a_pythia_s_shape_are_read_by_transformers(tmp_path):
    config = random_model.config_of(
        "pythia-1.4b", hidden_size=128, num_hidden_layers=2, vocab_size=640
    )
    total = random_model.write_model(tmp_path, config, torch.float32, 0)
    reference = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    assert total == sum(p.numel() for p in reference.parameters())
    with torch.no_grad():
        ids = random_ids(2, 30)
        assert (
            load_model(tmp_path, CPU, torch.float32)(ids) - reference(ids).logits
        ).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "millions"), [("pythia-1.4b", 1414.6), ("pythia-2.8b", 2775.2)])
def test_the_shapes_have_the_parameters_that_pythia_has(tmp_path, name, millions):
    (tmp_path / "config.json").write_text(json.dumps(random_model.config_of(name)))
    with torch.device("meta"):
        model = build_model(tmp_path)
    assert isinstance(model, GPTNeoX)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_broken_config(tmp_path, folder, request):
    here = copied(folder, tmp_path / "m")

    def use():
        config = load_config(here)
        if config.vocab_size * config.hidden_size * config.num_hidden_layers < 1 << 32:
            load_model(here, CPU, torch.float32)(torch.tensor([[3, 4, 5]]))

    assert survive(here / "config.json", use, times(request, 100))["refused"] > 10
