"""Measurements against transformers, PEFT and bitsandbytes, and models of real shapes for them.

Belongs here: what times or compares the project's own code on random weights. Does not: results for
readers (docs), or checks of correctness (tests).
"""
