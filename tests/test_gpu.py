"""What only a GPU runs: FlexAttention against the dense mask, and the scripts in bf16. Skipped where there is none."""

import json

import pytest
import torch
from helpers import generate, run
from test_llama import random_ids, random_trees, separate_loss, sequences

from evaluate import score_packs
from llama import attend, compile_layers, load_model
from lora import LoRAConfig, adapter_tensors, apply_lora
from models import hub
from ops.int8 import WAYS, few_rows_product, quantize
from ops.masks import additive, tree_rule
from ops.packs import pack_trees
from summarize import Generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("dtype", "head"), [(torch.float32, 256), (torch.float32, 192), (torch.bfloat16, 256)]
)
def test_small_blocks_with_wide_heads(dtype, head):
    (pack,) = pack_trees(random_trees(12, 6), 99999, pad_to=256)
    pack, n = pack.to(GPU), torch.Generator(GPU).manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, len(pack.ids), head, device=GPU, dtype=dtype, generator=n)
        for _ in range(3)
    )
    rows = torch.arange(len(pack.ids), device=GPU)
    seen = tree_rule(pack.ends)(None, None, rows[:, None], rows)
    with torch.no_grad():
        error = attend(q, k, v, pack.mask()) - attend(q, k, v, additive(seen, dtype))
    assert error.abs().max() < (1e-4 if dtype is torch.float32 else 2e-2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    from conftest import write_model

    folder = tmp_path_factory.mktemp("wide")
    write_model(folder, hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    return folder


def test_flex_attention_equals_separate_texts(wide):
    trees = random_trees(12, 6)
    model = load_model(wide, GPU, torch.float32)
    slow = load_model(wide, torch.device("cpu"), torch.float32)
    packs = pack_trees(trees, 256, pad_to=256)
    assert len(packs) > 1
    scores = score_packs(model, packs, [17, 400])
    for (t, b), found in scores.items():
        with torch.no_grad():
            alone = slow(torch.tensor([sequences(trees[t])[b]]))[0, -1, [17, 400]]
        assert (torch.tensor(found) - alone).abs().max() < 1e-4


def test_scoring_never_makes_the_host_wait_for_the_gpu(wide):
    model = load_model(wide, GPU, torch.float32)
    packs = pack_trees(random_trees(12, 6), 256, pad_to=256)
    expected = score_packs(model, packs, [17, 400])  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert score_packs(model, packs, [17, 400]) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flex_attention_gives_the_loss_and_gradients_of_separate_examples(wide):
    trees = random_trees(12, 2)
    slow = apply_lora(load_model(wide, torch.device("cpu"), torch.float32), LoRAConfig(dropout=0.0))
    fast = apply_lora(load_model(wide, GPU, torch.float32), LoRAConfig(dropout=0.0))
    for (name, p), q in zip(
        adapter_tensors(slow).items(), adapter_tensors(fast).values(), strict=True
    ):
        torch.nn.init.normal_(p, std=0.1)
        q.data.copy_(p)
        assert name
    expected, count = separate_loss(slow, trees)
    (expected / count).backward()
    total = sum(fast.loss(pack.to(GPU)) for pack in pack_trees(trees, 256, pad_to=256))
    (total / count).backward()
    assert abs(total.item() - expected.item()) / expected.item() < 1e-5
    for (name, p), q in zip(
        adapter_tensors(slow).items(), adapter_tensors(fast).values(), strict=True
    ):
        assert (p.grad - q.grad.cpu()).abs().max() < 1e-5, name


def test_generation_on_the_gpu_equals_the_cpu(wide):
    prompts = [
        torch.randint(3, 640, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (5, 40, 17)
    ]
    expected = generate(load_model(wide, torch.device("cpu"), torch.float32), prompts, 32, [2])
    assert generate(load_model(wide, GPU, torch.float32), prompts, 32, [2]) == expected


def test_compiled_and_captured_generation_equals_the_cpu(wide):
    prompts = [random_ids(n, seed=n).tolist() for n in range(4, 250, 17)]
    expected = generate(load_model(wide, torch.device("cpu"), torch.float32), prompts, 40, [2])
    model = load_model(wide, GPU, torch.float32)
    compile_layers(model)
    generator, found = Generator(model, 6, 40, [2], slots=320), {}
    generator.submit(enumerate(prompts))
    while len(found) < len(prompts):
        found |= generator.step()
    assert generator.graph is not None
    assert [found[i] for i in range(len(prompts))] == expected


@pytest.mark.parametrize("rows", [1, 16, 24, 100, 128])
@pytest.mark.parametrize(("out", "width"), [(4096, 4096), (11008, 4096), (4096, 11008), (200, 136)])
def test_the_int8_product_for_few_rows(rows, out, width):
    x = torch.randn(
        rows, width, device=GPU, generator=torch.Generator(GPU).manual_seed(0)
    ).bfloat16()
    weight, _ = quantize(
        torch.randn(out, width, device=GPU, generator=torch.Generator(GPU).manual_seed(1))
    )
    found, expected = few_rows_product(x, weight), x.double() @ weight.double().T
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(found, few_rows_product(x, weight))


@pytest.mark.parametrize("way", WAYS)
def test_int8_on_the_gpu(wide, way):
    pytest.importorskip("bitsandbytes")
    ids = torch.randint(3, 640, (2, 30), generator=torch.Generator().manual_seed(0)).to(GPU)
    with torch.no_grad():
        full = load_model(wide, GPU, torch.bfloat16)(ids).float()
        model = load_model(wide, GPU, torch.bfloat16, int8=way)
        assert 1e-4 < (model(ids).float() - full).norm() / full.norm() < 1e-1
    assert len(generate(model, [ids[0].tolist()], 8, [])[0]) == 8


def test_the_chain_in_bf16(tmp_path, data_folder, wide, tokenizer_model):
    (wide / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    run(
        "summarize.py",
        "--data",
        data_folder,
        "--model",
        wide,
        "--run",
        tmp_path,
        "--max-new-tokens",
        8,
    )
    done = run(
        "train.py", "--run", tmp_path, "--epochs", 2, "--batch-size", 8, "--pack-tokens", 1024
    )
    assert "GPU memory" in done.stdout
    run("evaluate.py", "--run", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["table"]["trained"]["Recall@10"]["mean"] == 1.0


def test_a_pythia_on_the_gpu_equals_the_cpu(tmp_path):
    from test_neox import write_neox

    write_neox(tmp_path, hidden_size=128)
    slow, fast = (
        hub.load_model(tmp_path, device, torch.float32) for device in (torch.device("cpu"), GPU)
    )
    compile_layers(fast)
    trees, prompts = (
        random_trees(12, 6),
        [random_ids(n, seed=n).tolist() for n in range(4, 250, 17)],
    )
    wanted = score_packs(slow, pack_trees(trees, 256), [17, 400])
    for leaf, found in score_packs(fast, pack_trees(trees, 256, pad_to=256), [17, 400]).items():
        assert found == pytest.approx(wanted[leaf], abs=1e-4)
    assert generate(fast, prompts, 40, [0], 6) == generate(slow, prompts, 40, [0])
    (pack,) = pack_trees(random_trees(6, 2), 512, pad_to=512)
    for model, here in ((slow, pack), (fast, pack.to(GPU))):
        model.loss(here).backward()
    for (name, p), q in zip(slow.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad - q.grad.cpu()).norm() / p.grad.norm() < 1e-3, name


@pytest.mark.parametrize("rank", [8, 0])
def test_a_pythia_in_bf16(tmp_path, data_folder, tokenizer_model, rank):
    from test_neox import write_neox

    write_neox(tmp_path / "pythia", hidden_size=128)
    (tmp_path / "pythia" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    flags = (
        "--data",
        data_folder,
        "--model",
        tmp_path / "pythia",
        "--paradigm",
        "recent-only",
        "--lora-r",
        rank,
    )
    run(
        "train.py",
        *flags,
        "--run",
        tmp_path,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--pack-tokens",
        1024,
    )
    run("evaluate.py", "--run", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["table"]["trained"]["Recall@10"]["mean"] == 1.0
