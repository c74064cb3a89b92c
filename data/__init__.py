"""Everything CPU loader workers and data commands run: records in, batches out.

Imports nothing of ours outside this package (see docs/architecture.md).
"""
