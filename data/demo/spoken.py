"""Samples with speech: transcription in two languages, spoken questions about pictures, instructions."""

from __future__ import annotations

import functools

import numpy as np

from data.demo import scenes, sentences
from data.demo.speech import Speak, make_speak, to_wav, voices
from data.sample import Message, Part, Sample

CLIP = "clip.wav"
PICTURE = "picture.jpg"

_command: str | None = None


def initialise(command: str | None) -> None:
    """Chooses who speaks in this process: espeak-ng (None) or a command (see `speech.command_speak`).

    Raises:
        ValueError: the command cannot be used.
        RuntimeError: espeak-ng is not installed.
    """
    global _command
    _speaker(command)
    _command = command


@functools.cache
def _speaker(command: str | None) -> Speak:
    return make_speak(command)


def make_asr_en(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns an English sentence to write down."""
    return _transcription("en", sentences.english_sentence(rng, held_out), rng, held_out)


def make_asr_zh(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a Chinese sentence to write down."""
    return _transcription("zh", sentences.chinese_sentence(rng, held_out), rng, held_out)


def make_spoken_question(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a scene and a spoken question about a position in it. Nothing of the question is written."""
    scene = scenes.make_scene(rng, held_out)
    picture, _ = scenes.draw_scene(scene, rng)
    question, answer = scenes.ask_position(scene, rng)
    clip = _record("en", question.lower().rstrip("?"), rng, held_out)
    parts = [Part("image", media=PICTURE), Part("audio", media=CLIP)]
    return _sample(parts, answer, {PICTURE: picture, CLIP: clip})


def make_spoken_instruction(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a spoken instruction with its answer. All are in both splits: only the voices differ."""
    listed = sentences.instructions()
    instruction, answer = listed[int(rng.integers(len(listed)))]
    clip = _record("en" if instruction.isascii() else "zh", instruction, rng, held_out)
    return _sample([Part("audio", media=CLIP)], answer, {CLIP: clip})


def _transcription(language: str, sentence: str, rng: np.random.Generator, held_out: bool) -> Sample:
    prompts = sentences.ASR_PROMPTS[language]
    parts = [Part("audio", media=CLIP), Part("text", prompts[int(rng.integers(len(prompts)))])]
    return _sample(parts, sentence, {CLIP: _record(language, sentence, rng, held_out)})


def _record(language: str, text: str, rng: np.random.Generator, held_out: bool) -> bytes:
    """Returns a WAV of the text in a random voice of the split."""
    listed = voices(language, held_out)
    return to_wav(_speaker(_command)(text, listed[int(rng.integers(len(listed)))]))


def _sample(parts: list[Part], answer: str, media: dict[str, bytes]) -> Sample:
    return Sample("", [Message("user", parts), Message("assistant", [Part("text", answer)])], media)
