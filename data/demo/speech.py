"""Text -> spoken waveform, by espeak-ng or by a command of the user's own.

A `Speak` is a function from a text and a voice to mono samples at 16 kHz. `espeak` makes one of the
shared library that the wheel `espeakng-loader` carries; `command_speak` makes one of any program.
The same text in the same voice always gives the same samples, whatever was spoken before.
"""

from __future__ import annotations

import ctypes
import functools
import io
import shlex
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from data.config import LimitsConfig
from data.media import SAMPLE_RATE_HZ, decode_audio
from data.sample import SampleError

NAMES = {"en": ("en-us", "en-gb-x-rp"), "zh": ("cmn",)}
"""espeak-ng voices by language. Only names that it knows: `cmn` is Mandarin, and there is no `en-gb`."""

VARIANTS = ("m1", "m3", "f2", "f5")
TRAIN_RATES_WPM = (190, 210, 230, 250)
TRAIN_PITCHES = (30, 42, 54, 66)
HELD_OUT_RATES_WPM = (200, 220, 240)
HELD_OUT_PITCHES = (36, 48, 60)
"""Held-out settings lie between those of training: speech never heard, but not of another kind."""

SILENCE = 0.01
"""Samples below this share of the loudest one are silence at the ends of a recording."""
MARGIN_SECONDS = 0.02
FAINTEST_PEAK = 1e-3

AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000
POS_CHARACTER = 1
CHARS_UTF8 = 1
PARAMETER_RATE = 1
PARAMETER_PITCH = 3
"""Constants of espeak-ng's speak_lib.h."""

SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice setting. `name` and `variant` are espeak-ng's; pitch is from 0 to 99, with 50 as usual."""

    language: str
    name: str
    variant: str
    rate_wpm: int
    pitch: int

    @property
    def full_name(self) -> str:
        """Name and variant as espeak-ng writes them, such as `en-us+f2`."""
        return f"{self.name}+{self.variant}"


Speak = Callable[[str, Voice], np.ndarray]
"""Text and voice -> float32 [num_samples] at 16 kHz, from -1 to 1."""


@functools.cache
def voices(language: str, held_out: bool) -> tuple[Voice, ...]:
    """Returns the voice settings of a language (`en` or `zh`); the two splits share none."""
    rates = HELD_OUT_RATES_WPM if held_out else TRAIN_RATES_WPM
    pitches = HELD_OUT_PITCHES if held_out else TRAIN_PITCHES
    return tuple(
        Voice(language, name, variant, rate, pitch)
        for name in NAMES[language]
        for variant in VARIANTS
        for rate in rates
        for pitch in pitches
    )


def to_wav(waveform: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """Returns a mono 16-bit WAV file of samples from -1 to 1 (beyond that they are clipped)."""
    pcm = np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate_hz, len(pcm), "NONE", ""))
        writer.writeframes(pcm.tobytes())
    return file.getvalue()


def trim(waveform: np.ndarray) -> np.ndarray:
    """Returns a waveform that is not silent without the silence at its ends, but for a short margin."""
    loudness = np.abs(waveform)
    loud = np.flatnonzero(loudness >= SILENCE * loudness.max())
    margin = round(MARGIN_SECONDS * SAMPLE_RATE_HZ)
    return waveform[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]


def _is_silent(waveform: np.ndarray) -> bool:
    return bool(np.abs(waveform).max(initial=0.0) < FAINTEST_PEAK)


def make_speak(command: str | None) -> Speak:
    """Returns espeak-ng's voice, or that of a command (see `command_speak`).

    Raises:
        ValueError: the command cannot be used.
        RuntimeError: espeak-ng is not installed.
    """
    return espeak() if command is None else command_speak(command)


def espeak() -> Speak:
    """Returns a function that speaks through espeak-ng's shared library, in a few milliseconds a text.

    The function raises ValueError for a voice that espeak-ng does not have.

    Raises:
        RuntimeError: the library is not installed, or does not load.
    """
    advice = "Run `pip install espeakng-loader`, or give a program of your own with --tts-command"
    try:
        # Only here, since who brings a command of his own need not have it.
        from espeakng_loader import get_data_path, get_library_path

        paths = get_library_path(), get_data_path()
        with _fresh_library(*paths):
            pass
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(f"espeak-ng: cannot be used ({error}). {advice}.") from error
    return functools.partial(_espeak, *paths)


def _espeak(library_path: str, data_path: str, text: str, voice: Voice) -> np.ndarray:
    with _fresh_library(library_path, data_path) as (library, rate_hz):
        _set_voice(library, data_path, voice)
        pcm = _synthesise(library, text)
    waveform = _to_16_khz(pcm, rate_hz)
    if _is_silent(waveform):
        raise ValueError(f"text={text!r}: espeak-ng is silent. Use words that {voice.name!r} can say.")
    return trim(waveform)


@contextmanager
def _fresh_library(library_path: str, data_path: str) -> Iterator[tuple[ctypes.CDLL, int]]:
    """Loads the library anew and unloads it, yielding it with its sample rate.

    Its pitch flutter goes on from one text to the next in a static variable that no call resets
    (`Flutter_ix` in espeak-ng's wavegen.c); unloading does, in a quarter of a millisecond. Its noise
    starts from the clock.
    """
    library = ctypes.CDLL(library_path)
    rate_hz = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), INITIALIZE_DONT_EXIT)
    if rate_hz <= 0:
        raise RuntimeError(f"it does not start with its data in {data_path}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    try:
        yield library, rate_hz
    finally:
        library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


def _set_voice(library: ctypes.CDLL, data_path: str, voice: Voice) -> None:
    """Sets voice, rate and pitch. espeak-ng keeps the last voice where it does not know a name."""
    # An unknown variant is not even reported: the plain voice would speak.
    known_variant = (Path(data_path) / "voices" / "!v" / voice.variant).is_file()
    if not known_variant or library.espeak_SetVoiceByName(voice.full_name.encode()) != 0:
        raise ValueError(
            f"voice={voice.full_name!r}: espeak-ng has no such voice. "
            "Use names and variants that `espeak-ng --voices` lists."
        )
    library.espeak_SetParameter(PARAMETER_RATE, voice.rate_wpm, 0)
    library.espeak_SetParameter(PARAMETER_PITCH, voice.pitch, 0)


def _synthesise(library: ctypes.CDLL, text: str) -> np.ndarray:
    pieces: list[bytes] = []

    def collect(samples, num_samples, events) -> int:
        if samples and num_samples > 0:
            pieces.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    callback = SYNTH_CALLBACK(collect)
    library.espeak_SetSynthCallback(callback)
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    if status != 0:
        raise RuntimeError(f"espeak-ng: failed on {text!r} (status {status}). Install it again.")
    return np.frombuffer(b"".join(pieces), "<i2")


def _to_16_khz(pcm: np.ndarray, rate_hz: int) -> np.ndarray:
    if len(pcm) == 0:
        return np.zeros(0, np.float32)
    frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    frame.sample_rate = rate_hz
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    pieces = [*resampler.resample(frame), *resampler.resample(None)]
    # Band-limiting overshoots a little where the engine was at full scale.
    return np.clip(np.concatenate([piece.to_ndarray()[0] for piece in pieces]), -1, 1)


def command_speak(command: str) -> Speak:
    """Returns a function that runs `command` for every text, without a shell.

    The command gets the text on standard input and writes a recording, of any rate, to the path that
    stands for `{out}`; `{language}`, `{voice}`, `{rate}` (words a minute) and `{pitch}` (0 to 99) are
    filled in too, and `{rate}` or `{pitch}` must be: these alone differ between training and evaluation,
    which would else share recordings. A program that loads for seconds is best kept running, with a
    small client as command.
    The function raises ValueError where the command fails or records nothing.

    Raises:
        ValueError: the command line cannot be filled in, or does not ask for what it must.
    """
    voice = Voice("en", "en-us", "m1", 200, 50)
    words = _fill(command, voice, "out.wav")
    if "{out}" not in command:
        raise ValueError(
            f"--tts-command={command!r}: does not say where to write. Put {{out}} where the path belongs."
        )
    if words == _fill(command, replace(voice, rate_wpm=voice.rate_wpm + 1, pitch=voice.pitch + 1), "out.wav"):
        raise ValueError(
            f"--tts-command={command!r}: uses neither {{rate}} nor {{pitch}}, in which alone the voices of "
            "training and evaluation differ, so they would share recordings. Put in one of them."
        )
    return functools.partial(_run, command)


def _run(command: str, text: str, voice: Voice) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.wav"
        words = _fill(command, voice, str(out))
        try:
            done = subprocess.run(words, input=text.encode(), capture_output=True, check=False)
        except OSError as error:
            raise _failure(command, text, f"cannot be run ({error})") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it says nothing"]
            raise _failure(command, text, f"failed with code {done.returncode} ({said[-1]})")
        if not out.is_file():
            raise _failure(command, text, "wrote nothing to {out}")
        return _audible(command, text, out.read_bytes())


def _audible(command: str, text: str, data: bytes) -> np.ndarray:
    try:
        waveform = decode_audio(data, LimitsConfig())
    except SampleError as error:
        raise _failure(command, text, f"wrote what cannot be decoded: {error}") from error
    if _is_silent(waveform):
        raise _failure(command, text, "recorded silence")
    return trim(waveform)


def _fill(command: str, voice: Voice, out: str) -> list[str]:
    values = {
        "language": voice.language,
        "voice": voice.full_name,
        "rate": voice.rate_wpm,
        "pitch": voice.pitch,
        "out": out,
    }
    try:
        words = [word.format_map(values) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"--tts-command={command!r}: cannot be filled in ({error!r}). "
            f"Use {', '.join(f'{{{name}}}' for name in values)}, and quote words that hold spaces."
        ) from error
    if not words:
        raise ValueError("--tts-command='': there is no program. Give one, or leave the option out.")
    return words


def _failure(command: str, text: str, problem: str) -> ValueError:
    return ValueError(f"--tts-command={command!r}: for the text {text!r} it {problem}. Mend the command.")
