"""ops/graph.py: passes as CUDA graphs give what they give without, on an emulation of graphs."""

from functools import partial

import pytest
import torch
from emulated_graph import Cuda, Graph, Recorder
from helpers import CPU, random_trees, run, write_model

import ops.graph
import ops.masks
from batches.steps import Step
from evaluate import score_packs
from launch.command import parse_settings
from llama import compile_layers, load_model
from lora import LoRAConfig, adapter_tensors, apply_lora
from ops.graph import Graphs, wanted
from ops.masks import block_mask, tree_rule
from ops.packs import Pack, pack_trees
from train import Passes, Settings, train_step


@pytest.fixture
def cuda(monkeypatch):
    """Emulated graphs, and a mask without sizes that depend on its values, as a GPU has."""

    def dense(ends, first=0):
        rows = torch.arange(len(ends))
        return tree_rule(ends)(None, None, rows[first:, None], rows)

    monkeypatch.setattr("ops.packs.tree_mask", dense)
    monkeypatch.setattr("evaluate.tree_mask", dense)
    monkeypatch.setattr(ops.graph, "is_gpu", lambda _device: True)
    monkeypatch.setattr(ops.graph, "cuda", emulated := Cuda())
    return emulated


def adapted(folder, dropout=0.0, device=CPU, compiled=False):
    model = apply_lora(load_model(folder, CPU, torch.float32), LoRAConfig(dropout=dropout))
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter_tensors(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    if compiled:
        compile_layers(model)
    return model.to(device).train()


def packs_of_one_length(n, seed=0, last_only=False):
    """Packs of unequal trees that have one length and one number of targets."""
    trees = random_trees(6 * n, 3, seed)
    packs = []
    for i in range(n):
        packs += pack_trees(trees[i::n], 512, pad_to=512, last_only=last_only)
    assert len(packs) == n
    assert len({tuple(t.shape for t in pack.tensors().values()) for pack in packs}) == 1
    return packs


def step_of(packs):
    return Step([], packs, 0, int(sum(pack.weights.sum() for pack in packs)))


# ---- A function of tensors


def graphs_of(function, enabled=True):
    """The function, run by graphs of its own."""
    return partial(Graphs(CPU, enabled).run, function)


def test_shapes_run_once_are_captured_and_then_replayed(cuda):
    calls = []
    graphed = graphs_of(lambda x, y: (calls.append(1), x * 2 + y)[1])
    for i in range(5):
        x, y = torch.full((3,), float(i)), torch.tensor(1.0)
        assert graphed(x, y).tolist() == [2.0 * i + 1] * 3
    assert len(calls) == 2  # once as it is, once captured
    assert [graph.replays for graph in cuda.graphs] == [4]
    assert graphed(torch.ones(4), torch.tensor(0.0)).tolist() == [2.0] * 4  # other shapes
    assert len(calls) == 3


def test_a_result_outlives_the_next_replay(cuda):
    graphed = graphs_of(lambda x: x + 1)
    results = [graphed(torch.tensor([float(i)])) for i in range(4)]
    assert [result.item() for result in results] == [1, 2, 3, 4]


def test_nothing_is_captured_without_room_or_where_it_is_not_wanted(cuda, capsys):
    cuda.free = 1.2 * cuda.needed
    for enabled in (False, True):
        graphed = graphs_of(lambda x: x + 1, enabled)
        assert [graphed(torch.tensor(i)).item() for i in range(4)] == [1, 2, 3, 4]
        assert ("no room for their memory" in capsys.readouterr().out) == enabled
    assert not cuda.graphs
    cuda.cached = 0.1 * cuda.needed  # which a capture has the allocator give back
    graphed = graphs_of(lambda x: x + 1)
    assert [graphed(torch.tensor(i)).item() for i in range(4)] == [1, 2, 3, 4]
    assert len(cuda.graphs) == 1


def test_without_room_for_one_more_none_keeps_its_memory(cuda):
    graphs = Graphs(CPU, enabled=True)
    for n in (1, 1, 2):
        graphs.run(lambda x: x + 1, torch.zeros(n))
    assert any(graphs.captured.values())
    cuda.free, graphs.needed[(torch.Size([2]),)] = 0, 9e9
    assert graphs.run(lambda x: x + 1, torch.zeros(2)).tolist() == [1, 1]
    assert not graphs.captured


def test_later_shapes_share_the_memory_of_earlier_ones(cuda):
    cuda.free = 1.3 * cuda.needed
    graphed = graphs_of(lambda x: x + 1)
    for n in (1, 1, 2, 2):
        graphed(torch.zeros(n))
        cuda.free = min(cuda.free, 0.3 * cuda.needed if cuda.graphs else cuda.free)
    assert len(cuda.graphs) == 2


def test_small_models_have_graphs_unless_asked_not_to(tiny, monkeypatch):
    assert [wanted(asked, tiny) for asked in (None, True, False)] == [True, True, False]
    monkeypatch.setattr("ops.graph.SMALL", 1000)
    assert [wanted(asked, tiny) for asked in (None, True, False)] == [False, True, False]
    monkeypatch.setattr(tiny, "syncs_host", True)
    assert not wanted(True, tiny)


@pytest.mark.parametrize(("flags", "asked"), [((), None), (("",), True), (("no-",), False)])
def test_the_flag_can_be_on_off_or_unset(monkeypatch, flags, asked):
    monkeypatch.setattr("sys.argv", ["train.py", *(f"--{no}cuda-graphs" for no in flags)])
    assert parse_settings(Settings, "").cuda_graphs is asked


def test_the_emulation_refuses_what_makes_the_host_wait(cuda):
    graphed = graphs_of(lambda x: x * x.sum().item())
    graphed(torch.ones(2))
    with pytest.raises(RuntimeError, match="waits for the device"):
        graphed(torch.ones(2))


# ---- Training


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fused", [False, True])
def test_training_with_graphs_equals_training_without(
    model_folder, cuda, last_only, dropout, fused
):
    packs = packs_of_one_length(6, last_only=last_only)
    found = []
    for graphs in (False, True):
        model = adapted(model_folder, dropout)
        optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=0.01, fused=fused)
        passes, values = Passes(model, graphs=graphs), []
        for i in range(6):  # of two packs each, as different steps have different ones
            torch.manual_seed(i)
            step = step_of([packs[i], packs[(i + 1) % 6]])
            values.append(train_step(passes, optimizer, step, 0.5).read())
        found.append((values, [p.detach().clone() for p in adapter_tensors(model).values()]))
    (plain, expected), (graphed, adapter) = found
    assert len({loss for loss, _ in plain}) == 6
    assert torch.tensor(plain).sub(torch.tensor(graphed)).abs().max() < 1e-6
    for p, q in zip(expected, adapter, strict=True):
        assert (p - q).abs().max() < 1e-6
    (graph,) = cuda.graphs
    assert graph.replays == 11


def test_full_training_in_autocast_reads_the_weights_of_the_last_update(model_folder, cuda):
    packs, found = packs_of_one_length(3), []
    for graphs in (False, True):
        model = load_model(model_folder, CPU, torch.float32).train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        passes = Passes(model, autocast=True, graphs=graphs)
        found.append([train_step(passes, optimizer, step_of([p])).read() for p in packs * 2])
    plain, graphed = map(torch.tensor, found)
    assert plain[0, 0] - plain[3, 0] > 1e-2  # it learns
    assert (plain - graphed).abs().max() < 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(model_folder, fused):
    model, (pack,) = adapted(model_folder), packs_of_one_length(1)
    optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=0.01, fused=fused)
    passes = Passes(model)
    train_step(passes, optimizer, step_of([pack]))
    before = [p.detach().clone() for p in adapter_tensors(model).values()]
    step = step_of([pack])
    pack.weights[5] = torch.nan
    with pytest.raises(FloatingPointError, match="loss nan"):
        train_step(passes, optimizer, step).read()
    for p, q in zip(before, adapter_tensors(model).values(), strict=True):
        assert torch.equal(p, q)


# ---- Scoring


def test_scores_with_graphs_equal_those_without(tiny, cuda):
    packs = packs_of_one_length(4)
    split = pack_trees(random_trees(1, 200, seed=9), 512, pad_to=512)  # one tree, several packs
    assert len(split) > 1
    assert split[0].shared_prefix
    packs = [*packs[:2], *split, *packs[2:]]
    packs = [Pack(**vars(p) | {"leaves": named(p, i)}) for i, p in enumerate(packs)]
    expected, found = (score_packs(tiny, packs, [17, 400], graphs) for graphs in (False, True))
    assert len(expected) == sum(len(pack.leaves) for pack in packs)
    for place, scores in expected.items():
        assert (torch.tensor(found[place]) - torch.tensor(scores)).abs().max() < 1e-6
    (graph,) = cuda.graphs
    assert graph.replays == 3


def named(pack, i):
    """The pack's leaves; those of whole trees under numbers of their own."""
    if pack.shared_prefix:
        return {(999, branch): row for (_, branch), row in pack.leaves.items()}
    return {(100 * i + tree, branch): row for (tree, branch), row in pack.leaves.items()}


def test_a_captured_block_mask_follows_its_ends():
    first = packs_of_one_length(1)[0].ends
    second = torch.full_like(first, len(first))  # one text instead of several
    ends, recorder, graph = first.clone(), Recorder(), Graph()
    with recorder:
        mask = block_mask(ends)
    graph.calls = recorder.calls
    ends.copy_(second)
    graph.replay()
    expected = block_mask(second)
    names = [name for name in vars(expected) if name.endswith(("num_blocks", "indices"))]
    assert len(names) == 8
    assert not torch.equal(block_mask(first).kv_indices, expected.kv_indices)
    for name in names:
        assert torch.equal(getattr(mask, name), getattr(expected, name)), name


# ---- On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer_model):
    """A model with heads of 32, which the kernels take, and a tokenizer."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder, hidden_size=128, tokenizer=tokenizer_model)
    return folder


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_real_graphs_train_as_their_emulation_does(wide, compiled, dropout):
    packs, found = packs_of_one_length(6), []
    for graphs in (False, True):
        model = adapted(wide, dropout, torch.device("cuda", 0), compiled)
        optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=0.01, fused=True)
        passes, values = Passes(model, graphs=graphs), []
        for i in range(6):
            torch.manual_seed(i)
            step = step_of([packs[i], packs[(i + 1) % 6]])
            values.append(train_step(passes, optimizer, step, 0.5).read())
        found.append(torch.tensor(values))
        assert len(passes.graphs.captured) == graphs
    plain, graphed = found
    assert ((plain - graphed) / plain).abs().max() < 1e-4


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_real_graphs_score_as_separate_launches_do(wide, compiled):
    model = load_model(wide, torch.device("cuda", 0), torch.float32)
    if compiled:
        compile_layers(model)
    packs = packs_of_one_length(5)
    packs = [Pack(**vars(p) | {"leaves": named(p, i)}) for i, p in enumerate(packs)]
    expected, found = (score_packs(model, packs, [17, 400], graphs) for graphs in (False, True))
    assert len(expected) == sum(len(pack.leaves) for pack in packs)
    for place, scores in expected.items():
        assert (torch.tensor(found[place]) - torch.tensor(scores)).abs().max() < 1e-4


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_deterministic_runs_are_equal_to_the_bit(tmp_path, data_folder, wide, graphs):
    common = {"data": data_folder, "model": wide, "paradigm": "recent-only", "lr": 0.01}
    common |= {"epochs": 2, "batch_size": 8, "pack_tokens": 1024}
    common |= {"cuda_graphs" if graphs else "no_cuda_graphs": True}
    adapters = []
    for name in ("one", "two"):
        run("train.py", run=tmp_path / name, deterministic=True, **common)
        adapters.append((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
