"""GPT-NeoX, the architecture of Pythia: token ids in, logits out, in the place of llama.Llama.

What differs from Llama: LayerNorm with a bias; q, k and v of a head side by side in one matrix; a
rotation of only the first part of each head; an MLP without a gate, which by default reads the same
input as attention, in parallel. The loop over the layers, packs, caches, loss and loading are
llama.py's, and so are the shapes' letters. Modules and tensors have the checkpoint's own names;
properties lead from llama.py's names to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama
from llama import CheckpointError, attend, rotate
from ops.cache import Cache
from ops.config import config_from

_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu,
    "gelu_new": _TANH,
    "gelu_fast": _TANH,
    "gelu_pytorch_tanh": _TANH,
}


@dataclass(frozen=True)
class Config(llama.Config):
    """Llama's fields, and what GPT-NeoX has besides."""

    attention_bias: bool = True
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25  # the part of each head that is rotated

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated: the first ones."""
        return int(self.head_dim * self.rotary_pct)


def load_config(folder: Path) -> Config:
    """Return a model folder's configuration; CheckpointError if it asks for what is not built."""
    path = folder / "config.json"
    raw = llama.read_json_file(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    part = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None

    # GPT-NeoX has other names for some of Llama's fields, and no grouped-query attention.
    fields = raw | {
        "rotary_pct": raw.get("rotary_pct") if part is None else part,
        "rope_theta": raw.get("rotary_emb_base", raw.get("rope_theta")),
        "num_key_value_heads": None,
        "head_dim": None,
    }
    only = {"model_type": "gpt_neox", "tie_word_embeddings": False}
    config = config_from(path, fields, Config, **only)
    if config.hidden_act not in list(ACTIVATIONS):
        known = f"only {', '.join(ACTIVATIONS)} are supported"
        raise CheckpointError(f"{path}: hidden_act is {config.hidden_act!r}, {known}")
    if not 0 < config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        field = f"rotary_pct (partial_rotary_factor) {config.rotary_pct}"
        what = f"rotates {config.rotary_dim} of a head's {config.head_dim} dimensions"
        raise CheckpointError(f"{path}: {field} {what}, expected an even number of them")
    return config


class Attention(nn.Module):
    """Multi-head self-attention, over the batch's own tokens or over a cache."""

    def __init__(self, config: Config):
        super().__init__()
        c, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * c, bias=bias)
        self.dense = nn.Linear(c, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None):
        """Return (B, T, C) for x (B, T, C), or (N, C) at select's N (rows, tokens)."""
        B, T, _ = x.shape
        qkv = self.query_key_value(x).view(B, T, -1, 3, self.head_dim)
        q, k, v = qkv.unbind(3)  # (B, T, H, D) each
        r = rotary[0].shape[-1]
        q = torch.cat((rotate(q[..., :r], rotary), q[..., r:]), dim=-1)
        k = torch.cat((rotate(k[..., :r], rotary), k[..., r:]), dim=-1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(positions, k, v, mask)  # (B, H, S, D)

        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)
        return self.dense(y if select is None else y[select])


class MLP(nn.Module):
    """dense_4h_to_h(gelu(dense_h_to_4h(x)))."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape (..., C)."""
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    """One transformer block; with a parallel residual, attention and MLP read the same input."""

    def __init__(self, config: Config):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    self_attn = property(lambda self: self.attention)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None):
        """Return the next hidden states (B, T, C), or (N, C) at select's N (rows, tokens)."""
        y = self.attention(self.input_layernorm(x), rotary, positions, mask, cache, select)
        x = x if select is None else x[select]
        return x + y + self.mlp(self.post_attention_layernorm(x if self.parallel else x + y))


class Decoder(llama.Decoder):
    """Embedding, layers and final norm: what checkpoints call `gpt_neox`."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        # A decoder needs its configuration only for the rotary tables, as wide as what is rotated.
        self.config = replace(config, head_dim=config.rotary_dim)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.checkpointing = False

    embed_tokens = property(lambda self: self.embed_in)
    norm = property(lambda self: self.final_layer_norm)


class GPTNeoX(llama.Llama):
    """The causal language model, with Llama's methods."""

    unused = (*llama.Llama.unused, "attention.bias", "attention.masked_bias")

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        self.config = config
        self.gpt_neox = Decoder(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.syncs_host = False

    model = property(lambda self: self.gpt_neox)
    lm_head = property(lambda self: self.embed_out)
