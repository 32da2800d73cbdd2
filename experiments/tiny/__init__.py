"""The embedded default: a small Llama that knows the demo's shop."""
