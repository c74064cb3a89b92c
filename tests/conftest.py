"""Shards that several tests share, and markers that skip by themselves with a reason."""

import pytest

from tests.records import KINDS, prepare, write_records
from tests.slurm.cluster import missing


def pytest_addoption(parser):
    parser.addoption("--write-tables", action="store_true", help="write what was measured into docs/")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slurm" in item.keywords and (reason := missing()):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory):
    """48 samples: text, picture, clip, and picture with clip, in turn."""
    folder = tmp_path_factory.mktemp("mixed")
    return prepare(write_records(folder / "records", [*KINDS] * 12), folder / "shards")


@pytest.fixture(scope="session")
def text_shards(tmp_path_factory):
    """24 samples of text alone."""
    folder = tmp_path_factory.mktemp("text")
    return prepare(write_records(folder / "records", ["text"] * 24, seed=1), folder / "shards")


@pytest.fixture(scope="session")
def picture_shards(tmp_path_factory):
    """24 samples: a picture each, no clip anywhere."""
    folder = tmp_path_factory.mktemp("pictures")
    return prepare(write_records(folder / "records", ["image"] * 24, seed=2), folder / "shards")
