"""How models/tiny was made: its training text, its training, and a measure of what it can do.

Belongs here: what knows the demo's shop and teaches it to a model. Does not: what other models
trained from scratch share (experiments/scratch.py), or the checkpoint itself (models/tiny).
"""
