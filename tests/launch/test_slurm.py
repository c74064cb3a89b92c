"""Batch scripts as they are shown, and what is refused before any. No SLURM is needed for that."""

import subprocess

import pytest

from launch.cluster import ClusterConfig, load_cluster
from launch.slurm import main
from tests.train.launching import ROOT, SMALL


def shown(capsys, *words: str) -> str:
    """Returns what `--dry-run` prints."""
    assert main([*words, "--dry-run"]) == 0
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    """Returns what is said to words that are refused."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.fixture
def words(text_shards, tmp_path):
    return (
        "recipe=omni_sft",
        *SMALL,
        "train.packs_per_step=16",
        f"data.path={text_shards}",
        f"run={tmp_path / 'run'}",
    )


def test_the_script_asks_for_what_the_cluster_needs_and_leaves_no_file(capsys, words, tmp_path):
    more = (
        "cluster=gpu8",
        "nodes=2",
        "cluster.account=lab",
        "cluster.time=1:00:00",
        "cluster.setup=[module load x]",
    )
    script = shown(capsys, *words, *more)
    for option in (
        "nodes=2",
        "ntasks-per-node=8",
        "gres=gpu:8",
        "account=lab",
        "time=1:00:00",
        "signal=B:USR1@300",
    ):
        assert f"#SBATCH --{option}\n" in script
    assert " --devices 8 --timeout 600\n" in script
    assert "\nmodule load x\n" in script and "--partition" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not any(tmp_path.iterdir())


def test_containers_start_from_the_clusters_file(capsys, words):
    script = shown(capsys, *words, "cluster=gpu8_container", "nodes=2")
    assert "--container-image=" in script and " python -m train.preflight" in script


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_cluster_file_is_sound(path):
    assert load_cluster(path.stem, []).problems() == []


def test_more_ranks_than_a_step_has_packs_are_refused(capsys, words):
    said = refused(capsys, *words, "cluster=gpu8", "nodes=3")
    assert said.startswith("train.packs_per_step=16: not divisible among 24 ranks")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("cluster=gpu9", "cluster='gpu9': there is none of that name. Did you mean 'gpu8'?"),
        ("cluster.tme=1:00:00", "cluster.tme: not a known key. Did you mean 'time'?"),
        ("cluster.time=60", "cluster.time=60: is no time limit."),
        ("cluster.time=24:00", "cluster.time=24:00: SLURM reads minutes:seconds. Write 24:00:00."),
        ("cluster.time=0:01:00", "cluster.save_seconds=60: more than half of time=0:01:00. Use 30 at most"),
        ("cluster.gpus_per_node=many", "cluster.gpus_per_node: "),
        ("nodes=0", "nodes=0: must be a whole number above 0."),
        ("resume=never", "resume=never: a job that comes back"),
        ("init_from=nowhere", "init_from=nowhere: there is no such folder."),
    ],
)
def test_mistakes_are_named(capsys, words, word, said):
    assert refused(capsys, *words, "cluster=local", word).startswith(said)


def test_a_cluster_must_be_named(capsys, words):
    assert refused(capsys, *words).startswith("cluster: it is not set.")


def test_a_pipeline_gives_a_script_per_stage(capsys, picture_shards, tmp_path):
    words = (
        "pipeline=megrez_omni",
        *SMALL,
        f"data.path={picture_shards}",
        f"runs={tmp_path}",
        "cluster=local",
    )
    script = shown(capsys, *words)
    assert script.count("#!/usr/bin/env bash") == 5 and f"init_from={tmp_path}/audio_tune" in script
    assert "without SLURM" in refused(capsys, *words, "accelerate=cpu2")


def test_values_out_of_range_are_all_named():
    cluster = ClusterConfig(ranks_per_node=9, retries=-1, env={"A-B": "1"}, srun=["exclusive"])
    assert [line.partition("=")[0].partition(":")[0] for line in cluster.problems()] == [
        "retries",
        "ranks_per_node",
        "env.A-B",
        "srun",
    ]
