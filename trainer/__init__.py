"""Runs on the GPUs. Read `run.py` first: it assembles data, model, strategy and loop into one run."""
