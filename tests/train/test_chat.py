"""Talking with a model: once, through a pipe, and as a person at a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from data.encode import Encoder
from data.index import load_folder
from data.prompt import PromptReader
from data.sample import SampleRef
from data.shards import ShardReader
from data.tokenizer import load_tokenizer
from tests.records import jpeg, wav
from tests.train.launching import ROOT, SMALL, environment, launch, release
from train import chat
from train.config import Precision
from train.generate import STOPS, generate
from train.responder import Responder, load_model
from train.sampling import Sampling
from train.terminal import Session, read_media, read_paths

WORDS = (*SMALL, "train.steps=2", "train.packs_per_step=2", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def run(tmp_path_factory, mixed_shards):
    return launch(tmp_path_factory.mktemp("chat") / "run", *WORDS, f"data.path={mixed_shards}").folder


@pytest.fixture(scope="module")
def released(run, tmp_path_factory):
    return release(run, tmp_path_factory.mktemp("released") / "release")


@pytest.fixture(scope="module")
def responder(run):
    request = chat.read_request([f"run={run}"])
    return Responder(request.model, Sampling(max_new_tokens=12), "cpu", None)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "my cat.jpg").write_bytes(jpeg(rng, 60, 40))
    (tmp_path / "word.wav").write_bytes(wav(rng, 0.5))
    (tmp_path / "word.mp3").write_bytes(mp3(rng, 0.5))
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    return tmp_path


def mp3(rng, seconds):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp3") as file:
        stream = file.add_stream("mp3", rate=16000, layout="mono")
        noise = (rng.normal(0, 2000, (1, int(16000 * seconds)))).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        frame.rate = 16000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def once(capsys, *words):
    """Runs the command in this process; returns exit status, output and errors."""
    with pytest.raises(SystemExit) as exit_:
        chat.main([str(word) for word in words])
    return (exit_.value.code, *capsys.readouterr())


@pytest.fixture
def piped(run, responder, monkeypatch, capsys):
    """Returns a function that gives lines to a session: exit status, output, errors and conversation."""

    def run_session(text):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        conversation = chat.read_request([f"run={run}"]).conversation()
        status = Session(conversation, responder, on_terminal=False).run()
        return (status, *capsys.readouterr(), conversation)

    return run_session


def test_one_question_gives_what_generate_gives_from_a_run_and_from_its_release(
    run, released, mixed_shards, tmp_path, capsys
):
    folder = load_folder(str(mixed_shards))
    ref = SampleRef("mixed", 0, 3, 0)
    sample = ShardReader(folder, "mixed").read(0, 3, media=True)
    request = chat.read_request([f"run={run}"])
    encoder = Encoder(request.model.config.data, request.model.config.media, load_tokenizer(None))
    model, step = load_model(request.model, torch.device("cpu"), torch.float32)
    batch = PromptReader({"mixed": folder}, encoder).read([ref]).batch
    stop = {encoder.tokenizer.special(name) for name in STOPS}
    (ids,) = generate(model, batch, stop=stop, max_new_tokens=10)
    question = ["max_new_tokens=10"]
    for part in sample.messages[0].parts:
        if part.kind == "text":
            question += ["--text", part.text]
        else:
            path = tmp_path / part.media
            path.write_bytes(sample.media[part.media])
            question += [f"--{part.kind}", path]
    for name in (f"run={run}", f"weights={released}"):
        status, out, _ = once(capsys, name, *question, "--json")
        found = json.loads(out)
        assert status == 0 and found["answer"] == encoder.tokenizer.decode(ids) and len(ids) > 0
        assert (found["prompt_tokens"], found["new_tokens"]) == (batch.input_ids.shape[1], len(ids))
        assert found["tokens_per_second"] == pytest.approx(len(ids) / found["seconds"], rel=0.2)
        assert once(capsys, name, *question)[1] == found["answer"] + "\n"
    assert step == 2


def test_sampling_follows_its_seed(run, capsys):
    question = (f"run={run}", "--text", "one two", "temperature=1.5", "max_new_tokens=10")
    first, again, other = (once(capsys, *question, f"seed={seed}")[1] for seed in (3, 3, 4))
    assert first == again != other


def test_later_turns_see_what_came_before(responder, files, piped):
    with_picture = f"/image {files}/my cat.jpg\nWhat is it?\nAnd now?\n"
    seen, without, apart = (
        piped(text) for text in (with_picture, "What is it?\nAnd now?\n", "What is it?\n/clear\nAnd now?\n")
    )
    prompt = seen[3].ask("Again?", responder.encoder)
    assert (
        len(prompt.slices) > 0 and [message.role for message in seen[3].messages] == ["user", "assistant"] * 2
    )
    assert seen[0] == without[0] == 0 and seen[2] == ""
    assert len(apart[3].messages) == 2 and len(without[3].messages) == 4
    assert not without[3].ask("Again?", responder.encoder).slices
    answers = [message.parts[0].text for message in seen[3].messages[1::2]]
    assert seen[1] == "".join(answer + "\n" for answer in answers)


def test_mistakes_in_a_pipe_are_said_and_do_not_end_it(files, piped):
    lines = {
        "/image nowhere.jpg": "image=nowhere.jpg: there is no such file. Check the path.",
        f"/image {files}": f"image={files}: is a folder. Name a file.",
        f"/image {files}/broken.jpg": "the picture is none of",
        f"/audio {files}/my cat.jpg": "the recording is damaged",
        "/audio": "/audio: names no file. Write /audio PATH.",
        "/imge x.jpg": "/imge: not a command. Did you mean '/image'? See /help.",
        "word " * 5000: "longer than the 4096 that the model has positions for.",
    }
    text = "\n".join([*lines, "Still there?"])
    status, _out, errors, conversation = piped(text)
    for line, problem in zip(errors.splitlines(), lines.values(), strict=True):
        assert problem in line
    assert status == 2 and len(conversation.messages) == 2


def test_a_recording_alone_is_a_question_at_the_end_of_a_pipe(files, piped):
    for name in ("word.wav", "word.mp3"):
        _, _out, errors, conversation = piped(f"/audio {files}/{name}")
        assert not errors and len(conversation.messages) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--image", "nowhere.jpg"], "image=nowhere.jpg: there is no such file. Check the path.\n"),
        (["--text", ""], "--text=: asks nothing."),
        (["--json"], "--json: is for one question."),
        (["--text", "x", "temperature=-1", "top_p=2"], "temperature=-1.0: must be at least 0."),
        (["--text", "x", "max_new_tokens=many"], "max_new_tokens=many: is not a whole number."),
        (["--text", "x", "max_new_tokens=0"], "max_new_tokens=0: must be at least 1."),
        (["--text", "x", "device=gpu"], "device=gpu: not a known device."),
        (["--text", "x", "precision=fp8"], "precision=fp8: not known. Use one of bf16, fp32."),
        (["--text", "x", "media.image.querys=3"], "media.image.querys: not a known key. Did you mean"),
        (["--text", "x", "model.llm.layers=1", "model.llm.width=128"], "run=RUN: weight llm."),
        (["--text", "word " * 5000], "conversation="),
    ],
)
def test_mistakes_are_refused_with_status_2(run, words, problem, capsys):
    status, out, errors = once(capsys, f"run={run}", *words)
    assert (status, out) == (2, "") and errors.startswith(problem.replace("RUN", str(run)))


def test_a_model_that_is_none_is_refused(tmp_path, capsys):
    for word in ("run", "weights"):
        status, _, errors = once(capsys, f"{word}={tmp_path}/none", "--text", "x")
        assert status == 2 and errors.startswith(f"{word}={tmp_path}/none: holds no config.")
    assert once(capsys, "temperature=1", "--text", "x")[2].startswith("run: it is not set.")


def test_the_pieces_of_an_answer_are_whole_characters_and_all_of_it(responder, monkeypatch, run):
    ids = responder.encoder.tokenizer.encode("你好，𠮷野家")

    def scripted(*_, on_token, **__):
        for token in ids:
            on_token(0, token)

    monkeypatch.setattr("train.responder.generate", scripted)
    pieces = []
    prompt = chat.read_request([f"run={run}"]).conversation().ask("x", responder.encoder)
    reply = responder.answer(prompt, pieces.append)
    assert "".join(pieces) == reply.answer == "你好，𠮷野家" and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)
    assert (reply.new_tokens, reply.ended) == (len(ids), "turn" if len(ids) < 12 else "limit")


def test_half_precision_is_held_in_half_precision(run):
    request = chat.read_request([f"run={run}", "precision=bf16", "max_new_tokens=3"])
    half = Responder(request.model, request.sampling, request.device, request.precision)
    assert half.precision is Precision.bf16
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.answer(request.conversation().ask("one", half.encoder), lambda _: None).new_tokens <= 3


def test_paths_are_read_as_people_type_and_drop_them(files, monkeypatch):
    cat, word = files / "my cat.jpg", files / "word.wav"
    monkeypatch.setenv("HOME", str(files))
    quoted = [str(cat), f'"{cat}"', f"'{cat}' ", str(cat).replace(" ", "\\ "), "~/my cat.jpg"]
    quoted.append(f"file://{str(cat).replace(' ', '%20')}")
    for text in quoted:
        assert read_paths(text) == [cat], text
        assert read_media(text.strip()) == [("image", cat)], text
    assert read_paths(f"'{cat}' {word}") == [cat, word]
    assert read_media(f"'{cat}' {word}") == [("image", cat), ("audio", word)]
    assert read_paths(f"{files}/no such file.jpg") == [files / "no such file.jpg"]
    assert read_paths(f"{files}/it's.jpg") == [files / "it's.jpg"]
    for text in ("What is it?", f"What is {cat}?", str(files), "", "/help", "x" * 5000, "a\0.jpg"):
        assert read_media(text) == []


def _take_terminal() -> None:
    # Whatever the process that runs the tests has blocked or, started in the background, ignores.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The command on a pseudo-terminal, and all that it has shown."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "train.chat", *words]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.shown = ""

    def until(self, pattern, seconds=60):
        """Reads until `pattern` is shown; returns what came up to its end."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.S)):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{pattern!r} was not shown:\n{self.shown}"
            try:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(f"ended before {pattern!r}:\n{self.shown}") from None
        taken, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return taken

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt(self, pattern):
        """Types Ctrl-C until `pattern` is shown: the prompt stands before the line editor listens for it."""
        for _ in range(10):
            self.type("\x03")
            ready, _, _ = select.select([self.master], [], [], 3)
            if ready:
                break
        self.until(pattern)


@pytest.mark.slow
def test_a_person_at_a_terminal(run, files):
    terminal = Terminal(f"run={run}", "max_new_tokens=4000", "temperature=1.0", "seed=1")
    try:
        greeting = terminal.until(r"> $")
        assert "Loading run=" in greeting and "of step 2 on cpu, fp32. /help lists the commands." in greeting
        terminal.type("/help\n")
        assert "/image PATH" in terminal.until(r"being written\.\r\n> ")
        terminal.type(f"/image {files}/my cat.jpg\n")
        terminal.until(r"\(picture of 60x40 pixels is attached to the next question\)\r\n> ")
        terminal.type("/image nowhere.jpg\n")
        terminal.until(r"image=nowhere.jpg: there is no such file. Check the path.\r\n> ")
        terminal.interrupt(r"\(Ctrl-D or /exit ends.\)\r\n> ")
        terminal.type("What is it?\n")
        terminal.until(r"What is it\?\r\n.{10}")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)\r\n> ")
        terminal.type("/clear\n")
        terminal.until(r"\(a new conversation\)\r\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


def test_a_command_starts_without_torch_and_a_pipe_has_no_decoration(run, files):
    code = (
        f"import sys\nfrom train import chat\nrequest = chat.read_request(['run={run}'])\n"
        f"request.conversation().attach('image', chat.Path({str(files / 'my cat.jpg')!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "train.chat", f"run={run}", "max_new_tokens=5"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), input="one\n", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n")
    assert "Loading" not in done.stdout and ">" not in done.stdout.replace("|>", "")
