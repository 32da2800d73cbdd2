"""From users to what the model is fed: packs of token ids, and prompts to be answered.

Belongs here: tokenizing prompts in worker processes and packing them as they come, and the prompts
of many users at once. Does not: what a prompt says (trsr.py), how a pack is laid out (ops), or what
the model makes of it.
"""
