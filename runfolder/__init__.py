"""What the scripts leave in a run folder, and ways to look at it."""
