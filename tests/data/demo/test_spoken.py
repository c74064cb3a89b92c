import numpy as np
import pytest

from data.config import LimitsConfig
from data.demo import scenes, sentences, spoken
from data.demo.speech import espeak, voices
from data.formats import check_messages
from data.media import decode_audio, decode_image

MAKERS = (spoken.make_asr_en, spoken.make_asr_zh, spoken.make_spoken_question, spoken.make_spoken_instruction)


def made(make, held_out, count=12):
    return [make(np.random.default_rng(seed), held_out) for seed in range(count)]


def kinds(sample):
    return [part.kind for part in sample.messages[0].parts]


def answer(sample):
    return sample.messages[1].parts[0].text


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("held_out", [False, True])
def test_every_clip_decodes_and_is_of_sane_length(make, held_out):
    for sample in made(make, held_out):
        check_messages(sample.messages)
        waveform = decode_audio(sample.media["clip.wav"], LimitsConfig())
        assert 0.1 < len(waveform) / 16000 < 2.5
        assert np.abs(waveform).max() > 0.1
        named = {part.media for part in sample.messages[0].parts if part.media}
        assert named == set(sample.media)


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_makes_the_same_bytes_in_any_order(make):
    forwards = [(sample.messages, sample.media) for sample in made(make, False)]
    backwards = [make(np.random.default_rng(seed), False) for seed in reversed(range(12))]
    assert [(sample.messages, sample.media) for sample in reversed(backwards)] == forwards


@pytest.mark.parametrize("make", MAKERS)
def test_recordings_are_of_voices_of_their_split(make, monkeypatch):
    heard = []
    speak = espeak()
    monkeypatch.setattr(
        spoken, "_speaker", lambda _: lambda text, voice: heard.append(voice) or speak(text, voice)
    )
    for held_out in (False, True):
        made(make, held_out)
        allowed = {*voices("en", held_out), *voices("zh", held_out)}
        assert heard and set(heard) <= allowed
        heard.clear()


@pytest.mark.parametrize("make", MAKERS)
def test_no_recording_is_in_both_splits(make):
    trained, held_out = (
        {sample.media["clip.wav"] for sample in made(make, split)} for split in (False, True)
    )
    assert not trained & held_out


@pytest.mark.parametrize("make, language", [(spoken.make_asr_en, "en"), (spoken.make_asr_zh, "zh")])
def test_transcription_asks_in_writing_and_answers_with_the_sentence(make, language):
    for held_out in (False, True):
        for sample in made(make, held_out):
            assert kinds(sample) == ["audio", "text"]
            assert sample.messages[0].parts[1].text in sentences.ASR_PROMPTS[language]
            assert sentences.is_held_out(answer(sample)) == held_out


def test_a_spoken_question_is_not_written_and_its_scene_is_of_its_split(monkeypatch):
    drawn = []
    draw = scenes.draw_scene
    monkeypatch.setattr(scenes, "draw_scene", lambda scene, rng: drawn.append(scene) or draw(scene, rng))
    for held_out in (False, True):
        drawn.clear()
        samples = made(spoken.make_spoken_question, held_out)
        for scene, sample in zip(drawn, samples, strict=True):
            assert kinds(sample) == ["image", "audio"]
            assert scenes.is_held_out(scenes.describe(scene)) == held_out
            assert answer(sample) in {right for _, right in scenes.position_questions(scene)}
            assert decode_image(sample.media["picture.jpg"], LimitsConfig()).size == (112, 112)


def test_a_spoken_question_is_said_in_plain_lower_case(monkeypatch):
    said = []
    monkeypatch.setattr(
        spoken, "_speaker", lambda _: lambda text, voice: said.append(text) or np.ones(16000, np.float32)
    )
    made(spoken.make_spoken_question, False, 50)
    assert len(set(said)) > 4
    assert all(text == text.lower() and text.replace(" ", "").isalpha() for text in said)


def test_spoken_instructions_are_only_heard():
    listed = {answer for _, answer in sentences.instructions()}
    for sample in made(spoken.make_spoken_instruction, True):
        assert kinds(sample) == ["audio"]
        assert answer(sample) in listed


def test_instructions_are_spoken_in_their_own_language(monkeypatch):
    said = {}
    monkeypatch.setattr(
        spoken, "_speaker", lambda _: lambda text, voice: said.update({text: voice}) or np.ones(9, np.float32)
    )
    made(spoken.make_spoken_instruction, False, 100)
    assert {voice.language for voice in said.values()} == {"en", "zh"}
    assert all((voice.language == "en") == text.isascii() for text, voice in said.items())


def test_the_chosen_command_speaks_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(spoken, "_command", None)
    clip = tmp_path / "clip.wav"
    clip.write_bytes(made(spoken.make_asr_en, False, 1)[0].media["clip.wav"])
    spoken.initialise(f'sh -c \'cp "$0" "$1"\' {clip} {{out}} {{rate}}')
    clips = {sample.media["clip.wav"] for make in MAKERS for sample in made(make, False, 2)}
    assert len(clips) == 1


def test_a_command_that_cannot_be_used_is_refused_at_once():
    with pytest.raises(ValueError, match="--tts-command"):
        spoken.initialise("tts")
