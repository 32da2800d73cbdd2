"""What a run folder shows: tables of metrics, a user's summaries, comparisons, the report.

Belongs here: reading scores and results, and showing them. Does not: what a run needs to resume
(state), or the method's own metrics (trsr.py).
"""
