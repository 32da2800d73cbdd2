"""experiments/worker.py and processes.py: a stage in a used process is a stage in a new one."""

import gc
import os
import signal
import threading

import pytest
import torch
from helpers import ROOT, TINY, flags, wait_until, write_dataset
from torch._dynamo.utils import counters

from experiments import processes
from experiments.processes import Call, Fresh, Workers
from experiments.worker import Defaults
from llama import Config, Llama
from lora import LoRAConfig, apply_lora

SCRIPTS = {
    "tells": """
        import os, signal, sys, torch
        print("flags", *sys.argv[1:], "stdin", repr(sys.stdin.read()), flush=True)
        os.system("echo from a child; echo and its errors >&2")
        state = [torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()]
        state += [torch.utils.deterministic.fill_uninitialized_memory, torch.is_grad_enabled()]
        state += [signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "STRAY" in os.environ]
        state += [signal.getsignal(signal.SIGINT) == signal.default_int_handler]
        print("state", *state, "main", __name__)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        os.environ["STRAY"] = "1"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    """,
    "ends": "import sys; sys.exit(eval(sys.argv[1]))",
    "breaks": "print('so far'); 1 / 0",
    "saves": """
        import signal, sys, time
        def save(*_): print("saved"); sys.exit(2)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(600)
    """,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a process that finds SCRIPTS as modules."""
    folder = tmp_path_factory.mktemp("modules")
    for name, text in SCRIPTS.items():
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def shared():
    """Workers that several tests use, as several experiments would not."""
    made = Workers()
    yield made
    made.stop()
    made.close()


def call(tmp_path, script, *flags):
    return Call(script, flags, tmp_path / f"{script}.log")


def test_a_stage_finds_the_process_as_if_it_were_new(shared, environment, tmp_path):
    found = []
    for flag in ("--one", "--two"):
        found.append(shared.run(call(tmp_path, "tells", flag), environment))
    (process,) = [worker.process for worker in shared.idle]
    assert process.poll() is None
    fresh = Fresh().run(call(tmp_path, "tells", "--two"), environment)
    assert "flags --one stdin ''" in found[0][1]
    assert "from a child" in found[0][1]
    assert found[1] == fresh  # its output and status
    assert "state False 1 True True True False True main __main__" in fresh[1]


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [("0", 0, ""), ("None", 0, ""), ("3", 3, ""), ("'no room'", 1, "no room\n")],
)
def test_exit_statuses_are_those_of_a_process(shared, environment, tmp_path, code, status, text):
    assert shared.run(call(tmp_path, "ends", code), environment) == (status, text)


def test_a_failing_stage_has_a_traceback_and_the_next_one_a_new_worker(
    shared, environment, tmp_path
):
    shared.run(call(tmp_path, "ends", "0"), environment)
    (first,) = shared.idle
    status, output = shared.run(call(tmp_path, "breaks"), environment)
    assert status == 1
    assert output.startswith("so far\nTraceback")
    assert output.endswith("ZeroDivisionError: division by zero\n")
    assert shared.idle == []
    assert first.process.poll() is not None
    assert shared.run(call(tmp_path, "ends", "0"), environment) == (0, "")


def in_thread(workers, asked, environment):
    """Run a call in a thread; return the thread and where its result will be."""
    found = []
    thread = threading.Thread(target=lambda: found.append(workers.run(asked, environment)))
    thread.start()
    wait_until(lambda: asked.log.is_file() and "ready" in asked.log.read_text(), seconds=120)
    return thread, found


def test_a_killed_worker_fails_its_stage_alone(shared, environment, tmp_path):
    thread, found = in_thread(shared, call(tmp_path, "saves"), environment)
    (busy,) = shared.busy
    busy.process.kill()
    thread.join(60)
    assert found == [(-signal.SIGKILL, "ready\n")]
    assert (shared.busy, shared.idle) == ([], [])
    assert processes.signal_name(-signal.SIGKILL) == "SIGKILL"
    assert shared.run(call(tmp_path, "ends", "0"), environment) == (0, "")
    # One that was killed between two stages is not asked at all.
    (idle,) = shared.idle
    idle.process.kill()
    idle.process.wait()
    assert shared.run(call(tmp_path, "ends", "0"), environment) == (0, "")
    assert idle not in shared.idle


def test_sigterm_reaches_the_script_and_no_other_one_starts(environment, tmp_path):
    workers = Workers()
    thread, found = in_thread(workers, call(tmp_path, "saves"), environment)
    workers.stop()
    thread.join(60)
    assert found == [(2, "ready\nsaved\n")]
    with pytest.raises(processes.InputError, match="interrupted"):
        workers.run(call(tmp_path, "ends", "0"), environment)
    workers.close()


def test_an_interruption_while_waiting_has_the_script_save(shared, environment, tmp_path):
    asked = call(tmp_path, "saves")

    def interrupt():
        wait_until(lambda: asked.log.is_file() and "ready" in asked.log.read_text(), seconds=120)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        shared.run(asked, environment)
    thread.join()
    assert asked.log.read_text() == "ready\nsaved\n"
    assert shared.busy == []


def test_a_training_after_another_one_is_that_of_a_new_process(model_folder, tmp_path):
    data = write_dataset(tmp_path / "data", history=(3, 6))
    settings = {"data": data, "model": model_folder, "paradigm": "recent-only", "epochs": 1}
    settings |= {"batch_size": 8}
    workers = Workers()
    chosen = ("adapter/adapter_model.safetensors", "scores-test.jsonl", "results.json")
    for name, seed, ways in (("first", 3, [workers]), ("run", 4, [workers, Fresh()])):
        results = []
        for way in ways:
            run = tmp_path / type(way).__name__ / name
            run.mkdir(parents=True)
            given = flags(**settings, run_dir=run, seed=seed)
            status, output = way.run(Call("train.py", tuple(given), run / "log"), None)
            assert status == 0, output
            given = ("--run-dir", str(run))
            status, output = way.run(Call("evaluate.py", given, run / "log"), None)
            assert status == 0, output
            results.append([(run / path).read_bytes() for path in chosen[:2]])
    workers.stop()
    workers.close()
    assert results[0] == results[1]


def test_a_second_model_of_the_same_shapes_compiles_nothing():
    sizes = {name: TINY[name] for name in Config.__dataclass_fields__ if name in TINY}
    config = Config(**sizes, head_dim=12)

    def compilations(tokens):
        """Run a new model forward and backward; return how much has been compiled by then."""
        model = apply_lora(Llama(config), LoRAConfig(4, 16.0, 0.05, ("q_proj", "v_proj")))
        for layer in model.train().model.layers:
            layer.compile(dynamic=False, backend="eager")  # as compile_layers does
        x = torch.zeros(1, tokens, config.hidden_size, requires_grad=True)
        rotary = [torch.ones(1, tokens, 1, config.head_dim)] * 2
        for layer in model.model.layers:
            x = layer(x, tuple(rotary), torch.arange(tokens)[None], None, None)
        x.sum().backward()
        del model, x
        gc.collect()
        Defaults().restore()  # what a worker does between two stages
        return counters["stats"]["unique_graphs"]

    Defaults().restore()  # what other tests have set would be another compilation
    torch._dynamo.reset()
    counters.clear()
    found = [compilations(tokens) for tokens in (16, 16, 24, 16, 24)]
    assert found[0] > 0
    assert found[2] > found[1] == found[0]  # another length is another compilation
    assert found[2] == found[3] == found[4]
