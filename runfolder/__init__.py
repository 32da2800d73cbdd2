"""What the scripts share around the method: their processes, the run folder, and ways to look at it."""
