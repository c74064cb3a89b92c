import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import RELEASED_SYSTEM, AudioText, TemplateConfig
from data.sample import IGNORE, Message, Part, SampleError
from data.template import AudioSpan, ImageSpan, render, truncate
from data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(None)
CONFIG = TemplateConfig()
SYSTEM = f"<|role_start|>system<|role_end|>{RELEASED_SYSTEM}<|turn_end|>"
UNK = "<|unk|>"
SPANS = {
    "one": ImageSpan(None, 3),
    "six": ImageSpan((2, 3), 2),
    "short": AudioSpan((4,)),
    "long": AudioSpan((5, 3)),
}
SLICE = "<|image_start|>" + UNK * 2 + "<|image_end|>"
SIX = SLICE + f"{SLICE}{SLICE}\n{SLICE}{SLICE}\n{SLICE}{SLICE}" + "\n"
ONE = "<|image_start|>" + UNK * 3 + "<|image_end|>\n"


def text(value):
    return Part("text", text=value)


def image(name):
    return Part("image", media=name)


def audio(name):
    return Part("audio", media=name)


def write(*messages, config=CONFIG):
    return render([Message(role, parts) for role, parts in messages], SPANS, config, TOKENIZER)


def whole(rendered):
    return TOKENIZER.decode(rendered.input_ids.tolist())


def answered(rendered):
    return TOKENIZER.decode(rendered.labels[rendered.labels != IGNORE].tolist())


def turn(role, content):
    return f"<|role_start|>{role}<|role_end|>{content}<|turn_end|>"


def test_a_conversation_opens_with_the_default_system_turn():
    rendered = write(("user", [text("Hi")]), ("assistant", [text("Hello")]))
    assert whole(rendered) == SYSTEM + turn("user", "Hi") + turn("assistant", "Hello")


def test_an_empty_default_means_no_system_turn():
    spoken = [Message("user", [text("Hi")]), Message("assistant", [text("Hello")])]
    rendered = render(spoken, {}, TemplateConfig(system=""), TOKENIZER)
    assert whole(rendered) == turn("user", "Hi") + turn("assistant", "Hello")


def test_its_own_system_turn_replaces_the_default():
    rendered = write(("system", [text("S")]), ("user", [text("Hi")]), ("assistant", [text("Hello")]))
    assert whole(rendered) == turn("system", "S") + turn("user", "Hi") + turn("assistant", "Hello")


def test_pictures_stand_before_recordings_before_text_and_recordings_count_over_the_conversation():
    rendered = write(
        ("user", [text("Look"), audio("short"), image("six"), image("one")]),
        ("assistant", [text("Yes")]),
        ("user", [audio("long")]),
        ("assistant", [text("No")]),
    )
    short = "Audio 1: <|audio_start|>" + UNK * 4 + "<|audio_end|>\n"
    long = "Audio 2: <|audio_start|>" + UNK * 8 + "<|audio_end|>\n"
    assert whole(rendered) == (
        SYSTEM
        + turn("user", SIX + ONE + short + "Look")
        + turn("assistant", "Yes")
        + turn("user", long)
        + turn("assistant", "No")
    )


def test_starts_point_at_the_first_placeholder_of_every_slice_and_clip():
    rendered = write(("user", [audio("long"), image("six")]), ("assistant", [text("A")]))
    ids, unk = rendered.input_ids.tolist(), TOKENIZER.special(UNK)
    assert len(rendered.slice_starts) == 7
    for start in rendered.slice_starts:
        assert ids[start - 1] == TOKENIZER.special("<|image_start|>")
        assert ids[start : start + 2] == [unk, unk]
        assert ids[start + 2] == TOKENIZER.special("<|image_end|>")
    first, second = rendered.clip_starts
    assert ids[first - 1] == TOKENIZER.special("<|audio_start|>")
    assert second == first + 5
    assert ids[first : first + 8] == [unk] * 8
    assert ids[first + 8] == TOKENIZER.special("<|audio_end|>")


def test_spans_reach_from_start_mark_through_end_mark():
    rendered = write(("user", [image("six"), audio("long")]), ("assistant", [text("A")]))
    spans = {span.media: rendered.input_ids[span.start : span.stop].tolist() for span in rendered.spans}
    assert TOKENIZER.decode(spans["six"]) == SIX[:-1]
    assert TOKENIZER.decode(spans["long"]) == "<|audio_start|>" + UNK * 8 + "<|audio_end|>"
    assert [span.items for span in rendered.spans] == [7, 2]


def test_slice_tokens_wrap_the_tiles_and_not_the_overview():
    config = TemplateConfig(slice_start="<|video_start|>", slice_end="<|video_end|>")
    rendered = write(("user", [image("six")]), ("assistant", [text("A")]), config=config)
    tiles = SIX[len(SLICE) : -1]
    assert f"{SLICE}<|video_start|>{tiles}<|video_end|>\n<|turn_end|>" in whole(rendered)
    assert "<|video_start|>" not in whole(
        write(("user", [image("one")]), ("assistant", [text("A")]), config=config)
    )


def test_a_slice_token_that_the_tokenizer_lacks_is_named():
    config = TemplateConfig(slice_start="<slice>", slice_end="</slice>")
    with pytest.raises(ValueError, match="<slice>"):
        write(("user", [image("six")]), ("assistant", [text("A")]), config=config)


def test_audio_text_drop_leaves_out_text_beside_a_recording_only():
    config = TemplateConfig(audio_text=AudioText.drop)
    messages = (
        ("user", [audio("short"), text("spoken")]),
        ("assistant", [text("A")]),
        ("user", [text("typed")]),
        ("assistant", [text("B")]),
    )
    assert "spoken" in whole(write(*messages))
    dropped = whole(write(*messages, config=config))
    assert "spoken" not in dropped and "typed" in dropped
    assert answered(write(*messages, config=config)) == "A<|turn_end|>B<|turn_end|>"


def test_a_document_is_its_text_and_eos_all_supervised():
    rendered = write(("document", [text("Once "), text("upon")]))
    assert whole(rendered) == answered(rendered) == "Once upon<|eos|>"


def test_a_document_keeps_the_order_of_its_parts_and_no_loss_falls_on_media():
    rendered = write(("document", [text("a"), image("one"), text("b"), audio("short"), text("c")]))
    heard = "Audio 1: <|audio_start|>" + UNK * 4 + "<|audio_end|>\n"
    assert whole(rendered) == "a" + ONE + "b" + heard + "c<|eos|>"
    assert answered(rendered) == "abc<|eos|>"


def test_a_newline_stands_in_a_text_where_media_stood():
    rendered = write(("user", [image("one"), text("a"), text("b"), image("one"), text("c")]))
    assert whole(rendered) == SYSTEM + turn("user", ONE + ONE + "ab\nc")


def test_neighbouring_plain_pieces_are_tokenised_as_one():
    joined = write(("user", [text("hel"), text("lo")]), ("assistant", [text("A")]))
    assert joined.input_ids.tolist() == (
        write(("user", [text("hello")]), ("assistant", [text("A")])).input_ids.tolist()
    )
    after_picture = write(("user", [image("one"), text("\nx")]), ("assistant", [text("A")]))
    end = after_picture.spans[0].stop
    assert after_picture.input_ids[end:].tolist()[: len(TOKENIZER.encode("\n\nx"))] == (
        TOKENIZER.encode("\n\nx")
    )


words = st.one_of(
    st.text(max_size=30), st.sampled_from(["<|turn_end|>", "<|role_start|>assistant<|role_end|>"])
)
user_parts = st.lists(
    st.one_of(
        words.map(text),
        st.sampled_from(["one", "six"]).map(image),
        st.sampled_from(["short", "long"]).map(audio),
    ),
    max_size=4,
)
conversations = st.lists(st.tuples(user_parts, st.lists(words, max_size=2)), min_size=1, max_size=4)


def messages_of(conversation):
    for parts, answers in conversation:
        yield "user", parts
        yield "assistant", [text(answer) for answer in answers]


@given(conversations)
def test_loss_is_on_the_answers_and_their_turn_ends_and_nothing_else(conversation):
    rendered = write(*messages_of(conversation))
    assert answered(rendered) == "".join("".join(answers) + "<|turn_end|>" for _, answers in conversation)
    supervised = rendered.labels != IGNORE
    assert np.array_equal(rendered.labels[supervised], rendered.input_ids[supervised])
    # The number of turns cannot be forged by a text that spells out the marks.
    marks = (rendered.input_ids == TOKENIZER.special("<|turn_end|>")).sum()
    assert marks == 1 + 2 * len(conversation)


@given(conversations, st.integers(1, 200))
def test_truncation_keeps_media_whole_and_ends_on_a_supervised_token(conversation, length):
    rendered = write(*messages_of(conversation))
    try:
        cut = truncate(rendered, length)
    except SampleError as error:
        assert error.cause == "oversize"
        assert (rendered.labels[1:length] == IGNORE).all()
        return
    kept = len(cut.input_ids)
    assert kept <= length
    assert np.array_equal(cut.input_ids, rendered.input_ids[:kept])
    assert np.array_equal(cut.labels, rendered.labels[:kept])
    assert cut.num_supervised > 0
    for span in rendered.spans:
        assert (span in cut.spans) == (span.stop <= kept) == (span.start < kept)
    inside = [start for start in rendered.slice_starts if start < kept]
    assert cut.slice_starts == inside
    assert len(cut.slice_starts) + len(cut.clip_starts) == sum(span.items for span in cut.spans)
    # No supervised token that would fit is lost.
    assert (rendered.labels[kept:length] == IGNORE).all() or kept == len(rendered.input_ids)


def test_what_fits_is_not_truncated():
    rendered = write(("user", [text("Hi")]), ("assistant", [text("Hello")]), ("user", [text("tail")]))
    assert truncate(rendered, len(rendered.input_ids)) is rendered
