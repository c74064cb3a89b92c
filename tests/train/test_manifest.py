"""A checkpoint is whole, or what is wrong with it is named."""

import json

import pytest

from train.manifest import (
    DamagedError,
    check_checkpoint,
    checkpoints_in,
    file_facts,
    newest_checkpoint,
    read_manifest,
    set_aside,
    write_manifest,
)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "step-00000010"
    folder.mkdir()
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "state.json"):
        (folder / name).write_bytes(name.encode() * 100)
    files = {path.name: file_facts(path) for path in folder.iterdir()}
    write_manifest(folder, {"step": 10, "optimizer_steps": 9}, files)
    return folder


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_passes_and_says_what_it_is(checkpoint):
    check_checkpoint(checkpoint)
    assert read_manifest(checkpoint)["optimizer_steps"] == 9


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"])
def test_every_damage_is_named_with_its_file(checkpoint, name):
    path = checkpoint / name
    whole = path.read_bytes()
    flip(path, len(whole) // 2)
    with pytest.raises(DamagedError, match=f"{name}: other bytes than were written"):
        check_checkpoint(checkpoint)
    path.write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match=f"{name}: {len(whole) - 1} bytes long, but {len(whole)} bytes"):
        check_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{name}: missing"):
        check_checkpoint(checkpoint)


def test_no_byte_of_a_manifest_changes_unseen(checkpoint):
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        with pytest.raises(ValueError):
            check_checkpoint(checkpoint)
        path.write_bytes(whole)
    check_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json: missing"):
        check_checkpoint(checkpoint)


def test_a_file_that_cannot_be_read_is_no_damage(checkpoint):
    """It may be readable again: a network file system that stumbled must not cost a checkpoint."""
    for name in ("state.json", "manifest.json"):
        path = checkpoint / name
        path.rename(checkpoint / "away")
        path.symlink_to(path)  # opening it fails, but not because it is gone
        with pytest.raises(OSError, match="symbolic links") as error:
            check_checkpoint(checkpoint)
        assert not isinstance(error.value, FileNotFoundError)
        (checkpoint / "away").replace(path)
    check_checkpoint(checkpoint)


def test_the_ranks_share_the_files_and_one_of_them_finds_the_damage(checkpoint):
    flip(checkpoint / "rank-00001.safetensors", 5)
    found = []
    for share in range(3):
        try:
            check_checkpoint(checkpoint, share, 3)
        except DamagedError:
            found.append(share)
    assert found == [1]


def test_another_version_is_no_damage(checkpoint):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps({"version": 1, "files": {}}))
    with pytest.raises(ValueError, match=r"checkpoint version 1, this program reads 3\.") as error:
        check_checkpoint(checkpoint)
    assert not isinstance(error.value, DamagedError)


def test_what_is_set_aside_or_unfinished_is_never_taken(checkpoint):
    folder = checkpoint.parent
    (folder / "step-20").mkdir()
    (folder / ".partial-step-00000030").mkdir()
    assert newest_checkpoint(folder) == checkpoint and newest_checkpoint(folder, before=10) is None
    assert set_aside(checkpoint).name == "damaged-step-00000010"
    assert checkpoints_in(folder) == [] and newest_checkpoint(folder) is None
