"""ops/fp8.py: products in e4m3 against slow ones, in models, adapters and the scripts."""

import json

import pytest
import torch
from conftest import FIT
from helpers import (
    CPU,
    LLAMA,
    flags,
    generate,
    losses,
    random_ids,
    random_trees,
    run,
    run_here,
    same_losses,
    scores,
    separate_loss,
    write_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import fp8 as bench
from launch.processes import CheckpointError
from lora import AdapterError, LoRAConfig, LoRALinear, apply_lora, load_adapter, merge, save_adapter
from lora import adapter_tensors as tensors_of
from ops.fp8 import E4M3, WAYS, Fp8Linear, product, quantize_rows
from ops.int8 import told
from ops.packs import pack_trees

KIND = "fp8, emulated on the CPU: slower than without, for trying out"  # as the scripts say it
if torch.cuda.is_available():
    KIND = "fp8"
NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3).double()  # all that e4m3 has


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(out=48, width=64, bias=True, seed=0):
    made = nn.Linear(width, out, bias)
    made.weight.data = randn(out, width, seed=seed)
    return made


def values(x):
    """The numbers that a matrix becomes, in fp64."""
    x8, scale = quantize_rows(x)
    return x8.double() * scale.double()


# ---- Quantization


def nearest(quotient):
    """The code of the e4m3 number next to a quotient; of two equally near, the even one."""
    codes = [code for code in range(256) if not NUMBERS[code].isnan()]
    return min(codes, key=lambda code: (abs(NUMBERS[code] - quotient), code % 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_becomes_the_nearest_one_of_e4m3(dtype):
    x = randn(5, 40, dtype=dtype) * torch.tensor([1, 1e-6, 1e4, 1e-20, 3])[:, None].to(dtype)
    x8, scale = quantize_rows(x)
    assert scale.dtype == torch.float32
    assert torch.equal(scale[:, 0], x.float().abs().amax(1) / 448)
    assert (x8.double().abs().amax(1) == 448).all()
    for row, found in zip((x.float() / scale).double(), x8.double(), strict=True):
        for quotient, number in zip(row, found, strict=True):
            assert number == NUMBERS[nearest(quotient)]


def test_a_number_s_error_is_a_sixteenth_or_the_least_step():
    x = randn(64, 300, seed=1) ** 3  # from tiny to large
    _, scale = quantize_rows(x)
    off = (values(x) - x).abs()
    assert (off <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001).all()
    assert off.max() > 0


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    layer = Fp8Linear(linear())
    x = randn(6, 64)
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y[0], layer.bias)
    assert y[1:4].isnan().all()
    assert y[4:].isfinite().all()


# ---- The layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (7, 64), (2, 5, 64), (0, 64)])
def test_forward_and_gradient_are_the_products_of_the_quantized_numbers(shape, bias):
    base = linear(bias=bias)
    layer, x = Fp8Linear(base, "training"), randn(*shape, seed=1).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape[:-1], 48)
    g = randn(*y.shape, seed=2)
    y.backward(g)

    expected = values(x.detach().reshape(-1, 64)) @ values(base.weight.detach()).T
    expected = expected.view(y.shape) + (base.bias.double() if bias else 0)
    gradient = values(g.reshape(-1, 48)) @ values(base.weight.detach().T.contiguous()).T
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.allclose(x.grad.double(), gradient.view(shape), rtol=1e-5, atol=1e-4)
    assert layer.weight.grad is None


def test_the_error_is_within_what_e4m3_allows():
    base, x = linear(256, 512, bias=False), randn(100, 512, seed=1)
    w = base.weight.detach()
    with torch.no_grad():
        found, exact = Fp8Linear(base)(x).double(), x.double() @ w.double().T
    dx, dw = ((values(m) - m.double()).abs() for m in (x, w))
    bound = dx @ w.abs().double().T + x.abs().double() @ dw.T + dx @ dw.T
    assert ((found - exact).abs() <= bound + 1e-4).all()
    assert 1e-2 < (found - exact).norm() / exact.norm() < 5e-2


def test_strided_inputs_and_gradients_change_nothing():
    layer = Fp8Linear(linear(), "training")
    x = randn(64, 10, seed=1)
    ways = [x.T.contiguous(), x.T, torch.stack((x.T, x.T), 1)[:, 1]]
    results = []
    for way in ways:
        way = way.detach().requires_grad_()
        y = layer(way)
        y.sum().backward()  # whose gradient is one number, expanded
        results.append((y.detach(), way.grad))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_a_row_s_result_does_not_depend_on_its_neighbors():
    layer, x = Fp8Linear(linear()), randn(9, 64)
    x[4] *= 1e6
    with torch.no_grad():
        together = layer(x)
        for i in range(9):
            assert torch.allclose(layer(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)


def test_layers_for_scoring_hold_no_second_copy_and_refuse_gradients():
    layer = Fp8Linear(linear())
    held = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert held.pop("bias")
    assert held == {"weight": (E4M3, (48, 64)), "scale": (torch.float32, (48,))}
    with pytest.raises(RuntimeError, match="load them for training"):
        layer(randn(3, 64).requires_grad_()).sum().backward()
    both = Fp8Linear(linear(), "training")
    assert [name for name, _ in both.named_parameters()] == ["weight", "bias", "scale"]
    assert both.turned.shape == (64, 48)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="its _scaled_mm takes no rows' scales on CPUs"
)
def test_torch_s_own_product_on_a_cpu_is_the_emulation():
    layer, x = Fp8Linear(linear(bias=False)), randn(7, 64, seed=1)
    x8, scale = quantize_rows(x)
    w8, scales = layer.weight.T, (scale, layer.scale[None])
    expected = torch._scaled_mm(x8, w8, *scales, out_dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-4)


# ---- As a GPU has it


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gets_shapes_and_layouts_that_it_takes(shape, dtype):
    """Tensors without data, which say they are on a GPU: the kernel's own checks are made."""
    with FakeTensorMode():
        for out, width in ((48, 64), (16, 11008)):
            x = torch.empty(*shape, width, device="cuda", dtype=dtype)
            weight = torch.empty(out, width, device="cuda", dtype=E4M3)
            scale = torch.empty(out, device="cuda")
            y = product(x, weight, scale)
            assert y.shape == (*shape, out)
            assert y.dtype == dtype
            odd = x.new_empty(3, 72), weight.new_empty(out, 72), scale
            with pytest.raises(RuntimeError, match="divisible by 16"):  # so the checks are made
                product(*odd)


@pytest.fixture
def card(monkeypatch):
    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old Card")

    return pretend


def test_cards_older_than_ada_are_refused(card, model_folder):
    for old in ((8, 6), (8, 0), (7, 5)):
        card(*old)
        has = ".".join(map(str, old))
        with pytest.raises(CheckpointError, match=rf"^--fp8 needs .* 8\.9 .* Old Card has {has};"):
            LLAMA.load(model_folder, CPU, torch.float32, fp8="scoring")
    for new in ((8, 9), (9, 0), (10, 0)):
        card(*new)
        assert ", fp8" in told(LLAMA.load(model_folder, CPU, torch.float32, fp8="scoring"))


# ---- torch.compile


@pytest.mark.parametrize("way", WAYS)
def test_layers_with_adapters_are_traced_whole(folder, architecture, way):
    model = architecture.load(folder, CPU, torch.float32, fp8=way)
    apply_lora(model, LoRAConfig(targets=architecture.attention))
    for adapter in tensors_of(model).values():
        nn.init.normal_(adapter, std=0.1)
    ids, training = random_ids(2, 20), way == "training"
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        with torch.set_grad_enabled(training):
            y = model(ids)
        if training:
            y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in tensors_of(model).values() if training)])
    for plain, traced in zip(*results, strict=True):
        assert torch.allclose(plain, traced, rtol=1e-4, atol=1e-6)


# ---- Models


@pytest.mark.parametrize("way", WAYS)
def test_a_model_s_layers_are_held_in_fp8_and_nothing_else(folder, architecture, tiny, way):
    model, ids = architecture.load(folder, CPU, torch.float32, fp8=way), random_ids(2, 30)
    plain = dict(tiny.named_modules())
    held = {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    # The tiny Llama's keys and values have 24 dimensions, no multiple of 16.
    assert len(held) == {"llama": 10, "neox": 8}[architecture.name]
    assert not any("k_proj" in name or "v_proj" in name for name in held)
    some = {"llama": " (10 of 14 matrices)", "neox": ""}[architecture.name]
    assert told(model) == f", {KIND}{some}"
    for name, layer in held.items():
        weight = plain[name].weight
        parts = {"weight": weight} | (
            {"turned": weight.T.contiguous()} if layer.turned is not None else {}
        )
        for part, matrix in parts.items():
            x8, scale = quantize_rows(matrix)
            assert torch.equal(getattr(layer, part).double(), x8.double())
            name_of_scale = {"weight": "scale", "turned": "turned_scale"}[part]
            assert torch.equal(getattr(layer, name_of_scale), scale[:, 0])
        assert (layer.turned is None) == (way == "scoring")
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in held:
            assert torch.equal(parameter, tiny.get_parameter(name)), name
    with torch.no_grad():
        full = tiny(ids)
        assert 1e-3 < (model(ids) - full).norm() / full.norm() < 0.2
    assert len(generate(model, [ids[0].tolist()], 8, [])[0]) == 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_tied_and_sharded_files(tmp_path, tied, shards):
    write_model(tmp_path, shards=shards, tie_word_embeddings=tied, dtype=torch.bfloat16)
    plain, model = (LLAMA.load(tmp_path, CPU, torch.bfloat16, fp8=f) for f in (None, "scoring"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        full, found = (m(random_ids(2, 30)).float() for m in (plain, model))
    assert 1e-3 < (found - full).norm() / full.norm() < 0.2


def test_packs_in_fp8_equal_separate_texts_with_gradients(folder, architecture):
    def adapted():
        torch.manual_seed(0)
        model = architecture.load(folder, CPU, torch.float32, fp8="training")
        apply_lora(model, LoRAConfig(targets=architecture.attention, dropout=0.0))
        for adapter in tensors_of(model).values():
            nn.init.normal_(adapter, std=0.1)
        return model

    apart, together, trees = adapted(), adapted(), random_trees(6, 3)
    expected, count = separate_loss(apart, trees)
    (expected / count).backward()
    total = sum(together.loss(pack) for pack in pack_trees(trees, 256))
    (total / count).backward()
    assert abs(total.item() - expected.item()) / expected.item() < 1e-3
    # A shared token's gradient is quantized as a sum, so gradients agree to e4m3's rounding.
    for p, q in zip(tensors_of(apart).values(), tensors_of(together).values(), strict=True):
        assert (p.grad - q.grad).norm() / p.grad.norm() < 0.05


def test_a_model_none_of_whose_matrices_fits_is_refused(tmp_path):
    write_model(tmp_path, hidden_size=40, intermediate_size=72, num_key_value_heads=4)
    with pytest.raises(
        CheckpointError, match=r"--fp8: no matrix .* multiples of 16; leave --fp8 out"
    ):
        LLAMA.load(tmp_path, CPU, torch.float32, fp8="scoring")


def test_int8_and_fp8_exclude_each_other(model_folder):
    with pytest.raises(CheckpointError, match="--int8 and --fp8"):
        LLAMA.load(model_folder, CPU, torch.float32, int8="weights", fp8="scoring")


def test_files_with_numbers_of_8_bit_are_refused(tmp_path, model_folder):
    write_model(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    whole = load_file(path)
    save_file(whole | {name: whole[name].to(E4M3)}, path)
    with pytest.raises(CheckpointError, match=rf"{name} .* floating point in 16 bit or more"):
        LLAMA.load(tmp_path, CPU, torch.float32)


# ---- Adapters


def test_an_adapter_on_fp8_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    base = linear()
    layer = LoRALinear(Fp8Linear(base, "training"), LoRAConfig(r=4, dropout=0.0)).train()
    nn.init.normal_(layer.lora_B.weight)
    x, g = randn(7, 64, seed=1).requires_grad_(), randn(7, 48, seed=2)
    y = layer(x)
    y.backward(g)

    a, b, s = layer.lora_A.weight.double(), layer.lora_B.weight.double(), layer.scaling
    xd, gd, w = x.detach().double(), g.double(), base.weight.detach()
    expected = values(x.detach()) @ values(w).T + base.bias.double() + s * xd @ a.T @ b.T
    assert torch.allclose(y.double(), expected, atol=1e-3)
    assert torch.allclose(layer.lora_A.weight.grad.double(), s * (gd @ b).T @ xd, atol=1e-3)
    assert torch.allclose(layer.lora_B.weight.grad.double(), s * gd.T @ (xd @ a.T), atol=1e-3)
    through = values(g) @ values(w.T.contiguous()).T + s * gd @ b @ a
    assert torch.allclose(x.grad.double(), through, atol=1e-3)


def test_no_adapter_is_merged_into_fp8(folder, architecture):
    model = architecture.load(folder, CPU, torch.float32, fp8="scoring")
    apply_lora(model, LoRAConfig(targets=architecture.attention))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"merged into torch\.float8_e4m3fn weights; .* --fp8"):
        merge(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float())


def test_an_adapter_in_8_bit_is_refused(tmp_path, model_folder):
    config = LoRAConfig()
    model = apply_lora(LLAMA.load(model_folder, CPU, torch.float32), config)
    for adapter in tensors_of(model).values():
        nn.init.normal_(adapter)
    save_adapter(tmp_path, tensors_of(model), config, "base")
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(E4M3) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        AdapterError, match=r"holds torch\.float8_e4m3fn, expected floating point in"
    ):
        load_adapter(LLAMA.load(model_folder, CPU, torch.float32), tmp_path)


def test_an_adapter_goes_from_one_to_the_other(tmp_path, folder, architecture):
    config, ids = LoRAConfig(targets=architecture.attention), random_ids(2, 30)
    trained = apply_lora(architecture.load(folder, CPU, torch.float32, fp8="training"), config)
    for adapter in tensors_of(trained).values():
        nn.init.normal_(adapter, std=0.1)
    save_adapter(tmp_path, tensors_of(trained), config, "base")
    logits = []
    for fp8 in (None, "scoring"):
        model = architecture.load(folder, CPU, torch.float32, fp8=fp8)
        load_adapter(model, tmp_path)
        with torch.no_grad():
            logits.append(model.eval()(ids))
    with torch.no_grad():
        assert torch.equal(trained.eval()(ids), logits[1])
    assert 1e-3 < (logits[1] - logits[0]).norm() / logits[0].norm() < 0.2


# ---- The scripts


def test_summaries_in_fp8_are_not_those_without(tmp_path, data_folder, model_folder):
    settings = {"data": data_folder, "model": model_folder, "max_new_tokens": 8}
    plain = run("summarize.py", run=tmp_path / "plain", **settings).stdout
    assert ", fp8" not in plain
    section = json.loads((tmp_path / "plain" / "config.json").read_text())["summarize"]
    assert "fp8" not in section  # so runs from before the flag keep their summaries

    done = run("summarize.py", run=tmp_path / "fp8", fp8=True, **settings).stdout
    assert f", {KIND} (10 of 14 matrices), on 1 x " in done
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["summarize"]["fp8"] is True
    assert ", 20 of them summarized before" in run("summarize.py", run=tmp_path / "fp8").stdout

    answers = tmp_path / "plain" / "answers.jsonl"
    asked = tmp_path / "fp8" / "answers.jsonl"
    keys = [
        {json.loads(line)["key"] for line in p.read_text().splitlines()} for p in (answers, asked)
    ]
    assert keys[0]
    assert not keys[0] & keys[1]
    for name, more in (("plain", {"fp8": True}), ("fp8", {"int8": "weights"})):
        failed = run("summarize.py", run=tmp_path / name, check=False, **more)
        assert failed.returncode == 2
        assert "fp8" in failed.stderr
        assert failed.stderr.count("\n") == 1


def test_a_model_that_does_not_fit_ends_summarize_in_one_line(
    tmp_path, data_folder, tokenizer_model
):
    write_model(
        tmp_path / "model",
        tokenizer=tokenizer_model,
        hidden_size=40,
        intermediate_size=72,
        num_key_value_heads=4,
    )
    settings = {"data": data_folder, "model": tmp_path / "model", "fp8": True}
    failed = run("summarize.py", run=tmp_path / "run", check=False, **settings)
    assert failed.returncode == 2
    assert failed.stderr.startswith("summarize: --fp8: no matrix")
    assert failed.stderr.count("\n") == 1


def test_the_benchmark_prints_every_way_to_train_and_score(data_folder, model_folder):
    settings = {"data": data_folder, "model": model_folder, "seeds": [0, 1], "batch_size": 8}
    done = run_here(bench.main, "fp8.py", flags(**settings))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split()[:2] for line in lines]
    for how in ("not", "plain", "fp8"):
        for kind in ("plain", "fp8"):
            assert [how, kind] in rows
    (error,) = [line for line in lines if line.startswith("no adapter")]
    assert 0.1 < float(error.split()[2].rstrip("%")) < 20
    assert any(line.startswith("seed 1, fp8") for line in lines)
    assert any(line.startswith("seed from seed") for line in lines)

    settings |= {"paradigm": "recurrent"}
    assert "needs --run" in run_here(bench.main, "fp8.py", flags(**settings)).stderr


@pytest.fixture(scope="module")
def trained_in_fp8(tmp_path_factory, data_folder, model_folder):
    """A run of one epoch in fp8, by one process and without dropout."""
    folder = tmp_path_factory.mktemp("runs") / "fp8"
    common = {"data": data_folder, "model": model_folder, **FIT, "lora_dropout": 0}
    done = run("train.py", run=folder, epochs=1, fp8=True, **common)
    assert f", {KIND} (10 of 14 matrices)" in done.stdout
    return folder


def test_training_in_fp8_follows_training_without(trained_in_fp8, tmp_path, fit):
    fit(tmp_path, epochs=1, lora_dropout=0)
    same_losses(trained_in_fp8, tmp_path, limit=0.05)
    pairs = zip(losses(trained_in_fp8), losses(tmp_path), strict=True)
    assert all(fp8 != plain for fp8, plain in pairs)


@pytest.mark.parametrize("shard", ["zero2", "replicate"])
def test_two_processes_train_in_fp8_as_one_does(trained_in_fp8, tmp_path, fit, shard):
    fit(tmp_path, epochs=1, lora_dropout=0, fp8=True, processes=2, shard=shard)
    # A trunk's gradient is summed over a pack before it is rounded, and they have other packs.
    same_losses(trained_in_fp8, tmp_path, limit=0.02)


def test_an_adapter_trained_in_fp8_is_scored_either_way(trained_in_fp8):
    found = {}
    for fp8 in (False, True):
        done = run("evaluate.py", run=trained_in_fp8, fp8=fp8).stdout
        assert (KIND in done) == fp8
        name = "scores-test-fp8.jsonl" if fp8 else "scores-test.jsonl"
        found[fp8] = [line["scores"] for line in scores(trained_in_fp8, name)]
    assert found[True] != found[False]
    for fp8, plain in zip(found[True], found[False], strict=True):
        assert fp8 == pytest.approx(plain, abs=0.3)
