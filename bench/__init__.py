"""Measurements beside transformers, PEFT and bitsandbytes, and models of real shapes to measure on."""
