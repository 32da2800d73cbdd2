"""What the model is built on: packs, masks, caches, 8-bit weights, and the files of a checkpoint.

Belongs here: what llama.py needs from below. Does not: anything that knows a layer, a prompt or a
run; this package imports nothing of the project.
"""
