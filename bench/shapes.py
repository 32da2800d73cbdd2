"""The shapes of real models, as the fields of their config.json."""


def shape(hidden: int, intermediate: int, layers: int, heads: int, **more) -> dict:
    """Return the fields of config.json that make a shape; more: others than the defaults below."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


TIED = {"tie_word_embeddings": True}
SMOLLM2 = TIED | {"num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0}
SHAPES = {
    "tiny": shape(192, 512, 4, 6, vocab_size=2048, **TIED),  # models/tiny
    "small": shape(192, 512, 4, 6, **TIED),
    "100m": shape(768, 2048, 12, 12, **TIED),
    "smollm2-135m": shape(576, 1536, 30, 9, **SMOLLM2),
    "llama-2-7b": shape(4096, 11008, 32, 32),
    "llama-2-13b": shape(5120, 13824, 40, 40),
    "llama-30b": shape(6656, 17920, 60, 52),
}
PYTHIA = {"pythia-1.4b": shape(2048, 8192, 24, 16), "pythia-2.8b": shape(2560, 10240, 32, 32)}

# The other fields, unless the shape has its own: those of Llama 2 and of Pythia.
LLAMA_FIELDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 32000,
    "tie_word_embeddings": False,
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
    "tie_word_embeddings": False,
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
