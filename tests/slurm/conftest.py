"""One SLURM for all tests here."""

import pytest

from tests.slurm.cluster import running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running SLURM of two nodes."""
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
