"""llama.py, and models/neox.py in its place: against transformers, and fast against slow.

Every test of an architecture is of both.
"""

import pytest
import torch
from helpers import (
    CPU,
    FAMILIES,
    LLAMA3,
    NEOX,
    last_logits,
    random_deep_trees,
    random_ids,
    random_trees,
    separate_loss,
    sequences,
)
from safetensors.torch import load_file

import llama
from evaluate import score_packs
from lora import LoRAConfig, adapter_tensors, apply_lora
from ops.masks import block_mask
from ops.packs import pack_trees

pytestmark = pytest.mark.usefixtures("_fresh_compiler")


# ---- Logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, shards):
    architecture, changes = FAMILIES[family]
    reference = architecture.write(tmp_path, shards=shards, **changes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ids = random_ids(3, 70)
    model = architecture.load(tmp_path, CPU, torch.float32)
    with torch.no_grad():
        ours, theirs = model(ids), reference(ids).logits
    assert theirs.std() > 0.1  # the comparison means something
    assert (ours - theirs).abs().max() < 1e-4
    files = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert {name for name, _ in model.named_parameters()} == files  # nothing is renamed


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_equal_transformers(tmp_path, family):
    architecture, changes = FAMILIES[family]
    reference = architecture.write(tmp_path, dtype=torch.bfloat16, **changes)
    ids = random_ids(2, 40)
    with torch.no_grad():
        ours = architecture.load(tmp_path, CPU, torch.bfloat16)(ids)
        theirs = reference(ids).logits.float()
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - theirs).norm() / theirs.norm() < 2e-2


def test_rotary_tables_equal_transformers_far_out():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    rope["original_max_position_embeddings"] = 8192
    sizes = {"hidden_size": 64, "num_attention_heads": 2}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=rope))
    positions = torch.tensor([[0, 1, 17, 4095, 100000]])
    config = llama.Config(1, 64, 1, 1, 2, 2, 32, 1e-6, 1, False, False, False, 5e5, rope, ())
    cos, sin = llama.rotary_tables(config, positions, torch.float32)
    expected = theirs(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, :, 0], expected[0], atol=1e-4, rtol=0)
    sign = torch.ones(32).index_fill_(0, torch.arange(16), -1)
    torch.testing.assert_close(sin[:, :, 0] * sign, expected[1], atol=1e-4, rtol=0)


# ---- Packs


LLAMA_PACKS = [(1, 2, 999), (6, 3, 999), (9, 4, 90), (3, 4, 80), (5, 21, 60)]
NEOX_PACKS = [(5, 9, 999), (5, 9, 60)]


@pytest.mark.parametrize(
    ("family", "n", "branches", "max_tokens"),
    [
        *(("llama-grouped-query", *shape) for shape in LLAMA_PACKS),
        *(("neox-pythia", *shape) for shape in NEOX_PACKS),
        *(("neox-sequential", *shape) for shape in NEOX_PACKS),
        *(("neox-whole-heads", *shape) for shape in NEOX_PACKS),
    ],
)
def test_packed_logits_and_scores_equal_separate_texts(tmp_path, family, n, branches, max_tokens):
    architecture, changes = FAMILIES[family]
    architecture.write(tmp_path, **changes)
    model = architecture.load(tmp_path, CPU, torch.float32)
    trees = random_trees(n, branches)
    packs = pack_trees(trees, max_tokens, pad_to=16)
    too_large = any(tree.size > max_tokens for tree in trees)
    assert any(pack.shared_prefix for pack in packs) == too_large  # a tree that was split

    seen, scores = set(), score_packs(model, packs, [17, 400])  # two columns of the logits
    for pack in packs:
        assert len(pack.ids) % 16 == 0
        assert pack.tokens <= max_tokens
        with torch.no_grad():
            packed = model(pack.ids[None], pack.positions[None], pack.mask())[0]
        for (t, b), row in pack.leaves.items():
            alone = last_logits(model, sequences(trees[t])[b])
            assert (packed[row] - alone).abs().max() < 1e-4
            assert (torch.tensor(scores[t, b]) - alone[[17, 400]]).abs().max() < 1e-4
            seen.add((t, b))
    assert seen == scores.keys() == {(t, b) for t in range(n) for b in range(branches)}


@pytest.mark.parametrize("max_tokens", [9999, 60])
def test_packed_logits_and_scores_of_deep_trees_equal_separate_texts(tiny, max_tokens):
    trees = random_deep_trees(5, 12)
    packs = pack_trees(trees, max_tokens, pad_to=16)
    assert any(pack.shared_prefix for pack in packs) == (max_tokens == 60)
    seen, scores = set(), score_packs(tiny, packs, [17, 400])
    for pack in packs:
        assert pack.tokens <= max_tokens
        with torch.no_grad():
            packed = tiny(pack.ids[None], pack.positions[None], pack.mask())[0]
        for (t, b), row in pack.leaves.items():
            tree = trees[t]
            ids = sequences(tree)[tree.leaves.index(b)]
            alone = last_logits(tiny, ids)
            assert int(pack.positions[row]) == len(ids) - 1
            assert (packed[row] - alone).abs().max() < 1e-4
            assert (torch.tensor(scores[t, b]) - alone[[17, 400]]).abs().max() < 1e-4
            seen.add((t, b))
    assert seen == scores.keys() == {(t, b) for t, tree in enumerate(trees) for b in tree.leaves}


@pytest.mark.parametrize(
    ("max_tokens", "lora", "checkpointing", "deep"),
    [
        (9999, False, False, False),
        (9999, False, False, True),
        (100, False, False, False),
        (60, False, False, True),
        (100, False, True, False),
        (100, True, False, False),
        (60, True, True, True),
    ],
)
def test_shared_prefix_loss_and_gradients_equal_separate_examples(
    architecture, tiny, max_tokens, lora, checkpointing, deep
):
    if lora:
        apply_lora(tiny, LoRAConfig(targets=architecture.attention, dropout=0.0))
        for parameter in adapter_tensors(tiny).values():
            torch.nn.init.normal_(parameter, std=0.1)
    trees = random_deep_trees(4, 9) if deep else random_trees(7, 2)
    expected, count = separate_loss(tiny, trees)
    (expected / count).backward()
    wanted = {name: p.grad.clone() for name, p in tiny.named_parameters() if p.requires_grad}
    whole = {"llama": 2 * 9 + 3, "neox": 2 * 12 + 4}[architecture.name]
    assert len(wanted) == (2 * 2 * len(architecture.attention) if lora else whole)

    tiny.zero_grad()
    tiny.model.checkpointing = checkpointing
    packs = pack_trees(trees, max_tokens, pad_to=8)
    assert sum(p.weights.sum() for p in packs) == count
    total = sum(tiny.train().loss(pack, chunk=20) for pack in packs)
    (total / count).backward()
    assert abs(total - expected) / expected < 1e-5
    for name, parameter in tiny.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - wanted[name]).abs().max() < 1e-5, name


# ---- The compiler


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_the_mask_of_gpus_is_one_graph_to_the_compiler(tiny, training):
    (pack,) = pack_trees(random_trees(6, 4), 999, pad_to=256)
    inputs = pack.ids[None], pack.positions[None]
    with torch.no_grad():
        expected = tiny(*inputs, pack.mask())[0, : pack.tokens]
    with torch.set_grad_enabled(training):
        mask = block_mask(pack.ends)
    for layer in tiny.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (tiny(*inputs, mask)[0, : pack.tokens] - expected).abs().max() < 1e-4


# Its kernel takes seconds to build, so for one architecture only.
@pytest.mark.parametrize("architecture", [NEOX], ids=str)
def test_the_mask_of_gpus_gives_the_same_logits(tiny):
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
