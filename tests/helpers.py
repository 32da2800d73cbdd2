"""What several test files share: small models and data, slow ways to compute, and commands.

What takes time to make is a fixture in conftest.py instead.
"""

import csv
import importlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import llama
import lora
from launch.command import run_main
from models import hub
from ops.packs import make_deep_tree, make_tree
from ops.penalties import TextCache
from prepare import amazon_m2
from summarize import Generator

ROOT = Path(__file__).parent.parent
TINY_MODEL = ROOT / "models" / "tiny"  # the embedded default
CPU = torch.device("cpu")
COLORS = ["amber", "blue", "coral", "denim", "ebony", "fawn"]
THINGS = ["kettle", "lamp", "mirror", "notebook", "oven glove", "pillow", "quilt", "radio"]
NASTY = "<script>alert(\"x\")</script> & 'quoted'"  # a text that a page has to escape

# ---- Small random models, saved by transformers

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
TINY_NEOX = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_model(folder, shards=1, seed=0, dtype=torch.float32, tokenizer=None, **changes):
    """Save a Llama with random weights of a visible size; return transformers' model of it.

    tokenizer: a tokenizer.model to put beside the weights.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | changes))).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    save(model, folder, shards)
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return model


def write_neox(folder, shards=1, seed=0, dtype=torch.float32, **changes):
    """Save a GPT-NeoX with random weights of a visible size; return transformers' model of it."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**(TINY_NEOX | changes))).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.08 if parameter.dim() > 1 else 0.3)
    save(model, folder, shards)
    return model


def save(model, folder, shards):
    """Save a model in one file, or in about this many shards."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else "5GB")


# ---- The two architectures, and families of configurations


@dataclass(frozen=True)
class Architecture:
    """How tests make, load and compare the models of one architecture."""

    name: str
    write: Callable  # (folder, **changes of the configuration)
    load: Callable  # (folder, device, dtype)
    reference: type  # transformers' class
    attention: tuple[str, ...]  # the layers that an adapter changes by default
    eos: int

    def __str__(self):
        return self.name


LLAMA = Architecture("llama", write_model, llama.load_model, LlamaForCausalLM, lora.ATTENTION, 2)
NEOX_ATTENTION = ("query_key_value", "dense")
NEOX = Architecture("neox", write_neox, hub.load_model, GPTNeoXForCausalLM, NEOX_ATTENTION, 0)

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(kind="default", theta=10000.0, **more):
    """Return the change of a configuration that asks for these rotary parameters."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def partial_rope(part, kind="default", theta=10000.0, **more):
    """Return rope's change for a model that rotates only a part of each head."""
    return rope(kind, theta, partial_rotary_factor=part, **more)


LLAMAS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "wide-heads": {"head_dim": 24},
    "narrow-heads": {"head_dim": 8, "tie_word_embeddings": True},
    "rope-theta": rope(theta=500000.0),
    "rope-linear": rope("linear", factor=4.0),
    "rope-llama3": rope("llama3", 500000.0, **LLAMA3),
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
        **rope("llama3", **LLAMA3),
    },
}
PYTHIAS = {
    "pythia": {},
    "sequential": {"use_parallel_residual": False},
    "whole-heads": partial_rope(1.0),
    "half-heads": partial_rope(0.5, theta=500000.0),
    "no-attention-bias": {"attention_bias": False},
    "gelu-fast": {"hidden_act": "gelu_fast"},
    "gelu-new": {"hidden_act": "gelu_new", "use_parallel_residual": False},
    "rope-linear": partial_rope(0.5, "linear", factor=4.0),
    "rope-llama3": partial_rope(1.0, "llama3", **LLAMA3),
    "deep-eps": {"num_hidden_layers": 4, "layer_norm_eps": 1e-2, "num_attention_heads": 8},
}
FAMILIES = {
    **{f"llama-{name}": (LLAMA, changes) for name, changes in LLAMAS.items()},
    **{f"neox-{name}": (NEOX, changes) for name, changes in PYTHIAS.items()},
}


def change_json(path, **changes):
    """Change fields of the JSON object in path; None removes a field."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in record.items() if v is not None}))


def empty_cache(config, rows, slots, device=CPU, dtype=torch.float32):
    """Return a cache of zeros for a model of that configuration."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    return TextCache(None, config.num_hidden_layers, shape, device, dtype)


def generate(model, prompts, max_new_tokens, eos_ids, batch_size=16):
    """Return the greedy continuation of each prompt, `batch_size` at a time."""
    generator, outputs = Generator(model, batch_size, max_new_tokens, eos_ids), {}
    generator.submit(sorted(enumerate(prompts), key=lambda pair: -len(pair[1])))
    while len(outputs) < len(prompts):
        outputs |= generator.step()
    return [outputs[i] for i in range(len(prompts))]


def fresh_adapter(model_folder):
    """Return the model with the adapter that a run with seed 0 starts from."""
    model = llama.load_model(model_folder, CPU, torch.float32)
    torch.manual_seed(0)
    return lora.apply_lora(model, lora.LoRAConfig())


# ---- Token ids, trees, and their loss the slow way


def random_ids(*shape, seed=1):
    """Return random token ids without special tokens."""
    return torch.randint(3, 640, shape, generator=torch.Generator().manual_seed(seed))


def random_prompts(*lengths):
    """Return a prompt of random ids for each length."""
    return [random_ids(n, seed=n).tolist() for n in lengths]


def random_trees(n, branches, seed=0):
    """Return n trees with this many branches, which share a trunk of 7 tokens."""

    def chain(*lengths, seed):
        ids = iter(random_ids(sum(lengths), seed=seed).tolist())
        return [[next(ids) for _ in range(length)] for length in lengths]

    (trunk,) = chain(7, seed=seed + 100)
    trees = []
    for i in range(n):
        lengths = 5 + 3 * i % 11, *(3 + (i + b) % 5 for b in range(branches))
        stem, *tails = chain(*lengths, seed=seed + i)
        trees.append(make_tree([trunk + stem + tail for tail in tails]))
    return trees


def random_deep_trees(n, sequences, seed=0):
    """Return n trees of any depth, each of this many sequences, which share a trunk of 7 tokens."""
    rng, trees = random.Random(seed), []
    trunk = random_ids(7, seed=seed + 100).tolist()
    for _ in range(n):
        made = [[*trunk, 3, 4]]
        while len(made) < sequences:
            begin = rng.choice(made)
            begin = begin[: rng.randint(8, len(begin))]
            # Two tokens to choose from at first, so that many go on alike.
            made.append([*begin, rng.randint(3, 4), *(rng.randint(3, 639) for _ in range(5))])
        trees.append(make_deep_tree(made))
    return trees


def sequences(tree):
    """Return the tree's token sequences, each on its own."""
    return tree.sequences()


def last_logits(model, ids):
    """Return the logits (V,) after the last token of a sequence that is read alone."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def separate_loss(model, trees):
    """Return the summed next-token loss of all sequences, each read alone, and their targets."""
    total, count = 0.0, 0
    for ids in (s for tree in trees for s in sequences(tree)):
        logits = model(torch.tensor([ids]))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        count += len(ids) - 1
    return total, count


# ---- A dataset


def write_dataset(folder, users=(12, 4, 4), negatives=(1, 5, 5), history=(4, 9), seed=0):
    """Write a small dataset in the project's schema; return its folder."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    items = [f"i{n}" for n in range(60)]
    lines = []
    for i in items:
        title = f"{rng.choice(COLORS)} {rng.choice(THINGS)}"
        lines.append({"id": i, "attributes": {"Title": title, "Color": rng.choice(COLORS)}})
    write_lines(folder / "items.jsonl", lines)

    for split, n_users, n_negatives in zip(("train", "val", "test"), users, negatives, strict=True):
        lines = []
        for u in range(n_users):
            chosen = rng.sample(items, rng.randint(*history) + 1 + n_negatives)
            *past, positive = chosen[: len(chosen) - n_negatives]
            example = {"user": f"{split}{u}", "history": past, "positive": positive}
            lines.append(example | {"negatives": chosen[len(chosen) - n_negatives :]})
        write_lines(folder / f"{split}.jsonl", lines)
    (folder / "meta.json").write_text(json.dumps({"domain": "products"}))
    return folder


def read_lines(path):
    """Return the objects in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path, records):
    """Write objects as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def count_lines(path):
    """Return how many whole lines a file has by now; 0 if it is not there."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


# ---- Raw data, as published, and the dataset that is prepared from it

SPLITS = ("train", "val", "test")
SMALL = {"min_history": 2, "max_history": 3, "eval_negatives": 2}  # filters for a few rows


def prepared(module, **settings):
    """Run a reader's main, whose errors are raised here; return its output folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *flags(**settings)])
        module.main()
    return settings["out"]


def examples(folder):
    """Return the examples of all splits by user."""
    return {e["user"]: e for split in SPLITS for e in read_lines(folder / f"{split}.jsonl")}


def meta(folder):
    """Return meta.json."""
    return json.loads((folder / "meta.json").read_text("utf-8"))


def write_mind(folder, behaviors, n_news=12, news=()):
    """Write MIND's files: n_news articles and more of them, and (user, history, impressions)."""
    names = [(str(n), f"Title {n}", f"About {n}") for n in range(n_news)]
    rows = [[f"N{n}", "news", "local", *texts, "", "[]", "[]"] for n, *texts in names]
    write_rows(folder / "news.tsv", [*rows, *news])
    time = "11/12/2019 2:14:46 PM"
    rows = [[str(n), user, time, *rest] for n, (user, *rest) in enumerate(behaviors, 1)]
    write_rows(folder / "behaviors.tsv", rows)
    return folder


def write_rows(path, rows):
    """Write rows with tabs between the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")


def write_amazon(folder, n_products, n_sessions, locales=("UK", "DE"), description=40, seed=0):
    """Write Amazon-M2's files, of any size; a fifth of the sessions has 10 or more items."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    text = "Holds &amp; pours, " * (description // 18)
    with open(folder / "products_train.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(amazon_m2.PRODUCTS)
        for n in range(n_products):
            names = f"B{n:09}", locales[n % len(locales)], f'Jug "{n}"\nlarge'
            write([*names, 9.5, "Acme", "", "1 l", "", "Tin", "", text])

    with open(folder / "sessions_train.csv", "w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(amazon_m2.SESSIONS)
        spread = n_products // len(locales)
        for n in range(n_sessions):
            length = rng.randint(10, 25) if rng.random() < 0.2 else rng.randint(1, 4)
            kind = n % len(locales)
            ids = [int(rng.random() * spread) * len(locales) + kind for _ in range(length + 1)]
            *items, target = (f"B{i:09}" for i in ids)
            rows = [items[k : k + 5] for k in range(0, length, 5)]
            lines = [" ".join(f"'{item}'" for item in row) for row in rows]
            write(["[" + "\n ".join(lines) + "]", target, locales[kind]])
    return folder


# ---- Commands


def flags(**settings):
    """Return settings as flags: True as a switch, a list as several values, None left out."""
    found = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        found += ["--" + name.replace("_", "-"), *map(str, values)]
    return found


def command(script, *more, processes=1, torchrun=(), **settings):
    """Return the command line of a script, or with several processes torchrun's.

    more: of the script's flags, as they are; torchrun: of torchrun's own.
    """
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        launch += map(str, torchrun)
        settings = {"run_dir" if name == "run" else name: v for name, v in settings.items()}
    return [*launch, str(ROOT / script), *map(str, more), *flags(**settings)]


def run(script, *more, processes=1, check=True, **settings):
    """Run a script with these settings; return the finished process with its output as text.

    A single process runs inside this one, which spares it the seconds that torch takes to start.
    """
    if processes > 1:
        line = command(script, *more, processes=processes, **settings)
        done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    else:
        arguments = [*map(str, more), *flags(**settings)]
        done = run_here(importlib.import_module(Path(script).stem).main, script, arguments)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(main, script, arguments):
    """Run main as the script would, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = [script, *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run_main(main, llama.CheckpointError, lora.AdapterError)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def started(line):
    """Start a command in the background, with its output as text in pipes."""
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, process=None, seconds=600):
    """Wait until condition() holds or the process has ended; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, "what was waited for has not happened"
        time.sleep(0.002)


def children(pid):
    """Return the process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def own_lines(errors, script):
    """Return the lines with which a script reports errors, also behind a progress bar."""
    return re.findall(rf"(?:^|[\r\]])({script}: .*)$", errors, re.MULTILINE)


# ---- What a run leaves


def metrics(run_folder):
    """Return the lines of metrics.jsonl."""
    return read_lines(run_folder / "metrics.jsonl")


def losses(run_folder):
    """Return (step, loss, gradient norm) of each training step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(run_folder) if "loss" in r]


def validations(run_folder):
    """Return the validation recalls of each epoch."""
    return [r["validation"] for r in metrics(run_folder) if "validation" in r]


def scores(run_folder, name="scores-test.jsonl"):
    """Return the lines of a run's scores, one per user."""
    return read_lines(run_folder / name)


def same_losses(folder, other, limit, norm_limit=None):
    """Check that two runs have the same steps, with losses and gradient norms this close."""
    for (step, loss, norm), (step1, loss1, norm1) in zip(
        losses(folder), losses(other), strict=True
    ):
        assert step == step1
        assert abs(loss - loss1) < limit
        assert norm_limit is None or abs(norm - norm1) < norm_limit
