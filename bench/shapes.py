"""The shapes of real models, as the fields of their config.json."""


def shape(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = False) -> dict:
    """Return the fields of config.json that make a shape."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "small": shape(192, 512, 4, 6, tied=True),
    "100m": shape(768, 2048, 12, 12, tied=True),
    "llama-2-7b": shape(4096, 11008, 32, 32),
    "llama-2-13b": shape(5120, 13824, 40, 40),
    "llama-30b": shape(6656, 17920, 60, 52),
}
PYTHIA = {"pythia-1.4b": shape(2048, 8192, 24, 16), "pythia-2.8b": shape(2560, 10240, 32, 32)}

# The other fields: those of Llama 2 and of Pythia.
LLAMA_FIELDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
}
PYTHIA_FIELDS = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "vocab_size": 50304,
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "max_position_embeddings": 2048,
}


def config_of(name: str, **changes) -> dict:
    """Return the config.json of a shape, with some fields changed."""
    if name in PYTHIA:
        return PYTHIA_FIELDS | PYTHIA[name] | changes
    return LLAMA_FIELDS | SHAPES[name] | changes
