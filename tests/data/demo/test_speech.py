import dataclasses
import hashlib
import io
import shlex
import subprocess
import sys
import wave

import numpy as np
import pytest

from data.config import LimitsConfig
from data.demo.speech import Voice, command_speak, espeak, make_speak, to_wav, trim, voices
from data.media import decode_audio

SPEAK = espeak()
ENGLISH = voices("en", False)[0]
CHINESE = voices("zh", False)[0]
CLIENT = """
import json, sys, wave
text = sys.stdin.buffer.read().decode()
out, heard, *settings = sys.argv[1:]
tone = [round(9000 * (n // 20 % 2 - 0.5)) for n in range(4410 * len(text))]
with wave.open(out, "wb") as writer:
    writer.setparams((1, 2, 44100, 0, "NONE", ""))
    writer.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in tone))
with open(heard, "w") as file:
    json.dump([text, *settings], file)
"""


def all_voices(held_out):
    return [*voices("en", held_out), *voices("zh", held_out)]


def program(tmp_path, text):
    (tmp_path / "client.py").write_text(text)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'client.py'))}"


def seconds(waveform):
    return len(waveform) / 16000


def test_no_voice_setting_is_in_both_splits():
    assert not set(all_voices(False)) & set(all_voices(True))
    assert len(set(voices("en", False))) >= 50


@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_settings_lie_between_those_of_training(language):
    trained, held_out = voices(language, False), voices(language, True)
    assert {voice.full_name for voice in held_out} == {voice.full_name for voice in trained}
    for name in ("rate_wpm", "pitch"):
        known = [getattr(voice, name) for voice in trained]
        assert all(min(known) < getattr(voice, name) < max(known) for voice in held_out)


@pytest.mark.parametrize("change", [{"name": "en-gb"}, {"variant": "nobody"}, {"name": ""}])
def test_an_unknown_voice_is_refused_and_never_replaced(change):
    SPEAK("two red stars", CHINESE)
    with pytest.raises(ValueError, match="espeak-ng has no such voice"):
        SPEAK("two red stars", dataclasses.replace(ENGLISH, **change))


def test_what_was_said_before_does_not_change_the_sound():
    # Every variant, since flutter, roughness and noise differ between them.
    said = [("find two yellow stars", voice) for voice in voices("en", False)[::5]]
    said += [("三个红色圆形", voice) for voice in voices("zh", True)[::5]]
    first = [SPEAK(*job).tobytes() for job in said]
    order = np.random.default_rng(0).permutation(len(said))
    assert {number: SPEAK(*said[number]).tobytes() for number in order} == dict(enumerate(first))
    assert len(set(first)) == len(first)


def test_another_process_at_another_time_makes_the_same_sound():
    # Voice f2 is rough: its noise would start from the clock, which counts seconds.
    rough = next(voice for voice in voices("en", False) if voice.variant == "f2")
    program = (
        "import hashlib, time; from data.demo.speech import *; time.sleep(1);"
        f"print(hashlib.md5(espeak()('take the red cup', {rough!r}).tobytes()).hexdigest())"
    )
    here = hashlib.md5(SPEAK("take the red cup", rough).tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert there.stdout.strip() == here


def test_recordings_are_short_clips_at_16_khz():
    for text, voice in [("find two yellow stars", ENGLISH), ("三个红色圆形", CHINESE)]:
        waveform = SPEAK(text, voice)
        assert waveform.dtype == np.float32 and waveform.ndim == 1
        assert 0.7 < seconds(waveform) < 1.7
        assert 0.1 < np.abs(waveform).max() <= 1
        decoded = decode_audio(to_wav(waveform), LimitsConfig())
        assert np.abs(decoded - waveform).max() < 1e-4


def test_chinese_is_spoken_character_by_character():
    lengths = [seconds(SPEAK("三七二五八六"[:number], CHINESE)) for number in (1, 2, 4, 6)]
    assert lengths == sorted(lengths) and lengths[-1] > 3 * lengths[0]
    # The English voice would name each character by its meaning or number, far longer.
    assert lengths[-1] < seconds(SPEAK("三七二五八六", ENGLISH)) / 2
    digits = {SPEAK(digit, CHINESE).tobytes() for digit in "零一二三四五六七八九"}
    assert len(digits) == 10


def test_rate_and_pitch_are_heard():
    slow, fast = (
        SPEAK("open the red door", dataclasses.replace(ENGLISH, rate_wpm=rate)) for rate in (150, 300)
    )
    assert len(slow) > 1.5 * len(fast)
    low, high = (SPEAK("ah", dataclasses.replace(ENGLISH, pitch=pitch)) for pitch in (20, 80))
    assert pitch_hz(high) > 1.2 * pitch_hz(low)


def pitch_hz(waveform):
    middle = waveform[len(waveform) // 2 :][:1600]
    echoes = np.correlate(middle, middle, "full")[len(middle) :]
    return 16000 / (40 + np.argmax(echoes[40:320]))


@pytest.mark.parametrize("text", ["", "。", "..."])
def test_a_text_without_a_word_is_refused(text):
    with pytest.raises(ValueError, match="is silent"):
        SPEAK(text, CHINESE)


def test_missing_espeak_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(RuntimeError, match=r"pip install espeakng-loader.*--tts-command"):
        make_speak(None)


def test_a_library_that_does_not_load_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr("espeakng_loader.get_library_path", lambda: str(tmp_path / "broken.so"))
    with pytest.raises(RuntimeError, match=r"pip install espeakng-loader"):
        espeak()


def test_silence_at_the_ends_is_trimmed_and_pauses_stay():
    sound = np.full(1600, 0.5, np.float32)
    silence = np.zeros(8000, np.float32)
    trimmed = trim(np.concatenate([silence, sound, silence, sound, silence]))
    assert 0 <= len(trimmed) - (2 * 1600 + 8000) <= 0.05 * 16000


def test_wav_clips_what_is_too_loud():
    with wave.open(io.BytesIO(to_wav(np.array([2.0, -2.0, 0.5])))) as reader:
        assert reader.getparams()[:3] == (1, 2, 16000)
        assert np.frombuffer(reader.readframes(3), "<i2").tolist() == [32767, -32767, 16384]


def test_the_command_speaks_and_its_rate_is_converted(tmp_path):
    heard = tmp_path / "heard.json"
    command = program(tmp_path, CLIENT) + f" {{out}} {heard} {{language}} {{voice}} {{rate}} {{pitch}}"
    waveform = make_speak(command)("红 cup", Voice("zh", "cmn", "f2", 200, 40))
    assert heard.read_text() == '["\\u7ea2 cup", "zh", "cmn+f2", "200", "40"]'
    assert seconds(waveform) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "body, problem",
    [
        ("raise SystemExit('no such voice')", r"failed with code 1 \(no such voice\)"),
        ("raise SystemExit(3)", r"failed with code 3 \(it says nothing\)"),
        ("pass", "wrote nothing"),
        ("import sys; open(sys.argv[1], 'w').write('hello')", "wrote what cannot be decoded"),
        (
            "import sys, wave\nwith wave.open(sys.argv[1], 'wb') as w:\n"
            " w.setparams((1, 2, 8000, 0, 'NONE', '')); w.writeframes(bytes(800))",
            "recorded silence",
        ),
    ],
)
def test_a_failing_command_names_the_text(tmp_path, body, problem):
    speak = command_speak(program(tmp_path, body) + " {out} {rate}")
    with pytest.raises(ValueError, match=rf"--tts-command=.*'open the door' it {problem}"):
        speak("open the door", ENGLISH)


@pytest.mark.parametrize(
    "command, problem",
    [
        ("tts --text", r"Put \{out\} where"),
        ("tts {out} {voice} {language}", r"uses neither \{rate\} nor \{pitch\}"),
        ("tts {outt}", "KeyError"),
        ("tts {out", "cannot be filled in"),
        ("tts '{out}", "No closing quotation"),
        ("", "there is no program"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_anything_is_said(command, problem):
    with pytest.raises(ValueError, match=problem):
        command_speak(command)


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no-such-program.*cannot be run"):
        command_speak("no-such-program {out} {pitch}")("hello", ENGLISH)
