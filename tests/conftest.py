"""Small random models, tokenizers, a dataset and runs, made once for all tests."""

import random
import shutil
import signal

import pytest
import sentencepiece
import torch
from helpers import (
    COLORS,
    CPU,
    LLAMA,
    NASTY,
    NEOX,
    ROOT,
    THINGS,
    command,
    flags,
    read_lines,
    run,
    write_dataset,
    write_lines,
    write_model,
    write_neox,
)

from baselines import __main__ as baselines
from launch.processes import run_script
from prepare.domains import DOMAINS

SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real data folder ../shared is absent"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """One thread is fastest for such small models; on a busy machine two wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def _fresh_compiler():
    """Otherwise it takes other tests' shapes for changing ones; some such CPU kernels fail."""
    torch._dynamo.reset()


# ---- Tokenizers


def some_lines(n):
    """Return texts to train a tokenizer on, among them n item texts."""
    rng = random.Random(0)
    texts = [(ROOT / "LICENSE").read_text(), *(str(domain) for domain in DOMAINS.values())]
    items = []
    for _ in range(n):
        title = f"{rng.choice(COLORS)} {rng.choice(THINGS)}"
        items.append(f"Title: {title}; Color: {rng.choice(COLORS)}")
    return texts, items


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    """Path of a SentencePiece model with byte fallback and Llama's conventions, 640 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts, items = some_lines(300)
    lines = [line for text in texts * 8 for line in text.splitlines()] + items
    lines += ["### User:", "### Assistant:"] * 50
    # Before a line's end there is no blank, so the answers must be pieces without its sign too.
    lines += [f"{letter}{answer}" for letter in "abcdefgh" for answer in ("Yes", "No")] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=640,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer_json():
    """A byte-level BPE tokenizer as Pythia's: no first token, and fewer pieces than rows."""
    tokenizers = pytest.importorskip("tokenizers")
    texts, items = some_lines(300)
    lines = texts * 4 + items
    lines += ["### User:\n", "### Assistant:\nYes", "### Assistant:\nNo"] * 50
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    options = {
        "vocab_size": 600,
        "special_tokens": ["<|endoftext|>", "<|padding|>"],
        "initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    made.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(**options))
    return made.to_str()


# ---- Models


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_model):
    """A tiny Llama with random weights and a tokenizer, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tokenizer=tokenizer_model)
    return folder


@pytest.fixture(scope="session")
def pythia_folder(tmp_path_factory, tokenizer_json):
    """A tiny Pythia with random weights and a tokenizer, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("pythia")
    write_neox(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder


@pytest.fixture(params=[LLAMA, NEOX], ids=str)
def architecture(request):
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def folder(architecture, request):
    """The tiny model's folder of each architecture in turn."""
    name = {"llama": "model_folder", "neox": "pythia_folder"}[architecture.name]
    return request.getfixturevalue(name)


@pytest.fixture
def tiny(architecture, folder):
    """The tiny model of each architecture in turn, in fp32."""
    return architecture.load(folder, CPU, torch.float32)


# ---- Data


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A small dataset; no test changes it."""
    return write_dataset(tmp_path_factory.mktemp("data"))


# ---- Training on it

FIT = {"paradigm": "recent-only", "batch_size": 8, "lr": 0.01}


@pytest.fixture
def fit(data_folder, model_folder):
    """Return the function that trains the tiny model on the small dataset in a run folder."""
    common = {"data": data_folder, "model": model_folder, **FIT}
    return lambda folder, **settings: run("train.py", run=folder, **common | settings)


@pytest.fixture
def fit_command(data_folder, model_folder):
    """Return the function that makes fit's command line, to be run in another process."""
    common = {"data": data_folder, "model": model_folder, **FIT}
    return lambda folder, **settings: command("train.py", run=folder, **common | settings)


@pytest.fixture(scope="session")
def alone(tmp_path_factory, data_folder, model_folder):
    """A run of three epochs by one process, without dropout; no test changes it."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    common = {"data": data_folder, "model": model_folder, **FIT}
    run("train.py", run=folder, **common, epochs=3, lora_dropout=0)
    return folder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, data_folder, model_folder):
    """A run of one epoch; no test changes what it was trained with."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    common = {"data": data_folder, "model": model_folder, "paradigm": "recent-only"}
    run("train.py", run=folder, **common, epochs=1)
    return folder


@pytest.fixture(scope="session")
def evaluated_runs(tmp_path_factory, model_folder):
    """The parent of three evaluated runs, one to three, and of their data.

    The texts would break a page that does not escape them.
    """
    parent = tmp_path_factory.mktemp("runs")
    data = write_dataset(parent / "data", history=(6, 12))
    items = read_lines(data / "items.jsonl")
    for item in items:
        item["attributes"]["Title"] += f" {NASTY}"
    write_lines(data / "items.jsonl", items)

    common, one = {"data": data, "model": model_folder}, parent / "one"
    run("summarize.py", **common, run=one, max_new_tokens=12, paradigm="recurrent")
    shutil.copytree(one, parent / "two")
    different = {"one": {}, "two": {"history_items": 1}, "three": {"paradigm": "recent-only"}}
    for name, settings in different.items():
        run("train.py", **common, run=parent / name, epochs=2, batch_size=8, **settings)
        run("evaluate.py", run=parent / name, k=[1, 3])
    run("evaluate.py", run=one, k=[1, 3], untrained=True)
    done = run("evaluate.py", run=one, k=[1, 3], report=True)
    assert "report.html" in done.stdout
    return parent


# ---- Scripts


@pytest.fixture(scope="session")
def run_baselines():
    """Return the function that runs python -m baselines, whose errors are raised here."""

    def run_here(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["baselines", *flags(**settings)])
            baselines.main()

    return run_here


@pytest.fixture
def run_script_here():
    """Return the function that runs main by run_script, in this process; gives its exit status."""
    numbers = signal.SIGTERM, signal.SIGINT
    handlers = [signal.getsignal(number) for number in numbers]

    def run_here(main):
        with pytest.raises(SystemExit) as end:
            run_script(main)
        return end.value.code

    yield run_here
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


# ---- Options


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="the long tests too, and the full number of mutations"
    )


@pytest.fixture
def times(request):
    """Return how often to repeat something: (quick, full) -> quick, or with --long full."""
    return lambda quick, full=600: full if request.config.getoption("--long") else quick


# These files take longest. They come first, so that two workers are busy to the end.
SLOW = ("train_resume", "train_processes", "faults_processes", "embedded", "faults_disk", "pythia")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would begin with the files of most tests


def pytest_collection_modifyitems(config, items):
    names = [f"test_{name}" for name in SLOW]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else 99)
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: make test-faults"))
