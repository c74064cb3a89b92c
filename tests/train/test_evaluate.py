"""Evaluation on demand: what a run left behind gives the numbers that the run itself found."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.records import prepare
from tests.train.launching import ROOT, SMALL, environment, launch, release
from train.evaluate import read_request
from train.request import read_model
from train.tensor_files import INDEX, SINGLE
from train.weights import WeightReader

WORDS = (*SMALL, "train.steps=2", "train.packs_per_step=2", "optim.lr=1e-3", "eval.max_new_tokens=5")


@pytest.fixture(scope="module")
def run(tmp_path_factory, mixed_shards):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    words = (f"data.path={mixed_shards}", "data.holdout=0.3", "eval.samples=8")
    return launch(folder, *WORDS, *words, "+eval.metrics.cer=folder.cer")


def evaluate(*words):
    command = [sys.executable, "-m", "train.evaluate", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def test_finished_run_and_its_last_checkpoint_give_what_the_run_itself_found(run, tmp_path):
    done = evaluate(f"run={run.folder}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    evaluation = run.stage["evaluation"]
    assert {name: found[name] for name in evaluation} == evaluation
    answers = "step-00000002.jsonl"
    assert (run.folder / "evaluate" / answers).read_text() == (run.folder / "eval" / answers).read_text()
    assert json.loads((run.folder / "evaluate" / "step-00000002.json").read_text()) == found
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.folder, unfinished, ignore=shutil.ignore_patterns("final", "evaluate"))
    again = evaluate(f"run={unfinished}", f"out={tmp_path}/out", "eval.samples=2")
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "out" / "step-00000002.json").read_text())
    assert found["loss_by_source"] == evaluation["loss_by_source"]
    assert found["answers"]["folder"]["samples"] == 2 and "step 2, held out:" in again.stdout


@pytest.mark.slow
def test_released_folder_gives_what_its_run_gives(run, mixed_shards, tmp_path):
    folder = release(run.folder, tmp_path / "release")
    words = ("data=folder", f"data.path={mixed_shards}", "data.holdout=0.3", "eval.samples=8", "--json")
    words += ("data.pack.length=256", "eval.max_new_tokens=5")
    done = evaluate(f"weights={folder}", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("weights") == str(folder) and found.pop("step") == 0
    wanted = {key: value for key, value in run.stage["evaluation"].items() if "metrics" not in key}
    assert {key: found[key] for key in wanted} == wanted and found["answers"]["folder"]["samples"] == 8


def test_request_of_a_released_folder_is_its_sizes_and_its_tokenizer(run, tmp_path):
    folder = release(run.folder, tmp_path / "release")
    words = [f"weights={folder}", "data=demo", "eval.samples=7"]
    made = read_request([*words, "data.tokenizer=null"]).config
    trained = read_request([f"run={run.folder}"]).config
    assert (made.model.llm, made.model.vision, made.media) == (
        trained.model.llm,
        trained.model.vision,
        trained.media,
    )
    assert (made.data.tokenizer, made.precision, made.eval.samples) == (None, trained.precision, 7)
    assert read_model([f"weights={folder}"]).config.data.tokenizer == str(folder)
    refused = {
        (f"run={folder}",): f"run={folder}: holds no config.yaml. It is a released folder: use weights=",
        (f"weights={run.folder}",): f"weights={run.folder}: holds no config.json. It is a run: use run=",
        (f"weights={folder}", f"run={run.folder}"): f"weights={folder}: run={run.folder} is set too.",
        (f"weights={folder}",): "data: it is not set.",
        (f"weights={folder}", "data=demo", "data.pack.length=8192"): "data.pack.length=8192: longer than",
    }
    for wrong, problem in refused.items():
        with pytest.raises(ValueError) as error:
            read_request([*wrong])
        assert str(error.value).startswith(problem)


def test_a_folder_without_all_of_its_files_is_refused_at_once(run, tmp_path):
    folder = release(run.folder, tmp_path / "release")
    missing = {
        "tokenizer.json": f"data.tokenizer={folder}: there is no file {folder}/tokenizer.json.",
        "*.safetensors": f"weights={folder}: holds no model*.safetensors. Copy the whole folder.",
        "config.json": f"weights={folder}: holds no config.json. Name an exported or released folder.",
    }
    for pattern, problem in missing.items():
        (path,) = folder.glob(pattern)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError) as error:
            read_model([f"weights={folder}"])
        assert str(error.value).startswith(problem)
        path.write_bytes(content)


def test_weights_in_one_file_are_read_and_a_damaged_folder_is_refused(run, tmp_path):
    folder = release(run.folder, tmp_path / "release")
    whole = run.weights()
    (shard,) = folder.glob("*.safetensors")
    (folder / INDEX).rename(tmp_path / INDEX)
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        WeightReader(folder)
    single = shard.rename(folder / SINGLE)
    reader = WeightReader(folder)
    assert {name: reader.read("weight", name, 0, 2**62).tolist() for name in reader.shapes} == {
        name: tensor.tolist() for name, tensor in whole.items()
    }
    single.write_bytes(single.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, but its header promises"):
        WeightReader(folder)
    (tmp_path / INDEX).rename(folder / INDEX)
    with pytest.raises(ValueError, match=rf"{shard.name} is missing, though {INDEX} names it"):
        WeightReader(folder)


def test_request_is_the_config_of_the_run_with_its_changes(run, text_shards):
    request = read_request([f"run={run.folder}", "eval.max_new_tokens=9", "zero=zero2"])
    assert request.out == run.folder / "evaluate"
    config = request.config
    assert (config.eval.max_new_tokens, config.eval.samples, config.zero.value) == (9, 8, "zero2")
    assert config.model.llm.width == 64 and config.eval.metrics == {"cer": "folder.cer"}
    assert read_request([f"run={run.folder}"]).config.zero.value == "none"
    assert read_request([f"run={run.folder}", "eval.samples=0"]).config.eval.samples == 200
    words = ("data=folder", f"data.path={text_shards}", "data.pack.length=512", "out=there")
    other = read_request([f"run={run.folder}", *words])
    assert other.config.data.sources["folder"].path == str(text_shards) and str(other.out) == "there"
    assert other.config.data.holdout == 0.02 and other.config.data.pack.length == 512
    assert other.config.eval.metrics == {}
    words = ("+eval.metrics.again=folder.exact", f"data.held_out.new.path={text_shards}", "data.tags=[x]")
    added = read_request([f"run={run.folder}", *words]).config
    assert added.eval.metrics == {"cer": "folder.cer", "again": "folder.exact"}
    assert added.data.held_out["new"].path == str(text_shards) and added.data.tags == ["x"]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("eval.sampels=3", "eval.sampels: not a known key. Did you mean 'eval.samples'?"),
        ("eval.samples=many", "eval.samples: Value 'many'"),
        ("eval.samples=-1", "eval.samples=-1: must not be negative."),
        ("data=nowhere", "data='nowhere': there is none of that name. Known: "),
        ("data.holdout=0.0", "data.held_out: no sample is held out."),
        ("samples", "samples: is not KEY=VALUE."),
        ("objective=ctc", "objective=ctc"),
        ("+eval.metrics.a=folder.bleu", "eval.metrics.a='folder.bleu': is not SOURCE.MEASURE."),
        ("data.path=elsewhere", "data.path=elsewhere: the run's sources have paths of their own"),
    ],
)
def test_mistakes_are_refused_by_name(run, word, problem):
    with pytest.raises(ValueError) as error:
        read_request([f"run={run.folder}", word])
    assert str(error.value).startswith(problem)


def test_samples_that_were_trained_on_are_never_held_out(run, mixed_shards, tmp_path):
    request = [f"run={run.folder}", "data.holdout=0.3"]
    assert read_request([*request, "data.holdout=0.1"]).config.data.holdout == 0.1
    link = tmp_path / "link"
    link.symlink_to(mixed_shards)
    refused = {
        ("data.holdout=0.5",): "data.holdout=0.5: source 'folder' was trained on with data.holdout=0.3,",
        ("data=folder", f"data.path={link}", "data.holdout=0.4"): "data.holdout=0.4: source 'folder' was",
        (f"data.held_out.x.path={link}",): f"data.held_out.x.path={link}: source 'folder' trains on this",
        ("data=demo", f"data.held_out.scene.path={mixed_shards}"): "data.held_out.scene.path=",
    }
    for words, problem in refused.items():
        with pytest.raises(ValueError) as error:
            read_request([*request, *words])
        assert str(error.value).startswith(problem) and "on training samples. " in str(error.value)


def test_run_that_is_none_or_has_no_weights_yet_is_refused_without_a_traceback(run, tmp_path):
    with pytest.raises(ValueError, match=r"^run: it is not set"):
        read_request(["eval.samples=3"])
    done = evaluate(f"run={tmp_path}/none")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"run={tmp_path}/none: holds no config.yaml. Name the folder of a run of train.py.\n"
    )
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(run.folder / "config.yaml", young)
    done = evaluate(f"run={young}")
    assert done.returncode == 2
    assert done.stderr == f"run={young}: has no weights yet. Wait for its first checkpoint.\n"


def test_samples_without_an_answer_are_counted_by_cause(run, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"one two {number}"}) + "\n" for number in range(3)))
    shards = prepare(documents, tmp_path / "shards", "--format", "text")
    words = ("data.holdout=0.0", f"data.held_out.documents.path={shards}", f"out={tmp_path}/out")
    done = evaluate(f"run={run.folder}", *words, "eval.metrics.cer=documents.cer", "eval.samples=2")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step-00000002.json"]
    found = json.loads((tmp_path / "out" / "step-00000002.json").read_text())
    assert found["not_answered"] == {"documents": {"no_supervised": 2}}
    assert "answers" not in found and "metrics" not in found
    assert "not answered: no_supervised 2" in done.stdout
    assert "eval.metrics.cer='documents.cer': has no value, since no sample of 'documents'" in done.stdout


def test_mistakes_are_refused_before_torch_is_imported(run):
    code = (
        "import sys\nfrom train.evaluate import read_request\n"
        f"read_request(['run={run.folder}'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
