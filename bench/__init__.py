"""Comparisons with transformers, PEFT and bitsandbytes, and models of real shapes to measure.

Belongs here: what times the project's own code or compares its results. Does not: how well a method
recommends (experiments), or whether the code is correct (tests).
"""

import launch.waiting  # noqa: F401  # before torch
