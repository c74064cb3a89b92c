"""Imported by the process that loader workers are forked from, and nowhere else.

What workers need is imported here once for all of them, so that each starts in a moment. SIGTERM,
SIGUSR1 and Ctrl-C are for the rank to answer: it finishes its step and saves, and needs its workers for that.
"""

import signal

import data.worker  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
