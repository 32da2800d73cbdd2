"""How the project reads and writes its own files: whole or not at all, checked line by line.

Belongs here: JSON, JSON Lines and atomic replacement. Does not: what a particular file means, which
is for the package that owns it (prepare for datasets, state for run folders).
"""
