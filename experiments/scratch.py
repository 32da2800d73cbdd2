"""What all models trained from scratch share: tokenizer, initial weights, optimizers, files."""

import io
import math
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import nn

from files.jsonl import write_json
from llama import Llama
from models.tokenizer import Tokenizer
from trsr import ANSWERS

# config.json of models/tiny; other sizes replace some fields.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, config: dict) -> None:
    """Write config.json and generation_config.json."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_tokenizer(folder: Path, lines: list[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer on lines, write it to folder, and return it.

    It is BPE with byte fallback and keeps texts as they are. Yes and No are one piece each. Raises
    RuntimeError, from the trainer, if the vocabulary is too large or too small for the lines.
    """
    # The trainer puts a blank before every line, but in a prompt a line's first word has none. A
    # bracket before such words makes pieces without the blank.
    words = (line.split(" ")[0] for line in lines if line and not line.startswith(("#", "[")))
    starts = sorted(set(words))
    lines = lines + [f"({word}" for word in starts for _ in range(20)]
    lines += [f"({answer} {answer}" for answer in ANSWERS for _ in range(2000)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[
            ","
        ],  # otherwise a number before a comma would have pieces of its own
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    options = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    options |= {"legacy": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", options)
    return Tokenizer(folder, vocab_size)


def initialize(model: Llama, seed: int) -> None:
    """Draw normal weights, smaller where a layer writes into the residual stream; norms stay 1."""
    torch.manual_seed(seed)
    deep = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            continue
        std = 0.06
        if "embed" in name:
            std = 0.02
        elif "o_proj" in name or "down_proj" in name:
            std *= deep
        nn.init.normal_(parameter, std=std)


def make_optimizers(model: Llama, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return a step's rate: rising over the first 2 %, falling to zero over the last 40 %."""
    up, down = (step + 1) / (0.02 * steps + 1), (steps - step) / (0.4 * steps)
    return highest * min(1.0, up, down)


def update(model: Llama, optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Clip the gradients to norm 1, update the model at this rate, and clear the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def save(model: Llama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights in dtype; tied ones once, as transformers does."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("cpu", dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
