"""A conversation typed in a terminal, or read line by line from a pipe."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from data.conversation import Conversation, describe
from data.formats import MediaKind
from train.compose import nearest
from train.responder import Responder

HELP = """\
Type a question and press Enter. Before it, files can be attached:
  /image PATH   a picture; several may be attached, and a file dropped on the window is too
  /audio PATH   a recording; Enter alone asks without any text
  /clear        forgets the conversation and begins a new one
  /help         shows this
  /exit         ends; so does Ctrl-D
Ctrl-C stops the answer that is being written."""

COMMANDS = ("image", "audio", "clear", "help", "exit")

ENDINGS: dict[str, MediaKind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"), "audio"),
}
"""What a file is that was dropped without a command."""


class Session:
    """Reads lines, obeys commands and says answers as they come, until the lines end."""

    def __init__(self, conversation: Conversation, responder: Responder, *, on_terminal: bool):
        self.conversation = conversation
        self.responder = responder
        self.on_terminal = on_terminal
        self.answers = 0
        self.mistakes = 0

    def run(self) -> int:
        """Returns the exit status: from a pipe, 2 if a line could not be used."""
        self._note(self._greeting())
        for line in self._typed() if self.on_terminal else self._piped():
            try:
                if not self._obey(line.strip()):
                    break
            except ValueError as error:
                self.mistakes += 1
                print(error, file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                self._note("\n(stopped)")
        return 2 if self.mistakes and not self.on_terminal else 0

    def _greeting(self) -> str:
        responder = self.responder
        count = sum(parameter.numel() for parameter in responder.model.parameters())
        where = f"{responder.device}, {responder.precision.value}"
        return f"{count / 1e6:.1f}M parameters of step {responder.step} on {where}. /help lists the commands."

    def _note(self, text: str) -> None:
        if self.on_terminal:
            print(text, flush=True)

    def _typed(self) -> Iterator[str]:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a line editor with a history
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit ends.)")

    def _piped(self) -> Iterator[str]:
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", errors="replace")
        yield ""  # asks about what is attached still

    def _obey(self, line: str) -> bool:
        """Does what a line says; returns whether to go on."""
        command = re.fullmatch(r"/(\w+)(?:\s+(.*))?", line)
        if command and not read_media(line):
            return self._command(command[1], command[2] or "")
        if media := read_media(line):
            for kind, path in media:
                self._attach(kind, path)
        elif line or self.conversation.attached:
            self._ask(line)
        return True

    def _command(self, name: str, rest: str) -> bool:
        if name in ("image", "audio"):
            if not rest:
                raise ValueError(f"/{name}: names no file. Write /{name} PATH.")
            for path in read_paths(rest):
                self._attach(name, path)
        elif name == "clear":
            self.conversation.clear()
            self._note("(a new conversation)")
        elif name == "help":
            print(HELP, flush=True)
        elif name not in COMMANDS:
            raise ValueError(f"/{name}: not a command.{nearest(name, [*COMMANDS])} See /help.")
        return name != "exit"

    def _attach(self, kind: MediaKind, path: Path) -> None:
        size = self.conversation.attach(kind, path)
        self._note(f"({describe(size)} is attached to the next question)")

    def _ask(self, text: str) -> None:
        prompt = self.conversation.ask(text, self.responder.encoder)
        reply = self.responder.answer(prompt, self._say, number=self.answers)
        print(flush=True)
        self.answers += 1
        self.conversation.answered(reply.answer)
        if reply.ended == "interrupt":
            self._note("(stopped)")
        elif reply.ended == "limit":
            self._note(f"(stopped after {reply.new_tokens} tokens)")

    def _say(self, text: str) -> None:
        if self.on_terminal:
            # What a model makes up must not steer the terminal.
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        print(text, end="", flush=True)


def read_paths(text: str) -> list[Path]:
    """Returns the files that a person typed or dropped: quoted or not, with ~, several in a line.

    Words that are not all files are taken for one name with spaces in it.
    """
    whole = _path(text)
    if os.path.exists(whole):
        return [whole]
    try:
        paths = [_path(word) for word in shlex.split(text)]
    except ValueError:  # a quote without its partner
        return [whole]
    return paths if len(paths) == 1 or all(map(os.path.exists, paths)) else [whole]


def read_media(line: str) -> list[tuple[MediaKind, Path]]:
    """Returns the pictures and recordings of a line that is nothing but their paths, as dropping makes it."""
    paths = read_paths(line) if line else []
    if not all(path.suffix.lower() in ENDINGS and os.path.isfile(path) for path in paths):
        return []
    return [(ENDINGS[path.suffix.lower()], path) for path in paths]


def _path(text: str) -> Path:
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    return Path(os.path.expanduser(text))
