"""How every command starts and ends: flags, processes, what a run will take, errors in one line.

Belongs here: what scripts share around their work. Does not: the work itself, a run's files
(state), or anything that takes a script's parsed arguments.
"""
