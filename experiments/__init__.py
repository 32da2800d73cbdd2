"""The paper's table 2 and figures 9 to 11, one command each, and base models trained from scratch.

Belongs here: which runs make a table, and what the paper reports. Does not: a run itself, which is
made by the top-level scripts as they are, in processes of their own.
"""

import launch.waiting  # noqa: F401  # before torch
