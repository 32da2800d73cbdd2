"""The paper's other methods, on the same files, candidates and metrics as LLM-TRSR.

Belongs here: sequential recommenders over frozen text embeddings, and the command that trains them.
Does not: language models as recommenders (train.py), or what is common to all results (runfolder).
"""

import launch.waiting  # noqa: F401  # before torch
