"""Runs on a laptop or login node: the `packtrain` command, local launching and inference."""
