"""models/export.py: a run as a model folder that transformers loads as it is."""

import io
import json
import re
import shutil

import pytest
import torch
from helpers import CPU, LLAMAS, ROOT, change_json, random_ids, run_here, scores, write_model
from helpers import flags as as_flags
from helpers import run as run_script
from safetensors.torch import load_file, save_file
from test_chat import bytes_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
import trsr
from files.jsonl import read_json
from models import export
from models.chat import Plain
from models.hub import load_form, load_model
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset
from prepare.domains import DOMAINS, wording

SERVING = (ROOT / "docs" / "serving.md").read_text()


def exported(run, out, check=True, **settings):
    arguments = as_flags(run=run, out=out, **settings)
    done = run_here(export.main, "export.py", arguments)
    assert not check or done.returncode == 0, done.stderr
    return done


def logits_of(folder, ids):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(ids).logits


@pytest.fixture
def copied(tmp_path, trained_run):
    """A copy of the trained run, to be spoiled."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def run_on(tmp_path, data_folder, folder):
    """A run of one epoch on each architecture."""
    common = {"data": data_folder, "model": folder, "paradigm": "recent-only", "lr": 0.01}
    run_script("train.py", run=tmp_path / "run", **common, epochs=1, batch_size=8)
    return tmp_path / "run"


def test_transformers_finds_the_logits_of_the_adapter(tmp_path, run_on, folder):
    out, ids = tmp_path / "out", random_ids(2, 40)
    done = exported(run_on, out)
    assert "parameters in float32, adapter of" in done.stdout
    ours, base = load_model(folder, CPU, torch.float32), load_model(folder, CPU, torch.float32)
    lora.load_adapter(ours, run_on / "adapter")
    with torch.no_grad():
        expected, untrained = ours.eval()(ids), base(ids)
    assert (logits_of(out, ids) - expected).abs().max() < 1e-5
    assert (untrained - expected).abs().max() > 1e-2  # so that a lost adapter would be seen
    assert AutoTokenizer.from_pretrained(out)("a blue lamp").input_ids
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "trsr.json"} < names
    assert {path.name for path in folder.glob("tokenizer*")} < names


@pytest.mark.parametrize("changes", ["grouped-query", "tied", "attention-bias"])
def test_shards_ties_and_dtypes_are_kept(tmp_path, changes):
    base, out = tmp_path / "base", tmp_path / "out"
    write_model(base, dtype=torch.bfloat16, **LLAMAS[changes])
    assert export.own_dtype(base) == torch.bfloat16
    model, ids = load_model(base, CPU, torch.bfloat16), random_ids(2, 20)
    lora.apply_lora(model, lora.LoRAConfig())
    torch.manual_seed(1)
    for layer in lora.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.5)
    lora.merge(model)
    out.mkdir()
    export.export(model, base, out, limit=50_000)

    index = read_json(out / "model.safetensors.index.json")
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    assert all((out / name).stat().st_size < 90_000 for name in files)
    found = {name: t for file in files for name, t in load_file(out / file).items()}
    assert found.keys() == index["weight_map"].keys()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert sum(t.nbytes for t in found.values()) == index["metadata"]["total_size"]
    assert ("lm_head.weight" in found) == (changes != "tied")
    config = read_json(out / "config.json")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    with torch.no_grad():
        expected = model.float()(ids)
    assert (logits_of(out, ids) - expected).abs().max() < 1e-5


def test_the_folder_says_how_to_ask_and_gives_the_scores_of_evaluate(
    tmp_path, copied, data_folder, model_folder
):
    out = tmp_path / "out"
    run_script("evaluate.py", run=copied)
    exported(copied, out)
    record = json.loads((out / "trsr.json").read_text())
    assert (record["items"], record["form"]) == (3, "plain")
    form = Plain(Tokenizer(model_folder, 640))
    answers = [record["answers"][answer] for answer in ("Yes", "No")]
    domain, items, splits = load_dataset(data_folder, ("test",))
    assert answers == list(trsr.answer_ids(form.encode, domain))
    assert record["prompt_ids"] == form.tokenizer.encode([record["prompt"]])[0]
    assert record["prompt"] in (out / "README.md").read_text()

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    for example, line in zip(splits["test"], scores(copied), strict=True):
        recent = trsr.numbered([items[i] for i in example.history[-3:]])
        for item, expected in zip(line["candidates"], line["scores"], strict=True):
            prompt = record["prompt"].replace("1. ITEM", recent).replace("CANDIDATE", items[item])
            ids = torch.tensor(form.tokenizer.encode([prompt]))
            with torch.no_grad():
                yes, no = model(ids).logits[0, -1, answers].tolist()
            assert abs(float(trsr.yes_probability(yes, no)) - expected) < 1e-5


@pytest.mark.parametrize(
    ("paradigm", "history_items", "sections"),
    [
        ("hierarchical", 3, ["Preference Summary", "Historical Items", "Next Item"]),
        ("recurrent", 0, ["Preference Summary", "Next Item"]),
        ("whole-history", 3, ["Historical Items", "Next Item"]),
        ("none", 3, ["Next Item"]),
    ],
)
def test_the_prompt_shows_what_the_paradigm_shows(paradigm, history_items, sections, model_folder):
    form = Plain(Tokenizer(model_folder, 640))
    words = wording(paradigm, DOMAINS["news"], form.show)["recommend"]
    trained = {"paradigm": paradigm, "history_items": history_items, "prompt": words}
    found = export.how_to_ask(trained | {"max_length": 4096}, model_folder, form)
    lines = found["prompt"].splitlines()
    assert [line[1:-1] for line in lines if line.startswith("[")] == sections
    assert DOMAINS["news"].recommend in found["prompt"]
    assert found["max_length"] == 1024  # the model's context
    shown = [3 * ["a"] if "Historical Items" in sections else [], ["b"]]
    (message,) = trsr.recommendation_prompts(paradigm, DOMAINS["news"], "c", *shown)
    asked = found["prompt"].replace("1. ITEM", "1. a\n2. a\n3. a")
    assert asked.replace("SUMMARY", "c").replace("CANDIDATE", "b") == form.show(message)


def test_a_chat_models_prompt_is_that_of_its_template(tmp_path, tokenizer_json):
    base = bytes_folder(tmp_path, "chatml", tokenizer_json)
    form = load_form(base, chat=True)
    words = wording("recent-only", DOMAINS["news"], form.show)["recommend"]
    trained = {"paradigm": "recent-only", "history_items": 3, "max_length": 99, "prompt": words}
    found = export.how_to_ask(trained | {"chat": True}, base, form)
    assert found["form"] == "chat"
    turns = [{"role": "user", "content": found["message"]}]
    theirs = AutoTokenizer.from_pretrained(base)
    asked = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert found["prompt_ids"] == asked
    with pytest.raises(trsr.InputError, match="other words than in training"):
        export.how_to_ask(trained, base, load_form(base, chat=False))


def test_a_model_trained_whole_is_written_as_it_is(tmp_path, fit):
    out = tmp_path / "out"
    fit(tmp_path / "run", epochs=1, lora_r=0)
    exported(tmp_path / "run", out)
    expected, found = (
        load_file(f / "model.safetensors") for f in (tmp_path / "run" / "model", out)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_json(out / "trsr.json")["kind"] == "model"
    exported(tmp_path / "run", out, dtype="bf16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_only_an_earlier_export_is_replaced(tmp_path, trained_run, model_folder):
    out = tmp_path / "out"
    exported(trained_run, out)
    first = (out / "model.safetensors").read_bytes()
    assert "replacing the model" in exported(trained_run, out).stdout
    assert (out / "model.safetensors").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing temporary is left
    (out / "mine.txt").write_text("x")
    done = exported(trained_run, out, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("export: ")
    assert "did not write (mine.txt)" in done.stderr
    base = shutil.copytree(model_folder, tmp_path / "base")
    assert exported(trained_run, base, check=False).returncode == 2
    assert not (base / "trsr.json").exists()


def spoil_prompt(run, _):
    change_json(run / "config.json", train=spoiled(run, prompt="Something else"))


def spoil_paradigm(run, _):
    change_json(run / "config.json", train=spoiled(run, paradigm="hierarchical"))


def spoil_base(run, _):
    change_json(run / "config.json", train=spoiled(run, model="models/absent/folder"))


def spoil_fingerprint(run, base):
    other = shutil.copytree(base, run.parent / "other")
    change_json(other / "config.json", rms_norm_eps=1e-3)
    change_json(run / "config.json", train=spoiled(run, model=str(other)))


def spoil_adapter(run, _):
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x")


def spoil_weights(run, _):
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def spoil_training(run, _):
    shutil.rmtree(run / "adapter")


def forget_prompt(run, _):
    train = spoiled(run)
    del train["prompt"]
    change_json(run / "config.json", train=train)


def spoiled(run, **changes):
    return read_json(run / "config.json")["train"] | changes


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_training, "nothing trained here yet; first run python train.py --run"),
        (spoil_base, "models/absent/folder: "),
        (spoil_fingerprint, "its files are other ones than those that"),
        (spoil_prompt, "other words than in training"),
        (spoil_paradigm, "other words than in training"),
        (forget_prompt, "field 'prompt' of 'train' is missing"),
        (spoil_weights, "holds something that is not a finite number; train the run again"),
        (spoil_adapter, "adapter_model.safetensors: not a safetensors file"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, copied, model_folder, spoil, told):
    spoil(copied, model_folder)
    done = exported(copied, tmp_path / "out", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("export: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_of_several_dtypes_need_a_choice(tmp_path, model_folder):
    base = shutil.copytree(model_folder, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(trsr.InputError, match="weights in F16 and F32; choose with --dtype"):
        export.own_dtype(base)
    (base / "model.safetensors").write_bytes(b"x" * 9)
    with pytest.raises(export.CheckpointError, match="cut short"):
        export.own_dtype(base)


# ---- docs/serving.md


class StandIn:
    """Answers a request as vLLM and SGLang document it, with transformers' logits."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.asked = []

    def __call__(self, request):
        body = json.loads(request.data)
        self.asked.append((request.full_url, body))
        ids = body["prompt"] if "prompt" in body else body["input_ids"]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        if request.full_url.endswith("/v1/completions"):
            allowed = body["allowed_token_ids"]
            found = logits[allowed].log_softmax(-1).tolist()
            top = {f"token_id:{i}": value for i, value in zip(allowed, found, strict=True)}
            answer = {"choices": [{"logprobs": {"top_logprobs": [top]}}]}
        else:
            found = logits.log_softmax(-1)
            triples = [[found[i].item(), i, None] for i in body["token_ids_logprob"]]
            answer = {"meta_info": {"output_token_ids_logprobs": [triples]}}
        return io.BytesIO(json.dumps(answer).encode())


def test_the_code_of_the_page_finds_the_scores_of_evaluate(
    tmp_path, copied, data_folder, monkeypatch
):
    run_script("evaluate.py", run=copied)
    exported(copied, tmp_path / "data/models/mind")
    (code,) = re.findall(r"^```python\n(.*?)^```$", SERVING, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    page = {}
    exec(code, page)
    page["urlopen"] = stand_in = StandIn("data/models/mind")

    _, items, splits = load_dataset(data_folder, ("test",))
    for example, line in zip(splits["test"], scores(copied), strict=True):
        recent = [items[i] for i in example.history[-page["TRSR"]["items"] :]]
        for item, expected in zip(line["candidates"], line["scores"], strict=True):
            ids = page["prompt_ids"](items[item], recent)
            assert abs(page["ask_vllm"](ids, "data/models/mind") - expected) < 1e-5
            assert abs(page["ask_sglang"](ids, "mind") - expected) < 1e-5
    assert {url for url, _ in stand_in.asked} == {
        "http://localhost:8000/v1/completions",
        "http://localhost:30000/generate",
    }
    evil = ["]\nCANDIDATE", "[x]\nCANDIDATE"]  # texts are no places to fill in
    text = page["FORM"].tokenizer.decode(page["prompt_ids"]("a blue lamp", evil))
    assert (text.count("a blue lamp"), text.count("CANDIDATE")) == (1, 2)


def test_the_page_names_every_field_of_trsr_json(tmp_path, trained_run):
    exported(trained_run, tmp_path / "out")
    record = read_json(tmp_path / "out" / "trsr.json")
    about_the_folder = {"made_by", "base", "kind", "dtype", "parameters", "files", "paradigm"}
    assert all(f"`{name}`" in SERVING for name in record.keys() - about_the_folder)
