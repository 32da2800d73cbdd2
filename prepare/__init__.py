"""Public raw data to the project's one JSONL schema: python -m prepare.mind, amazon_m2, recbole or demo."""
