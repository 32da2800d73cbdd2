"""The tables and figures of the paper, one command each: every run from the data to the table, resumable."""
