"""Models from strangers: nothing in them is executed, and the hub's answers are told apart."""

import http.server
import json
import os
import pickle
import shutil
import subprocess
import threading
from typing import ClassVar

import pytest
import torch
from helpers import CPU, command, own_lines, write_dataset

from llama import CheckpointError, load_model
from lora import AdapterError, LoRAConfig, adapter_tensors, apply_lora, load_adapter, save_adapter
from ops.checkpoint import fingerprint


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_pickle_is_ever_loaded(tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    attack, mark = pickle.dumps(Attack(tmp_path / "executed")), tmp_path / "executed"
    for name in ("pytorch_model.bin", "adapter_model.bin", "tokenizer.pkl", "checkpoint.pt"):
        (folder / name).write_bytes(attack)
    load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="safetensors only"):
        load_model(folder, CPU, torch.float32)
    (folder / "model.safetensors").write_bytes(attack)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(folder, CPU, torch.float32)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        fingerprint(folder)
    assert not mark.exists()


def test_an_adapter_that_is_only_a_pickle_is_refused(tmp_path, model_folder):
    model, adapter = load_model(model_folder, CPU, torch.float32), tmp_path / "adapter"
    apply_lora(model, LoRAConfig())
    save_adapter(adapter, adapter_tensors(model), LoRAConfig(), "m")
    attack = pickle.dumps(Attack(tmp_path / "executed"))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(attack)
    message = r"adapter_model\.safetensors: not a safetensors file"
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_model(model_folder, CPU, torch.float32), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(attack)
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_model(model_folder, CPU, torch.float32), adapter)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "weights.bin", "a/b.safetensors"]
)
def test_an_index_cannot_leave_its_folder(tmp_path, model_folder, name):
    folder = shutil.copytree(model_folder, tmp_path / "m")
    shutil.copyfile(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="not the plain name"):
        load_model(folder, CPU, torch.float32)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does, and repeats the token that it was sent in its messages."""

    answers: ClassVar = {
        "gated": (403, "GatedRepo"),
        "absent": (404, "RepoNotFound"),
        "broken": (500, ""),
    }
    tokens: ClassVar[list] = []

    def do_GET(self):
        kind = next((kind for kind in self.answers if f"owner/{kind}" in self.path), "broken")
        code, name = self.answers[kind]
        self.tokens.append(self.headers.get("authorization"))
        self.send_response(code)
        headers = {"X-Error-Code": name, "X-Error-Message": self.tokens[-1], "Content-Length": 0}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


TOKEN = "hf_" + "s3cr3t" * 6
CASES = {  # the model asked for, the token, and whether without network
    "gated": ("gated", TOKEN, "0"),
    "absent": ("absent", TOKEN, "0"),
    "broken": ("broken", TOKEN, "0"),
    "offline": ("gated", TOKEN, "1"),
    "token": ("gated", TOKEN + "é", "0"),
}


def test_what_the_hub_answers_is_told_apart_and_the_token_never_shown(tmp_path):
    data = write_dataset(tmp_path / "data")
    Hub.tokens.clear()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with http.server.ThreadingHTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running = {}
        for name, (model, token, offline) in CASES.items():
            settings = {
                "HF_TOKEN": token,
                "HF_HOME": str(tmp_path / name),
                "HF_HUB_OFFLINE": offline,
                "HF_ENDPOINT": f"http://localhost:{server.server_port}",
            }
            line = command("summarize.py", model=f"owner/{model}", data=data, run=tmp_path / "run")
            running[name] = subprocess.Popen(line, **pipes, env=os.environ | settings)
        said = {}
        for name, process in running.items():
            out, errors = process.communicate(timeout=600)
            assert process.returncode == 2, errors
            assert "s3cr3t" not in out + errors
            assert "Traceback" not in errors
            (said[name],) = own_lines(errors, "summarize")
        server.shutdown()
    assert f"Bearer {TOKEN}" in Hub.tokens  # it was there to be shown
    assert "owner/gated: access is gated: accept its license on the hub" in said["gated"]
    assert "owner/absent: neither a folder here nor a model on the hub" in said["absent"]
    assert "owner/broken: not a folder here, and the hub cannot be reached" in said["broken"]
    assert "owner/gated: not a folder here, and the hub cannot be reached" in said["offline"]
    assert "owner/gated: the hub token is not plain text; set HF_TOKEN again" in said["token"]
