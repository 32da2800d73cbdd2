"""llama.py against transformers, and each of its fast paths against the slow one."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, needs_shared, write_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import llama
from evaluate import score_packs
from llama import CheckpointError, load_model
from models.hub import find_model
from models.tokenizer import Tokenizer
from ops.cache import KVCache
from ops.checkpoint import fingerprint
from ops.int8 import WAYS
from ops.masks import block_mask
from ops.packs import Tree, grow_trees, make_tree, pack_trees
from summarize import generate

CPU = torch.device("cpu")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "wide-heads": {"head_dim": 24},
    "narrow-heads": {"head_dim": 8, "tie_word_embeddings": True},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    },
    "rope-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "deep-eps": {
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
    "all-at-once": {
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **LLAMA3},
    },
}


def random_ids(*shape, seed=1):
    return torch.randint(3, 640, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny(model_folder):
    return load_model(model_folder, CPU, torch.float32)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, shards):
    reference = write_model(tmp_path, shards=shards, **FAMILIES[family])
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ids = random_ids(3, 70)
    ours = load_model(tmp_path, CPU, torch.float32)(ids)
    with torch.no_grad():
        theirs = reference(ids).logits
    assert theirs.std() > 0.1  # the comparison means something
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_equal_transformers(tmp_path, family):
    reference = write_model(tmp_path, dtype=torch.bfloat16, **FAMILIES[family])
    ids = random_ids(2, 40)
    ours = load_model(tmp_path, CPU, torch.bfloat16)(ids).float()
    with torch.no_grad():
        theirs = reference(ids).logits.float()
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() / theirs.norm() < 2e-2


def test_old_and_new_config_layout_are_the_same(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    write_model(tmp_path, rope_parameters=rope)
    new = llama.load_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old = llama.load_config(tmp_path)
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_rotary_tables_equal_transformers_far_out():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        **LLAMA3,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    )
    positions = torch.tensor([[0, 1, 17, 4095, 100000]])
    config = llama.Config(1, 64, 1, 1, 2, 2, 32, 1e-6, 1, False, False, False, 5e5, rope, ())
    cos, sin = llama.rotary_tables(config, positions, torch.float32)
    expected = theirs(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, :, 0], expected[0], atol=1e-4, rtol=0)
    sign = torch.ones(32).index_fill_(0, torch.arange(16), -1)
    torch.testing.assert_close(sin[:, :, 0] * sign, expected[1], atol=1e-4, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_weights_are_the_mapped_file_and_not_a_copy(model_folder):
    model = load_model(model_folder, CPU, torch.float32)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        line[0].split("-") for line in maps if line[-1] == str(model_folder / "model.safetensors")
    ]
    spans = [(int(a, 16), int(b, 16)) for a, b in spans]
    for name, parameter in model.named_parameters():
        assert any(a <= parameter.data_ptr() < b for a, b in spans), name


# ---- packing


def chain(*lengths, seed=0):
    ids = iter(random_ids(sum(lengths), seed=seed).tolist())
    return [[next(ids) for _ in range(n)] for n in lengths]


def random_trees(n, branches, seed=0):
    (trunk,) = chain(7, seed=seed + 100)
    trees = []
    for i in range(n):
        stem, *tails = chain(
            5 + 3 * i % 11, *[3 + (i + b) % 5 for b in range(branches)], seed=seed + i
        )
        trees.append(make_tree([trunk + stem + tail for tail in tails]))
    return trees


def sequences(tree):
    return [tree.prefix + branch for branch in tree.branches]


def test_make_tree_finds_the_longest_common_prefix():
    assert make_tree([[1, 2, 3, 4], [1, 2, 5]]) == Tree([1, 2], [[3, 4], [5]])
    assert make_tree([[1, 2], [1, 2, 5]]) == Tree([1], [[2], [2, 5]])  # a branch keeps a token
    assert make_tree([[1, 2, 3]]) == Tree([1, 2], [[3]])
    assert make_tree([[1], [2]]) == Tree([], [[1], [2]])


@pytest.mark.parametrize(
    ("n", "branches", "max_tokens"), [(1, 2, 999), (6, 3, 999), (9, 4, 90), (5, 21, 60)]
)
def test_packed_logits_equal_separate_texts(tiny, n, branches, max_tokens):
    trees = random_trees(n, branches)
    packs = pack_trees(trees, max_tokens, pad_to=16)
    seen = set()
    for pack in packs:
        assert len(pack.ids) % 16 == 0
        assert pack.tokens <= max_tokens
        with torch.no_grad():
            packed = tiny(pack.ids[None], pack.positions[None], pack.mask())[0]
        for (t, b), row in pack.leaves.items():
            alone = tiny(torch.tensor([trees[t].prefix + trees[t].branches[b]]))[0, -1]
            assert (packed[row] - alone).abs().max() < 1e-4
            seen.add((t, b))
    assert seen == {(t, b) for t in range(n) for b in range(branches)}


def test_packs_share_the_trunk_and_every_prefix():
    trees = random_trees(6, 3)
    (pack,) = pack_trees(trees, 9999)
    trunk = 7
    assert pack.tokens == trunk + sum(tree.size - trunk for tree in trees)
    assert (pack.ends == len(pack.ids)).nonzero()[:trunk, 0].tolist() == list(range(trunk))


def test_scores_are_two_columns_of_the_logits(tiny):
    trees = random_trees(3, 4)
    scores = score_packs(tiny, pack_trees(trees, 80), [17, 400])
    assert len(scores) == 12
    for (t, b), found in scores.items():
        alone = tiny(torch.tensor([trees[t].prefix + trees[t].branches[b]]))[0, -1, [17, 400]]
        assert (torch.tensor(found) - alone).abs().max() < 1e-4


def test_the_mask_is_the_rule_spelled_out():
    trees = random_trees(4, 3)
    (pack,) = pack_trees(trees, 999, pad_to=64)
    n, trunk = len(pack.ids), 7
    mask, first = torch.zeros(n, n, dtype=torch.bool), 0
    blocks = pack.mask(block=24)
    for keys, seen in zip(blocks.keys.split(blocks.sizes), blocks.seen, strict=True):
        assert seen.any(0).all()  # no key that nobody sees
        mask[first : first + len(seen), keys] = seen
        first += len(seen)
    assert first == n
    expected = torch.zeros_like(mask)
    for (t, b), last in pack.leaves.items():
        stem, branches = len(trees[t].prefix) - trunk, [len(branch) for branch in trees[t].branches]
        begin = last + 1 - sum(branches[: b + 1]) - stem  # of the tree
        path = [
            *range(trunk),
            *range(begin, begin + stem),
            *range(last + 1 - branches[b], last + 1),
        ]
        for i, query in enumerate(path):
            expected[query, path[: i + 1]] = True
    assert (mask[: pack.tokens] == expected[: pack.tokens]).all()
    assert (
        mask.diagonal().all()
    )  # also where padding is, since a softmax over nothing is not a number


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_the_mask_of_gpus_is_one_graph_to_the_compiler(model_folder, training):
    model = load_model(model_folder, CPU, torch.float32)
    (pack,) = pack_trees(random_trees(6, 4), 999, pad_to=256)
    inputs = pack.ids[None], pack.positions[None]
    with torch.no_grad():
        expected = model(*inputs, pack.mask())[0, : pack.tokens]
    with torch.set_grad_enabled(training):
        mask = block_mask(pack.ends)
    for layer in model.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (model(*inputs, mask)[0, : pack.tokens] - expected).abs().max() < 1e-4


def test_a_tree_larger_than_a_pack_is_split_and_its_prefix_computed_once(tiny, monkeypatch):
    trees = [random_trees(1, 8)[0], *random_trees(2, 2, seed=1), random_trees(1, 30, seed=2)[0]]
    packs = pack_trees(trees, 40)
    assert sum(len(p.leaves) for p in packs) == 8 + 4 + 30
    assert {len({t for t, _ in p.leaves}) for p in packs if p.known} == {1}
    read = []
    forward = tiny.forward
    monkeypatch.setattr(
        tiny, "forward", lambda ids, *a, **k: read.append(ids.shape[1]) or forward(ids, *a, **k)
    )
    scores = score_packs(tiny, packs, [17, 400])
    split = [
        tree for t, tree in enumerate(trees) if any(p.known and (t, 0) in p.leaves for p in packs)
    ]
    assert len(split) == 2
    repeated = sum(len(p.ids) for p in packs) - sum(read)
    assert repeated == sum(p.known for p in packs) - sum(len(tree.prefix) for tree in split)
    shuffled = score_packs(tiny, packs[::-1], [17, 400])  # any order will do
    for (t, b), found in scores.items():
        alone = forward(torch.tensor([trees[t].prefix + trees[t].branches[b]]))[0, -1, [17, 400]]
        assert (torch.tensor(found) - alone).abs().max() < 1e-4
        assert (torch.tensor(shuffled[t, b]) - alone).abs().max() < 1e-4


def separate_loss(model, trees):
    total, count = 0.0, 0
    for ids in (s for tree in trees for s in sequences(tree)):
        logits = model(torch.tensor([ids]))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        count += len(ids) - 1
    return total, count


@pytest.mark.parametrize("max_tokens", [9999, 100])
def test_shared_prefix_loss_and_gradients_equal_separate_examples(model_folder, max_tokens):
    trees = random_trees(7, 2)
    model = load_model(model_folder, CPU, torch.float32)
    expected, count = separate_loss(model, trees)
    (expected / count).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packs = pack_trees(trees, max_tokens, pad_to=8)
    assert sum(p.weights.sum() for p in packs) == count
    total = sum(model.loss(p, chunk=20) for p in packs)
    (total / count).backward()
    assert abs(total - expected) / expected < 1e-5
    for name, parameter in model.named_parameters():
        assert (parameter.grad - wanted[name]).abs().max() < 1e-5, name


# ---- generation


def test_cached_decoding_equals_uncached(tiny):
    ids = random_ids(2, 30)
    cache = KVCache(tiny.config, 2, 40, CPU, torch.float32)
    with torch.no_grad():
        whole = tiny(ids)
        slots = torch.arange(30)
        prefix = tiny(
            ids[:, :20],
            slots[:20].expand(2, 20),
            (slots[:20] <= slots[:20, None])[None, None],
            cache.layers,
        )
        assert (prefix - whole[:, :20]).abs().max() < 1e-4
        for t in range(20, 30):
            position = torch.full((2, 1), t)
            step = tiny(
                ids[:, t : t + 1], position, (slots[: t + 1] <= t)[None, None, None], cache.layers
            )
            assert (step[:, 0] - whole[:, t]).abs().max() < 1e-4


def test_greedy_ids_equal_transformers_generate(model_folder, tiny):
    reference = LlamaForCausalLM.from_pretrained(model_folder).eval()
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 61, 23, 40, 8, 33)]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = reference.generate(
        padded, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    expected = []
    for row in out[:, width:].tolist():
        expected.append(row[: row.index(2)] if 2 in row else row)
    assert max(map(len, expected)) == 64
    assert generate(tiny, prompts, 64, [2], batch_size=6) == expected


def test_prompts_that_begin_alike_are_read_once_and_continue_as_if_alone(tiny):
    parts = [random_ids(n, seed=n).tolist() for n in (40, 45, 9, 21, 7, 33, 14, 18)]
    prompts = [parts[i % 2] + parts[2 + i] for i in range(6)] + [parts[3], parts[0] + parts[2]]
    trees, places = grow_trees(prompts)
    assert sorted(places.values()) == list(range(8))
    assert sum(tree.size for tree in trees) < sum(map(len, prompts)) - 3 * 40
    for (t, b), place in places.items():
        assert trees[t].prefix + trees[t].branches[b] == prompts[place]
    alone = [generate(tiny, [p], 24, [2])[0] for p in prompts]
    for batch_size in (1, 3, 8):
        assert generate(tiny, prompts, 24, [2], batch_size) == alone


def test_prompts_that_come_late_and_first(tiny):
    prompts = [random_ids(n, seed=n).tolist() for n in (25, 61, 23, 40, 8, 33, 12)]
    generator, found = llama.Generator(tiny, 2, 12, [2]), []
    generator.submit(enumerate(prompts[:4]))
    while generator.waiting or generator.rows:
        for key, ids in generator.step():
            found.append(key)
            assert ids == generate(tiny, [prompts[key]], 12, [2])[0]
            if key == 0:
                generator.submit(enumerate(prompts[4:], 4), first=True)
    assert sorted(found) == list(range(7))
    assert found.index(6) < found.index(3)


def test_generation_does_not_depend_on_the_batch(tiny):
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 61, 23, 40, 8, 33, 12)]
    alone = [generate(tiny, [p], 24, [2])[0] for p in prompts]
    assert generate(tiny, prompts, 24, [2], batch_size=3) == alone
    assert generate(tiny, prompts, 24, [2], batch_size=7) == alone


def test_generation_stops_at_the_end_token(tiny):
    prompt = random_ids(9).tolist()
    free = generate(tiny, [prompt], 16, [])[0]
    stop = free[5]
    assert generate(tiny, [prompt], 16, [stop])[0] == free[: free.index(stop)]
    assert generate(tiny, [], 16, [2]) == []


@pytest.mark.parametrize("way", WAYS)
def test_int8_stays_close_to_the_full_model(model_folder, way):
    pytest.importorskip("bitsandbytes")
    ids = random_ids(2, 30)
    full = load_model(model_folder, CPU, torch.float32)(ids)
    model = load_model(model_folder, CPU, torch.float32, int8=way)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.int8
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        error = (model(ids) - full).norm() / full.norm()
    assert 1e-5 < error < 5e-2
    assert len(generate(model, [ids[0].tolist()], 8, [])[0]) == 8


# ---- files


def change_json(path, **changes):
    record = json.loads(path.read_text())
    for field, value in changes.items():
        if value is None:
            record.pop(field)
        else:
            record[field] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type is 'gpt_neox'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "field 'factor' is missing"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"intermediate_size": 100},
            "mlp.down_proj.weight has shape (48, 96), expected shape (48, 100)",
        ),
        ({"num_hidden_layers": 3}, "lack 9 tensors, the first is model.layers.2."),
        ({"num_hidden_layers": 1}, "config.json has no place for it"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path, changes, message):
    write_model(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path, CPU, torch.float32)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_rotary_frequencies_may_be_left_over(tmp_path):
    write_model(tmp_path)
    path, ids = tmp_path / "model.safetensors", torch.arange(3, 20)[None]
    whole, expected = load_file(path), load_model(tmp_path, CPU, torch.float32)(ids)
    save_file(whole | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path)
    assert torch.equal(load_model(tmp_path, CPU, torch.float32)(ids), expected)
    save_file(whole | {"model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, path)
    with pytest.raises(
        CheckpointError, match=r"tensor .*q_norm.weight has shape \(6,\), config.json has no place"
    ):
        load_model(tmp_path, CPU, torch.float32)


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
    for unsafe in ("../x.safetensors", "/tmp/x.safetensors", "pytorch_model.bin"):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": unsafe}})
        )
        with pytest.raises(CheckpointError, match="not the plain name"):
            load_model(tmp_path, CPU, torch.float32)


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="no such model folder"):
        find_model("./nowhere")
    with pytest.raises(CheckpointError, match="neither a folder here nor a model on the hub"):
        find_model("not a/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        find_model("owner/absent-model")


def test_fingerprint_tells_models_apart(tmp_path):
    write_model(tmp_path / "a", seed=0)
    write_model(tmp_path / "b", seed=0)
    write_model(tmp_path / "c", seed=1)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


# ---- tokenizers


def test_sentencepiece_and_fast_tokenizer_give_the_same_ids(tmp_path, model_folder, monkeypatch):
    from transformers import LlamaTokenizerFast

    texts = ["Title: blue lamp", "### User:\nHello\n\n### Assistant:\nYes", "naïve £5 ☃", ""]
    slow = Tokenizer(model_folder, 640)
    (tmp_path / "fast").mkdir()
    LlamaTokenizerFast.from_pretrained(
        model_folder, legacy=True, add_bos_token=True
    ).save_pretrained(tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink(missing_ok=True)
    fast = Tokenizer(tmp_path / "fast", 640)
    assert fast.encode(texts) == slow.encode(texts)
    assert [ids[0] for ids in fast.encode(texts)] == [1] * 4
    assert slow.decode(slow.encode(texts)[1]) == texts[1]
    assert 2 not in fast.encode(["a </s> b"])[0][1:]
    assert 2 not in slow.encode(["a </s> b"])[0]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(CheckpointError, match="pip install"):
        Tokenizer(tmp_path / "fast", 640)


def test_bad_tokenizers_are_named(tmp_path, model_folder):
    with pytest.raises(CheckpointError, match=r"no tokenizer.model or tokenizer.json"):
        Tokenizer(tmp_path, 640)
    (tmp_path / "tokenizer.model").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer(tmp_path, 640)
    for size in (639, 1152):
        with pytest.raises(
            CheckpointError, match=f"640 pieces, but the model's embedding has {size} rows"
        ):
            Tokenizer(model_folder, size)


@needs_shared
def test_the_real_llama2_tokenizer_equals_transformers():
    from transformers import LlamaTokenizer

    folder = SHARED / "tokenizers" / "llama2"
    ours = Tokenizer(folder, 32000)
    theirs = LlamaTokenizer.from_pretrained(folder, legacy=True, add_bos_token=True)
    rows = (SHARED / "data" / "mind" / "news.tsv").read_text().splitlines()[:300]
    texts = [row.split("\t")[3] for row in rows] + [
        "### User:\nx\n\n### Assistant:\nYes",
        "é ☃ \t tab",
    ]
    assert ours.encode(texts) == [theirs(text)["input_ids"] for text in texts]
