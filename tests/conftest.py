"""Small random models, a tokenizer and a dataset, made once for all tests."""

import importlib
import io
import json
import random
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.command import run_main
from llama import CheckpointError
from lora import AdapterError
from prepare.domains import DOMAINS

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real data folder ../shared is absent"
)

TINY = {
    "vocab_size": 640,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
COLORS = ["amber", "blue", "coral", "denim", "ebony", "fawn"]
THINGS = ["kettle", "lamp", "mirror", "notebook", "oven glove", "pillow", "quilt", "radio"]


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


def write_model(folder, shards=1, seed=0, dtype=torch.float32, **changes):
    """Save a transformers Llama with random weights of a visible size; return it in eval mode."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    return model


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory):
    """Path of a SentencePiece model with byte fallback and Llama's conventions, 640 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    texts = [(ROOT / "LICENSE").read_text(), *(str(domain) for domain in DOMAINS.values())] * 8
    lines = [line for text in texts for line in text.splitlines()]
    lines += [
        f"Title: {rng.choice(COLORS)} {rng.choice(THINGS)}; Color: {rng.choice(COLORS)}"
        for _ in range(300)
    ]
    lines += ["### User:", "### Assistant:"] * 50
    # Before a line's end there is no blank, so the answers must be pieces without the blank's sign too.
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
def model_folder(tmp_path_factory, tokenizer_model):
    """A tiny Llama with random weights and a tokenizer, as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    return folder


def write_dataset(folder, users=(12, 4, 4), negatives=(1, 5, 5), history=(4, 9), seed=0):
    """Write a small dataset in the project's schema."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = [f"i{n}" for n in range(60)]
    with open(folder / "items.jsonl", "w") as file:
        for i in items:
            attributes = {
                "Title": f"{rng.choice(COLORS)} {rng.choice(THINGS)}",
                "Color": rng.choice(COLORS),
            }
            file.write(json.dumps({"id": i, "attributes": attributes}) + "\n")
    for split, n_users, n_negatives in zip(("train", "val", "test"), users, negatives, strict=True):
        with open(folder / f"{split}.jsonl", "w") as file:
            for u in range(n_users):
                chosen = rng.sample(items, rng.randint(*history) + 1 + n_negatives)
                *past, positive = chosen[: len(chosen) - n_negatives]
                example = {"user": f"{split}{u}", "history": past, "positive": positive}
                file.write(
                    json.dumps(example | {"negatives": chosen[len(chosen) - n_negatives :]}) + "\n"
                )
    (folder / "meta.json").write_text(json.dumps({"domain": "products"}))
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"))


def run(script, *arguments, processes=1, check=True):
    """Run one of the scripts as its command line would; return the finished process with its output as text.

    A single process runs inside this one, which spares it the seconds that torch takes to start.
    """
    arguments = list(map(str, arguments))
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / script)]
        done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=300)
    else:
        module, handlers = importlib.import_module(Path(script).stem), {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.getsignal(number)
        out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
        sys.argv = [script, *arguments]
        try:
            with redirect_stdout(out), redirect_stderr(err):
                run_main(module.main, CheckpointError, AdapterError)
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = argv
            for number, handler in handlers.items():
                signal.signal(number, handler)
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="the long tests too, and the full number of mutations"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: make test-faults"))
