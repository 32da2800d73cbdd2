"""What a run remembers in its folder: settings, lock, summaries, checkpoint.

Belongs here: what a script needs to resume, or to refuse to. Does not: results and how they are
shown (runfolder), and datasets (prepare).
"""
