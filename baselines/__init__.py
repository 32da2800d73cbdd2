"""The other rows of the paper's table 2, on the same files, the same candidates and the same metrics."""
