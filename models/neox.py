"""GPT-NeoX, which Pythia's models are: token ids in, logits out, as llama.Llama and in its place everywhere.

What differs from Llama: LayerNorm with a bias, q, k and v of a head side by side in one matrix, a rotation of the first
part of each head alone, an MLP without a gate, and an MLP that by default reads what attention reads, beside it. The
loop over the layers, packs, caches, loss and loading are llama.py's; its legend has the shapes. Module and tensor names
are the checkpoint's own, and llama.py's names for the same parts lead to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama
from llama import Cache, CheckpointError, attend, rotate

_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable] = {"gelu": F.gelu, "gelu_new": _TANH, "gelu_fast": _TANH, "gelu_pytorch_tanh": _TANH}


@dataclass(frozen=True)
class Config(llama.Config):
    """Llama's fields and those that GPT-NeoX has besides; rope_theta and rotary_pct from either layout."""

    attention_bias: bool = True
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = True
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25  # the part of each head that is rotated

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions are rotated, the first ones."""
        return int(self.head_dim * self.rotary_pct)


def load_config(folder: Path) -> Config:
    """Return the configuration of a model folder; CheckpointError for an architecture or feature not built here."""
    path = folder / "config.json"
    raw = llama.read_json_file(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    part = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    raw |= {"rotary_pct": raw.get("rotary_pct") if part is None else part, "num_key_value_heads": None}
    raw |= {"rope_theta": raw.get("rotary_emb_base", raw.get("rope_theta")), "head_dim": None}
    config = llama.config_from(path, raw, Config, model_type="gpt_neox", tie_word_embeddings=False)
    if config.hidden_act not in list(ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{path}: hidden_act is {config.hidden_act!r}, only {known} are supported")
    if not 0 < config.rotary_dim <= config.head_dim or config.rotary_dim % 2:
        what = f"rotates {config.rotary_dim} of a head's {config.head_dim} dimensions, expected an even number of them"
        raise CheckpointError(f"{path}: rotary_pct (partial_rotary_factor) {config.rotary_pct} {what}")
    return config


class Attention(nn.Module):
    """Multi-head self-attention over the batch's own tokens or over a cache."""

    def __init__(self, config: Config):
        super().__init__()
        c, bias = config.num_attention_heads * config.head_dim, config.attention_bias
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * c, bias=bias)
        self.dense = nn.Linear(c, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None) -> Tensor:  # noqa: D102
        B, T, _ = x.shape
        q, k, v = self.query_key_value(x).view(B, T, -1, 3, self.head_dim).unbind(3)  # (B, T, H, D) each
        r = rotary[0].shape[-1]
        q, k = (torch.cat((rotate(y[..., :r], rotary), y[..., r:]), dim=-1) for y in (q, k))
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

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.dense_4h_to_h(self.activation(self.dense_h_to_4h(x)))


class Layer(nn.Module):
    """One transformer block; with parallel residual attention and MLP both read what enters it."""

    def __init__(self, config: Config):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    self_attn = property(lambda self: self.attention)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None) -> Tensor:
        """Return the next hidden states (B, T, C), or (N, C) at the N places (rows, tokens) that select names."""
        y = self.attention(self.input_layernorm(x), rotary, positions, mask, cache, select)
        x = x if select is None else x[select]
        return x + y + self.mlp(self.post_attention_layernorm(x if self.parallel else x + y))


class Decoder(llama.Decoder):
    """Embedding, layers and final norm: what checkpoints call `gpt_neox`."""

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        # All that a decoder asks its configuration for is the rotary tables, which are as wide as what is rotated.
        self.config = replace(config, head_dim=config.rotary_dim)
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.checkpointing = False

    embed_tokens = property(lambda self: self.embed_in)
    norm = property(lambda self: self.final_layer_norm)


class GPTNeoX(llama.Llama):
    """The causal language model, with Llama's methods."""

    leftovers = (*llama.Llama.leftovers, "attention.bias", "attention.masked_bias")

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        self.config = config
        self.gpt_neox = Decoder(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.asks_host = False

    model = property(lambda self: self.gpt_neox)
    lm_head = property(lambda self: self.embed_out)
