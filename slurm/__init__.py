"""Dispatch to SLURM through submitit. Sits between `launch`, which asks for runs, and `trainer`, which does them."""
