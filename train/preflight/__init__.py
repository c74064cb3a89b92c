"""Checks the nodes of a job before it starts: `python -m train.preflight`."""
