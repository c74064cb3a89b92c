"""Seeded corruptions of shards, indexes, media and records, and the laws that must hold for each.

python -m tests.fuzz --count 1000
"""
