"""From public raw data to the project's dataset: one reader per source, and a synthetic shop.

Belongs here: reading raw files, choosing users and negatives, and the dataset's own schema. Does
not: prompts (trsr.py), tokens (batches), or anything that knows a model or a run.
"""
