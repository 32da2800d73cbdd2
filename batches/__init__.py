"""From users to packs of token ids: what train.py and evaluate.py feed the model.

Belongs here: tokenizing prompts in worker processes, and packing them as they come. Does not: what
a prompt says (trsr.py), how a pack is laid out (ops), or what the model makes of it.
"""
