"""From a model's name to a model: the hub, the tokenizer, and the other architecture, Pythia.

Belongs here: what knows llama.py and makes something of a folder. Does not: how a model is used.
models/tiny is no code but a checkpoint, the embedded default.
"""
