"""What only a GPU runs, against the CPU: FlexAttention, CUDA graphs, int8 kernels, and bf16.

Skipped where there is no GPU.
"""

import pytest
import torch
from helpers import (
    CPU,
    LLAMA,
    NEOX,
    generate,
    last_logits,
    random_ids,
    random_prompts,
    random_trees,
    run,
    separate_loss,
    sequences,
    write_model,
    write_neox,
)

from evaluate import score_packs
from files.jsonl import read_json
from llama import attend, compile_layers, load_model
from lora import LoRAConfig, adapter_tensors, apply_lora
from ops.fp8 import Fp8Linear, quantize_rows
from ops.int8 import WAYS, few_rows_product, quantize
from ops.masks import additive, tree_rule
from ops.packs import pack_trees
from summarize import Generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda", 0)
BOTH = pytest.mark.parametrize("architecture", [LLAMA, NEOX], ids=str)


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_model):
    """A model of each architecture with heads of 32, which the kernels take, and a tokenizer."""
    found = {LLAMA: tmp_path_factory.mktemp("llama"), NEOX: tmp_path_factory.mktemp("neox")}
    write_model(found[LLAMA], hidden_size=128)
    write_neox(found[NEOX], hidden_size=128)
    for folder in found.values():
        (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    return found


@pytest.fixture
def slow(architecture, folders):
    return architecture.load(folders[architecture], CPU, torch.float32)


@pytest.fixture
def fast(architecture, folders):
    return architecture.load(folders[architecture], GPU, torch.float32)


@pytest.fixture
def wide(folders):
    return folders[LLAMA]


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator(GPU).manual_seed(seed)
    return torch.randn(*shape, device=GPU, dtype=dtype, generator=generator)


# ---- Packs


@pytest.mark.parametrize(
    ("dtype", "head"), [(torch.float32, 256), (torch.float32, 192), (torch.bfloat16, 256)]
)
def test_small_blocks_with_wide_heads(dtype, head):
    (pack,) = pack_trees(random_trees(12, 6), 99999, pad_to=256)
    pack, n = pack.to(GPU), len(pack.ids)
    q, k, v = (randn(1, 2, n, head, dtype=dtype, seed=seed) for seed in range(3))
    rows = torch.arange(n, device=GPU)
    seen = tree_rule(pack.ends)(None, None, rows[:, None], rows)
    with torch.no_grad():
        error = attend(q, k, v, pack.mask()) - attend(q, k, v, additive(seen, dtype))
    assert error.abs().max() < (1e-4 if dtype is torch.float32 else 2e-2)


@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_equals_separate_texts(slow, fast, compiled):
    if compiled:
        compile_layers(fast)
    trees = random_trees(12, 6)
    packs = pack_trees(trees, 256, pad_to=256)
    assert len(packs) > 1
    scores = score_packs(fast, packs, [17, 400])
    for (t, b), found in scores.items():
        alone = last_logits(slow, sequences(trees[t])[b])[[17, 400]]
        assert (torch.tensor(found) - alone).abs().max() < 1e-4


def test_scoring_never_makes_the_host_wait_for_the_gpu(wide):
    model = load_model(wide, GPU, torch.float32)
    packs = pack_trees(random_trees(12, 6), 256, pad_to=256)
    expected = score_packs(model, packs, [17, 400], graphs=False)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert score_packs(model, packs, [17, 400], graphs=False) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("n", "length"), [(12, 256), (120, 2048)])  # with copies of the first keys
def test_flex_attention_gives_the_loss_and_gradients_of_separate_examples(
    architecture, slow, fast, lora, n, length
):
    if lora:
        config = LoRAConfig(targets=architecture.attention, dropout=0.0)
        adapters = [adapter_tensors(apply_lora(m, config)).values() for m in (slow, fast)]
        for p, q in zip(*adapters, strict=True):
            torch.nn.init.normal_(p, std=0.1)
            q.data.copy_(p)
    trees = random_trees(n, 2)
    expected, count = separate_loss(slow, trees)
    (expected / count).backward()
    packs = pack_trees(trees, length, pad_to=256)
    assert len(packs[0].ids) == length
    total = sum(fast.loss(pack.to(GPU)) for pack in packs)
    (total / count).backward()
    assert abs(total.item() - expected.item()) / expected.item() < 1e-5
    for (name, p), q in zip(slow.named_parameters(), fast.parameters(), strict=True):
        if p.requires_grad:
            error = (p.grad - q.grad.cpu()).abs().max()
            assert error < 1e-5 or error / p.grad.abs().max() < 1e-3, name


# ---- Generation


@BOTH
def test_generation_on_the_gpu_equals_the_cpu(architecture, slow, fast):
    prompts = random_prompts(5, 40, 17)
    expected = generate(slow, prompts, 32, [architecture.eos])
    assert generate(fast, prompts, 32, [architecture.eos]) == expected


@BOTH
def test_compiled_and_captured_generation_equals_the_cpu(architecture, slow, fast):
    prompts, eos = random_prompts(*range(4, 250, 17)), [architecture.eos]
    expected = generate(slow, prompts, 40, eos)
    compile_layers(fast)
    generator, found = Generator(fast, 6, 40, eos, slots=320), {}
    generator.submit(enumerate(prompts))
    while len(found) < len(prompts):
        found |= generator.step()
    assert generator.graph is not None
    assert [found[i] for i in range(len(prompts))] == expected


# ---- Eight bits


@pytest.mark.parametrize("rows", [1, 16, 24, 100, 128])
@pytest.mark.parametrize(("out", "width"), [(4096, 4096), (11008, 4096), (4096, 11008), (200, 136)])
def test_the_int8_product_for_few_rows(rows, out, width):
    x, (weight, _) = randn(rows, width).bfloat16(), quantize(randn(out, width, seed=1))
    found, expected = few_rows_product(x, weight), x.double() @ weight.double().T
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(found, few_rows_product(x, weight))


@pytest.mark.parametrize("way", WAYS)
def test_int8_on_the_gpu(wide, way):
    pytest.importorskip("bitsandbytes")
    ids = random_ids(2, 30).to(GPU)
    with torch.no_grad():
        full = load_model(wide, GPU, torch.bfloat16)(ids).float()
        model = load_model(wide, GPU, torch.bfloat16, int8=way)
        assert 1e-4 < (model(ids).float() - full).norm() / full.norm() < 1e-1
    assert len(generate(model, [ids[0].tolist()], 8, [])[0]) == 8


# ---- Eight bits of floating point


def compiled_layer(layer):
    """The layer compiled on its own; without a reset, other shapes would exceed dynamo's limit."""
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 128, 6912])
@pytest.mark.parametrize(("out", "width"), [(4096, 4096), (11008, 4096), (4096, 11008), (192, 576)])
def test_the_fp8_kernel_equals_its_emulation(rows, out, width, compiled):
    base = torch.nn.Linear(width, out, bias=False, device=GPU, dtype=torch.bfloat16)
    layer = Fp8Linear(base, "training")
    run_layer = compiled_layer(layer) if compiled else layer
    x, g = randn(rows, width).bfloat16().requires_grad_(), randn(rows, out, seed=1).bfloat16()
    y = run_layer(x)
    y.backward(g)

    def emulated(x, weight, scale):
        x8, x_scale = quantize_rows(x)
        return (x8.float() @ weight.float().T) * x_scale * scale

    # Not exact: bf16 rounds by 2^-9, the fast accumulator drops bits, and compiled code divides so
    # that now and then a number becomes its neighbor. e4m3 alone is off by 3.5e-2.
    expected = emulated(x.detach(), layer.weight, layer.scale)
    gradient = emulated(g, layer.turned, layer.turned_scale)
    for found, exact in ((y, expected), (x.grad, gradient)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_rows_do_not_depend_on_their_neighbors(compiled):
    base = torch.nn.Linear(512, 256, device=GPU, dtype=torch.bfloat16)
    layer, x = Fp8Linear(base), randn(300, 512).bfloat16()
    x[100] *= 1000
    run_layer = compiled_layer(layer) if compiled else layer
    with torch.no_grad():
        together, alone = run_layer(x).float(), layer(x[:7]).float()
    assert (together[:7] - alone).norm() / alone.norm() < 1e-2


def test_rows_that_are_zero_or_not_finite_on_the_gpu():
    layer, x = Fp8Linear(torch.nn.Linear(512, 256, device=GPU).bfloat16()), randn(5, 512).bfloat16()
    x[0] = 0
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    for run_layer in (layer, compiled_layer(layer)):
        with torch.no_grad():
            y = run_layer(x)
        assert torch.equal(y[0], layer.bias)
        assert y[1:3].isnan().all()
        assert y[3:].isfinite().all()


@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_fp8_on_the_gpu_equals_the_cpu(architecture, folders, compiled):
    ids = random_ids(2, 30)
    slow, fast = (
        architecture.load(folders[architecture], device, torch.bfloat16, fp8="scoring")
        for device in (CPU, GPU)
    )
    full = architecture.load(folders[architecture], CPU, torch.float32)(ids).detach()
    if compiled:
        compile_layers(fast)
    with torch.no_grad():
        expected, found = slow(ids).float(), fast(ids.to(GPU)).float().cpu()
    error = (found - full).norm() / full.norm()
    assert 1e-3 < error < 1.2 * (expected - full).norm() / full.norm()
    assert (found - expected).norm() / full.norm() < error  # nearer to it than to the full model
    prompts = random_prompts(5, 40, 17)
    assert [len(ids) for ids in generate(fast, prompts, 32, [])] == [32] * 3


@BOTH
def test_fp8_training_compiled_and_not(architecture, folders):
    trees, results = random_trees(12, 2), []
    for compiled in (False, True):
        model = architecture.load(folders[architecture], GPU, torch.bfloat16, fp8="training")
        apply_lora(model, LoRAConfig(targets=architecture.attention, dropout=0.0))
        torch.manual_seed(0)
        adapter = adapter_tensors(model).values()
        for p in adapter:
            torch.nn.init.normal_(p, std=0.1)
        if compiled:
            compile_layers(model)
        loss = sum(model.loss(pack.to(GPU)) for pack in pack_trees(trees, 256, pad_to=256))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in adapter])))
    (loss, grad), (loss1, grad1) = results
    assert abs(loss - loss1) / loss < 1e-2
    assert (grad - grad1).norm() / grad.norm() < 0.1


# ---- The scripts


def test_the_chain_in_bf16(tmp_path, data_folder, wide):
    run("summarize.py", data=data_folder, model=wide, run=tmp_path, max_new_tokens=8)
    done = run("train.py", run=tmp_path, epochs=2, batch_size=8, pack_tokens=1024)
    assert "GPU memory" in done.stdout
    run("evaluate.py", run=tmp_path)
    results = read_json(tmp_path / "results.json")
    assert results["table"]["trained"]["Recall@10"]["mean"] == 1.0


@pytest.mark.parametrize("rank", [8, 0])
def test_a_pythia_in_bf16(tmp_path, data_folder, folders, rank):
    train = {"data": data_folder, "model": folders[NEOX], "paradigm": "recent-only"}
    train |= {"lora_r": rank, "epochs": 1, "batch_size": 8, "pack_tokens": 1024}
    run("train.py", run=tmp_path, **train)
    run("evaluate.py", run=tmp_path)
    results = read_json(tmp_path / "results.json")
    assert results["table"]["trained"]["Recall@10"]["mean"] == 1.0


def test_the_chain_in_fp8(tmp_path, data_folder, wide):
    settings = {"data": data_folder, "model": wide, "max_new_tokens": 8, "fp8": True}
    done = run("summarize.py", run=tmp_path, **settings)
    assert "bf16, fp8, on" in done.stdout
    run("train.py", run=tmp_path, epochs=2, batch_size=8, pack_tokens=1024, fp8=True)
    for fp8 in (True, False):  # the adapter works on either
        run("evaluate.py", run=tmp_path, fp8=fp8)
        results = read_json(tmp_path / ("results-fp8.json" if fp8 else "results.json"))
        assert results["table"]["trained"]["Recall@10"]["mean"] == 1.0
