"""What runs on a login node or in a batch script. Never imports torch."""
