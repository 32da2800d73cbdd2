"""Ways to look at run folders: tables of metrics, one user's summaries, comparisons, the report.

Belongs here: reading scores and results, and showing them. Does not: what a run needs to resume
(state), or the method's own metrics (trsr.py).
"""
