"""bench/: what the benchmarks count, and how they tell it."""

import gc
import re
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, wait_until
from torch.utils.flop_counter import FlopCounterMode

from bench import all as every
from bench import common, fp8, profile, score, targets, train
from bench.peers import Peer, peft_model, why_no_liger
from bench.shapes import SHAPES, config_of
from launch.processes import same_bits
from llama import Config, Llama
from ops.packs import Tree, pack_trees
from trsr import InputError


def run(monkeypatch, capsys, module, flags):
    """What a benchmark prints."""
    monkeypatch.setattr("sys.argv", [module.__name__, *flags.split()])
    module.main()
    return capsys.readouterr().out


# ---- Shapes


@pytest.mark.parametrize(
    ("name", "millions"), [("100m", 109.5), ("smollm2-135m", 134.5), ("llama-2-7b", 6738.4)]
)
def test_the_shapes_have_the_parameters_that_the_models_have(name, millions):
    with torch.device("meta"):
        model = Llama(Config(**common.Settings(shape=name).fields))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_smollm2_s_shape_has_its_own_heads_vocabulary_and_rotation_on_both_sides():
    settings = common.Settings(shape="smollm2-135m", layers=1)
    ours, theirs = common.make_models(settings, CPU, torch.float32, peer=True)
    assert theirs.config.num_key_value_heads == 3
    assert theirs.config.rope_parameters["rope_theta"] == 100000.0
    assert settings.vocabulary == ours.lm_head.weight.shape[0] == 49152
    ids = torch.randint(3, settings.vocabulary, (2, 300))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_a_shape_s_config_json_has_what_the_shape_has():
    for name, shape in SHAPES.items():
        assert shape.items() <= config_of(name).items()
    assert config_of("llama-2-7b")["vocab_size"] == 32000


# ---- Training


def tiny_training(trees):
    settings = train.Settings(shape="tiny", layers=1)
    model, theirs = common.make_models(settings, CPU, torch.float32, peer=True)
    train.make_trainable(settings, model, CPU)
    ours = train.Ours(settings, model, trees, CPU)
    return settings, ours, Peer.plain(peft_model(theirs, model, train.ADAPTER))


TREES = [
    Tree(list(range(5, 30)), [[40, 41, 42], [50]]),
    Tree(list(range(5, 20)), [[70], [80, 81]]),
]


def test_the_peer_has_our_loss_at_any_batch_size_and_another_one_is_refused():
    settings, ours, peer = tiny_training(TREES)
    loss = train.loss_without_dropout(settings, ours.model, TREES, CPU)
    assert peer.check_loss(ours.examples, loss, rough=False) == pytest.approx(loss, rel=1e-5)
    for batch in (1, 3):
        step = peer.step(ours.examples, batch)
        assert step == pytest.approx(loss, rel=1e-5)
    for wrong in (1.001 * loss, float("nan")):
        with pytest.raises(InputError, match="the times mean nothing"):
            peer.check_loss(ours.examples, wrong, rough=False)


def test_liger_is_left_out_with_a_reason_where_it_cannot_run(monkeypatch):
    assert why_no_liger(gpu=False) == "they need a GPU"
    monkeypatch.setattr("bench.peers.find_spec", lambda name: None)
    assert why_no_liger(gpu=True) == "pip install liger-kernel"
    monkeypatch.setattr("bench.peers.find_spec", lambda name: name)
    assert why_no_liger(gpu=True) is None


def test_more_negatives_make_a_table_with_the_tokens_of_an_example(monkeypatch, capsys):
    flags = "--shape tiny --layers 1 --users 2 --repeats 1 --negatives 1 3"
    out = run(monkeypatch, capsys, train, flags)
    rows = re.findall(r"^ +(\d+) +(\d+) +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
    assert [(int(a), int(b)) for a, b, *_ in rows] == [(1, 4), (3, 8)]
    for negatives, examples, apart, computed in rows:
        trees = common.random_trees(common.Settings(shape="tiny"), 2, 1 + int(negatives))
        sizes = sum(tree.size for tree in trees) - common.INSTRUCTION  # one copy for both
        whole = sum(len(s) for tree in trees for s in tree.sequences())
        assert float(apart) == pytest.approx(whole / int(examples), abs=0.06)
        assert float(computed) == pytest.approx(sizes / int(examples), abs=0.06)


def test_a_row_of_the_table_is_measured_when_nothing_is_left_of_the_one_before(monkeypatch, capsys):
    made = []

    class Counted(train.Ours):
        def __init__(self, *given):
            assert not any(ours() for ours in made)  # each can hold gigabytes of a GPU's memory
            super().__init__(*given)
            made.append(weakref.ref(self))

    monkeypatch.setattr(train, "Ours", Counted)
    gc.disable()
    try:
        flags = "--shape tiny --layers 1 --users 1 --repeats 1 --negatives 1 2"
        run(monkeypatch, capsys, train, flags)
    finally:
        gc.enable()
    assert len(made) == 2
    assert not any(ours() for ours in made)


def test_training_is_compared_and_told(monkeypatch, capsys):
    flags = "--shape tiny --layers 1 --users 1 --repeats 1 --batches 2"
    out = run(monkeypatch, capsys, train, flags)
    assert "without Liger's kernels: they need a GPU\n" in out
    assert re.search(r"transformers \+ PEFT, 2 a batch .* times as fast \(its best\)", out)
    losses = re.search(r"^loss ([\d.]+) and ([\d.]+)$", out, re.MULTILINE)
    assert float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-5)


def test_fp8_is_told_and_changes_the_loss_a_little(monkeypatch, capsys):
    losses = []
    for more in ("", " --fp8"):
        flags = "--shape tiny --layers 1 --users 1 --repeats 1 --no-peer"
        out = run(monkeypatch, capsys, train, flags + more)
        assert ("with fp8 matrices" in out) == bool(more)
        losses.append(float(re.search(r"^loss ([\d.]+)", out, re.MULTILINE)[1]))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


# ---- Profile


def products(run_model):
    """The FLOP of all matrix products but attention's that torch counts."""
    with FlopCounterMode(display=False) as counter:
        run_model()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "attention" not in str(op))


def packed(what):
    settings = common.Settings(shape="tiny", layers=2)
    model, _ = common.make_models(settings, CPU, torch.float32, peer=False)
    packs = pack_trees(TREES, 64)
    return model, packs, profile.Cost.of(model.config, packs, what, 4)


def test_the_products_of_training_are_those_that_torch_counts():
    model, packs, cost = packed("train")
    model.requires_grad_(False)
    head = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.lm_head.weight = head  # apart from the embedding, which alone is to have a gradient
    model.model.embed_tokens.weight.requires_grad_()
    counted = products(lambda: [model.loss(pack).backward() for pack in packs])
    assert counted == cost.products + cost.head


def test_the_products_of_scoring_are_those_that_torch_counts():
    model, packs, cost = packed("score")
    columns = 2 * 2 * model.config.hidden_size * sum(len(pack.leaves) for pack in packs)
    ours = score.Ours.of(score.Settings(shape="tiny"), model, CPU)
    assert products(lambda: score.evaluate.score_packs(model, packs, (1, 2))) == (
        cost.products + columns
    )
    assert ours.flops(common.Filling.of([packs])) == cost.products


def test_attention_costs_what_the_visible_pairs_cost():
    model, packs, cost = packed("score")
    pairs = 0
    for pack in packs:
        row = torch.arange(len(pack.ends))
        pairs += int(((row <= row[:, None]) & (row[:, None] < pack.ends)).sum())
    width = model.config.num_attention_heads * model.config.head_dim
    assert cost.attention == 2 * 4 * width * pairs  # two layers
    assert packed("train")[2].attention == 3.5 * cost.attention


@pytest.mark.parametrize("what", ["train", "score"])
def test_padding_is_no_part_of_the_floor(what):
    model, packs, cost = packed(what)
    padded = pack_trees(TREES, 64, pad_to=128)
    assert [len(pack.ids) for pack in padded] == [128] * len(packs)
    assert profile.Cost.of(model.config, padded, what, 4) == cost


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
            "matrix products",
        ),
        (
            "triton_tem_fused_add_flex_attention_backward_native_dropout_ba",
            "FlexAttention backward",
        ),
        ("triton_per_fused_add_flex_attention_backward_transpose_view", "FlexAttention backward"),
        ("triton_tem_fused__unsafe_view_add_flex_attention_transpose_5", "FlexAttention forward"),
        ("triton_red_fused__fused_rms_norm_native_dropout_0", "fused elementwise"),
        ("triton_poi_fused_mm_t_transpose_view_3", "fused elementwise"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "loss"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda>", "loss"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel>", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<Adam>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
    ],
)
def test_an_h100_s_kernels_are_of_the_right_kind(name, kind):
    assert profile.kind_of(name, profile.KERNELS) == kind


def test_time_on_the_gpu_counts_once_where_kernels_overlap():
    events = [
        profile.Event("nvjet_a", 0.0, 2.0, 2.0, True),
        profile.Event("Memcpy HtoD", 1.0, 3.0, 2.0, True),  # beside it
        profile.Event("nvjet_a", 5.0, 6.0, 1.0, True),
        profile.Event("cudaLaunchKernel", 0.0, 0.5, 0.5, False),
        profile.Event("cudaGraphLaunch", 4.0, 4.5, 0.5, False),
        profile.Event("cudaStreamSynchronize", 5.0, 6.0, 1.0, False),
        profile.Event("cudaStreamIsCapturing", 6.0, 9.0, 3.0, False),
    ]
    seen = profile.Seen.of(events, steps=1, wall=8.0, gpu=True)
    assert seen.busy == 4.0
    assert seen.kinds == {"matrix products": (3.0, 2), "copies": (2.0, 1)}
    assert (seen.launches, seen.waits) == ((1.0, 2), (1.0, 1))


@pytest.mark.parametrize("what", ["train", "score"])
def test_a_step_is_profiled_on_a_cpu_too(monkeypatch, capsys, what):
    flags = f"--shape tiny --layers 1 --users 1 --repeats 1 --steps 1 --what {what} --kernels 2"
    out = run(monkeypatch, capsys, profile, flags)
    assert max(map(len, out.splitlines())) < 100
    share = dict(re.findall(r"^(matrix products|attention forward) +[\d.]+ +([\d.]+)%", out, re.M))
    assert all(0 < float(v) < 100 for v in share.values())
    assert len(share) == 2
    assert re.search(r"^the floor +[\d.]+ +[\d.]+%$", out, re.MULTILINE)


# ---- Every position a target


def test_every_position_is_timed_with_the_same_bits_in_packs_as_large_as_asked_for(monkeypatch):
    seen, update = [], train.Ours.update

    def watched(ours, step):
        seen.append(([p.tokens for p in step.packs], torch.are_deterministic_algorithms_enabled()))
        return update(ours, step)

    monkeypatch.setattr(train.Ours, "update", watched)
    for pack_tokens, packs in ((30, [29, 18]), (32, [32])):  # 15 tokens begin both trees
        same_bits(False)
        settings = targets.Settings(shape="tiny", pack_tokens=pack_tokens, repeats=1)
        assert targets.Timer(settings, CPU).examples_per_second(TREES) > 0
        assert seen == [(packs, True)] * 2
        seen.clear()


def test_every_position_makes_a_table_with_times(monkeypatch, capsys, data_folder, model_folder):
    flags = f"--data {data_folder} --model {model_folder} --history 3 --users 2 --shape tiny"
    out = run(monkeypatch, capsys, targets, f"{flags} --timed-users 1 --repeats 1")
    rows = re.findall(r"^(\S+), (last|all) .*x +([\d.]+) +([\d.]+) +([\d.]+)x$", out, re.MULTILINE)
    assert len(rows) == 8  # four paradigms
    for _, _, separate, together, ratio in rows:
        assert float(together) / float(separate) == pytest.approx(float(ratio), rel=0.05)


# ---- What fp8 changes


def test_a_model_that_is_not_there_ends_the_comparison_of_fp8_in_one_line(
    monkeypatch, capsys, data_folder
):
    monkeypatch.setattr("sys.argv", ["fp8.py", "--model", "nosuch", "--data", str(data_folder)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "bench" / "fp8.py"), run_name="__main__")
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("fp8: ")
    assert "nosuch" in err
    assert err.count("\n") == 1


def test_a_user_larger_than_a_pack_is_named_before_anything_is_trained(data_folder, model_folder):
    settings = fp8.Settings(model=model_folder, data=str(data_folder), pack_tokens=64)
    with pytest.raises(InputError, match=r"'.+' fills more than a pack of 64 tokens; raise --pack"):
        fp8.Task.of(settings, CPU)


# ---- All of them


def test_the_plan_fits_three_calls_and_every_command_has_flags_that_there_are(monkeypatch):
    assert sum(job.seconds for job in every.JOBS) <= 3 * 9.5 * 60
    assert len({job.name for job in every.JOBS}) == len(every.JOBS)
    modules = {"bench.train": train, "bench.score": score, "bench.summarize": None}
    from bench import summarize

    modules["bench.summarize"] = summarize
    for job in every.JOBS:
        for small in (False, True):
            module, *flags = job.words(small)
            monkeypatch.setattr("sys.argv", [module, *flags])
            settings = modules[module].parse_settings(modules[module].Settings, "")
            assert (settings.shape == "tiny") == small


def test_a_failure_is_recorded_and_only_what_is_missing_runs_again(monkeypatch, tmp_path, capsys):
    jobs = (
        every.Job("good", 20, "platform"),
        every.Job("bad", 20, "no_such_module"),
        every.Job("long", 4000, "platform"),
    )
    monkeypatch.setattr(every, "JOBS", jobs)
    monkeypatch.setattr(every, "card_and_versions", lambda: "a card, torch 0")
    flags = f"--out {tmp_path} --minutes 5 --commit "
    out = run(monkeypatch, capsys, every, flags + "abc")
    assert re.search(r"^bad +\d+ +20   exit status 1", out, re.MULTILINE)
    assert re.search(r"^long +0 +4000   not run", out, re.MULTILINE)
    text = (tmp_path / "all.txt").read_text()
    assert re.search(r"^# good: ok, \d+ s, commit abc, .* UTC, a card, torch 0$", text, re.M)
    assert "$ python -m platform\n" in text
    assert "! " in text
    assert "No module named no_such_module" in text

    run(monkeypatch, capsys, every, flags + "abc")
    text = (tmp_path / "all.txt").read_text()
    assert text.count("# good: ok") == 1
    assert text.count("# bad: exit status 1") == 2
    out = run(monkeypatch, capsys, every, flags + "abc --dry-run")
    plan = re.findall(r"^ *(\S+) +\d+ s  (\S+)", out, re.MULTILINE)  # what has failed, then done
    assert plan == [("66:40", "long"), ("67:00", "bad"), ("done", "good")]
    run(monkeypatch, capsys, every, flags + "def")
    assert (tmp_path / "all.txt").read_text().count("# good: ok") == 2


def starts_another(seconds, then):
    """A benchmark that starts a process of so many seconds, and prints its id."""
    code = f"import subprocess, sys; sleep = 'import time; time.sleep({seconds})';"
    code += "other = subprocess.Popen([sys.executable, '-c', sleep]);"
    return ["timeit", "-n1", "-r1", f"{code} print(other.pid, flush=True); {then}"]


def has_ended(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"  # nothing has to collect an orphan


def test_what_takes_too_long_is_stopped_with_what_it_has_started_and_printed():
    for limit in (3, 30, 300):  # how long a busy machine takes to start a process is not known
        state, took, out = every.run(starts_another(limit + 30, "other.wait()"), limit)
        if out:
            break
    assert state == f"stopped after {limit} s"
    assert took < limit + 20
    wait_until(lambda: has_ended(int(out.split()[0])), seconds=10)


def test_what_has_ended_is_done_though_a_process_that_it_has_started_keeps_its_output_open():
    state, took, out = every.run(starts_another(30, "pass"), limit=600)
    assert state == "ok"
    assert took < 30
    wait_until(lambda: has_ended(int(out.split()[0])), seconds=10)


def test_the_results_are_a_table(capsys):
    job = every.Job("train", 10, "bench.train")
    output = "ours   82.8 examples/s\nA   5.02 examples/s   ours is 16.5 times as fast\n"
    output += "B   22.3 examples/s   ours is 3.71 times as fast (its best)"
    every.show_results([job], {"train": every.Result("ok", 12, output)})
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["train", "12", "10", "82.8", "examples/s", "3.71x"]
