"""Texts from which a stand-in for a released language model learns to copy and to answer.

Most are the tasks of pictures and speech in writing: a description stands where the picture or clip
would, and blanks put in at random keep the model from counting places. Prompts and answers are
those of the real thing, so that a model of these texts has only seeing and hearing left to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data.demo import charts, patches, pictures, scenes, sentences, signs
from data.sample import Message, Part, Sample

BLANK = "~"
MOST_BLANKS = 4
HEARD = "Audio 1: "
"""What the chat template writes before a clip."""

CHATS = (
    ("Hello!", "Hello! How can I help?"),
    ("Hi.", "Hello! How can I help?"),
    ("Good morning.", "Good morning!"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Who are you?", "I am a small model that reads, sees and hears."),
    ("What can you do?", "I read, see and hear."),
    ("How are you?", "I am well, thank you."),
    ("Goodbye.", "Goodbye!"),
    ("你好", "你好"),
    ("谢谢", "不用谢"),
    ("你是谁", "我是小模型"),
)
NUMBERS = (*patches.DIGITS, "ten")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ROUNDS = (NUMBERS, DAYS, tuple("0123456789"), tuple("一二三四五六七八九十"))
"""Lists that documents recite from any place on."""
COPIED = (
    sentences.DIGITS,
    tuple(sentences.DIGITS_ZH),
    tuple("0123456789"),
    (*signs.WORDS, *"0123456789"),
)
"""Lists of which `make_copy` puts items together."""

Exchange = tuple[str, str]
"""What the user says, media in writing, and the answer."""


def make_text(rng: np.random.Generator, held_out: bool) -> Sample:
    """Returns a chat or document; held-out ones are tasks only, about what no training sample shows or says.

    Instructions alone are in both splits: each has one answer, which has to be learnt.
    """
    if not held_out and rng.random() < 0.05:
        return Sample("", [Message("document", [Part("text", recite(rng))])])
    drawn = TASKS if held_out else TASKS | LESSONS
    kinds, shares = list(drawn), np.array(list(drawn.values()))
    asked, answer = kinds[rng.choice(len(kinds), p=shares / shares.sum())](rng, held_out)
    return Sample("", [Message("user", [Part("text", asked)]), Message("assistant", [Part("text", answer)])])


def make_chat(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a plain exchange."""
    return CHATS[rng.integers(len(CHATS))]


def recite(rng: np.random.Generator) -> str:
    """Returns three to eight items of a list in their order, such as `two three four`.

    What speech and signs say in evaluation only is not among them.
    """
    while _is_held_out(text := _recital(rng)):
        pass
    return text


def _recital(rng: np.random.Generator) -> str:
    items = ROUNDS[rng.integers(len(ROUNDS))]
    first = rng.integers(len(items) - 2)
    return " ".join(items[first : first + rng.integers(3, 9)])


def make_copy(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns items of a list in any order, often repeated, which are to be read or written down.

    The strings of signs and speech are too few to learn copying from: they would be learnt by heart. What
    those say in evaluation only is not among them.
    """
    items = COPIED[rng.integers(len(COPIED))]
    while _is_held_out(text := _join(rng.choice(items, rng.integers(2, 8)))):
        pass
    seen = _characters(text, rng)
    if rng.random() < 0.5:
        return f"{seen}\n{pictures.READ}", text
    prompts = sentences.ASR_PROMPTS["en" if text.isascii() else "zh"]
    return f"{HEARD}{seen}\n{prompts[rng.integers(len(prompts))]}", text


def _join(items: Iterable[str]) -> str:
    """Returns the items with spaces between them, but for digits and Chinese characters in a row."""
    text = ""
    for item in items:
        together = text and _is_character(text[-1]) and _is_character(item)
        text += item if together else f" {item}"
    return text.strip()


def _is_held_out(text: str) -> bool:
    """Returns whether signs or speech say this text in evaluation only, with whatever spaces."""
    return any(map(sentences.is_held_out, {text, text.replace(" ", ""), _join(text.split())}))


def make_caption(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a scene in words and its caption."""
    scene = scenes.make_scene(rng, held_out)
    return _seen(scenes.describe(scene), pictures.DESCRIBE, rng), scenes.caption(scene)


def make_question(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a scene in words with a positional question."""
    scene = scenes.make_scene(rng, held_out)
    question, answer = scenes.ask_position(scene, rng)
    return _seen(scenes.describe(scene), question, rng), answer


def make_binding(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a scene in words with a question that binds attributes."""
    scene = scenes.make_scene(rng, held_out)
    found = scenes.binding_questions(scene)
    question, answer = found[rng.integers(len(found))]
    return _seen(scenes.describe(scene), question, rng), answer


def make_spoken_question(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a scene in words with a positional question as it is spoken."""
    scene = scenes.make_scene(rng, held_out)
    question, answer = scenes.ask_position(scene, rng)
    seen = blank(scenes.describe(scene).split(), rng)
    return f"{seen}\n{_heard(question.lower().rstrip('?').split(), rng)}", answer


def make_reading(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns the text of a sign, which is to be read. Documents are seen whole and again in slices."""
    sign = signs.make_sign(rng, held_out)
    seen = _characters(sign.text, rng)
    if len(sign.panels) > 1 and rng.random() < 0.5:
        seen = "\n".join([seen, *(_characters(" ".join(panel), rng) for panel in sign.panels)])
    return f"{seen}\n{pictures.READ}", sign.text


def make_chart(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns a chart in words with a question."""
    chart = charts.make_chart(rng, held_out)
    question, answer = charts.ask(chart, rng)
    return _seen(charts.describe(chart), question, rng), answer


def make_transcription(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns an English or Chinese sentence that is to be written down."""
    language = "en" if rng.random() < 0.3 else "zh"
    sentence, heard = _sentence(language, rng, held_out)
    prompts = sentences.ASR_PROMPTS[language]
    return heard + prompts[rng.integers(len(prompts))], sentence


def _sentence(language: str, rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    if language == "en":
        sentence = sentences.english_sentence(rng, held_out)
        return sentence, _heard(sentence.split(), rng)
    sentence = sentences.chinese_sentence(rng, held_out)
    return sentence, f"{HEARD}{_characters(sentence, rng)}\n"


def make_instruction(rng: np.random.Generator, held_out: bool) -> Exchange:
    """Returns an instruction as it is spoken, with its answer. All are in both splits."""
    listed = sentences.instructions()
    instruction, answer = listed[rng.integers(len(listed))]
    if instruction.isascii():
        return _heard(instruction.split(), rng), answer
    return f"{HEARD}{_characters(instruction, rng)}\n", answer


TASKS: dict[Callable[[np.random.Generator, bool], Exchange], float] = {
    make_caption: 0.10,
    make_question: 0.32,
    make_spoken_question: 0.14,
    make_binding: 0.02,
    make_reading: 0.16,
    make_chart: 0.07,
    make_transcription: 0.14,
    make_instruction: 0.07,
}
"""Exchanges that stand for those with media, with their shares."""
LESSONS: dict[Callable[[np.random.Generator, bool], Exchange], float] = {make_chat: 0.05, make_copy: 0.2}
"""Exchanges of training texts only, beside `TASKS`, with their shares; the rest are documents."""


def _seen(description: str, prompt: str, rng: np.random.Generator) -> str:
    return f"{blank(description.split(), rng)}\n{prompt}"


def _heard(words: Sequence[str], rng: np.random.Generator) -> str:
    return f"{HEARD}{blank(words, rng)}\n"


def blank(words: Sequence[str], rng: np.random.Generator) -> str:
    """Returns the words with up to `MOST_BLANKS` blanks between them."""
    spread = list(words)
    for _ in range(rng.integers(MOST_BLANKS + 1)):
        spread.insert(rng.integers(len(spread) + 1), BLANK)
    return " ".join(spread)


def _characters(text: str, rng: np.random.Generator) -> str:
    """Returns a text without blanks between its digits and Chinese characters, but for random ones."""
    pieces = [piece for word in text.split() for piece in _pieces(word)]
    spread = blank(pieces, rng).split()
    return "".join(piece if _is_character(piece) else f" {piece}" for piece in spread).strip()


def _pieces(word: str) -> list[str]:
    return list(word) if _is_character(word[0]) else [word]


def _is_character(piece: str) -> bool:
    return piece.isdigit() or not piece.isascii()


def every_text() -> Iterator[str]:
    """Yields texts that together hold every word of the demo."""
    yield from ("system", "user", "assistant", HEARD, f"a {BLANK}", *patches.LABELS)
    yield from (pictures.DESCRIBE, pictures.READ, pictures.LABEL, *scenes.COLOURS, *scenes.SHAPES)
    yield from (word for pair in (*CHATS, *sentences.instructions()) for word in pair)
    yield from (" ".join(items) for items in ROUNDS)
    yield from (" ".join(prompts) for prompts in sentences.ASR_PROMPTS.values())
    yield from (*signs.WORDS, *signs.CHINESE)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        yield from (sentences.english_sentence(rng, False), sentences.chinese_sentence(rng, False))
        yield from _texts_of_scene(scenes.make_scene(rng, False))
        chart = charts.make_chart(rng, False)
        yield charts.describe(chart)
        yield from (text for pair in charts.questions(chart) for text in pair)


def _texts_of_scene(scene: scenes.Scene) -> Iterator[str]:
    yield from (scenes.caption(scene), scenes.describe(scene))
    for question, answer in scenes.position_questions(scene) + scenes.binding_questions(scene):
        yield from (question, question.lower(), answer)
