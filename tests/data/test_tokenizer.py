import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.make_tokenizer import SPLIT
from data.tokenizer import BUILT_IN, SPECIAL_TOKENS, TextStream, TextTokenizer, load_tokenizer

TOKENIZER = load_tokenizer(None)


def test_built_in_has_2048_ids_with_the_special_tokens_last_and_in_order():
    first = 2048 - len(SPECIAL_TOKENS)
    assert TOKENIZER.vocab_size == 2048
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == list(range(first, 2048))
    assert BUILT_IN.stat().st_size < 300_000


@given(st.text())
def test_decode_undoes_encode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.one_of(st.text(max_size=5), st.sampled_from(SPECIAL_TOKENS)), max_size=8))
def test_names_of_special_tokens_in_a_text_are_plain_text(pieces):
    text = "".join(pieces)
    ids = TOKENIZER.encode(text)
    assert not set(ids) & {TOKENIZER.special(name) for name in SPECIAL_TOKENS}
    assert TOKENIZER.decode(ids) == text


def test_added_tokens_of_a_folder_are_escaped_even_if_not_marked_special(tmp_path):
    spec = json.loads(BUILT_IN.read_bytes())
    entry = dict(spec["added_tokens"][-1], id=2048, content="<slice>", special=False)
    spec["added_tokens"].append(entry)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.special("<slice>") == 2048
    assert tokenizer.vocab_size == 2049
    assert 2048 not in tokenizer.encode("a<slice>b")


def test_digits_are_single_and_no_bos_is_added():
    assert len(TOKENIZER.encode("2024")) == 4
    assert TOKENIZER.encode("") == []


@pytest.mark.parametrize(
    "character",
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过",
)
def test_frequent_chinese_characters_are_one_token(character):
    assert len(TOKENIZER.encode(character)) == 1


def test_a_pickled_tokenizer_still_escapes():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.fingerprint == TOKENIZER.fingerprint
    assert copy.encode("a<|eos|>") == TOKENIZER.encode("a<|eos|>")


def test_fingerprint_follows_the_content():
    spec = BUILT_IN.read_bytes()
    assert TextTokenizer(spec).fingerprint == TOKENIZER.fingerprint
    assert TextTokenizer(spec + b" ").fingerprint != TOKENIZER.fingerprint


def test_the_asset_was_made_with_the_pattern_of_make_tokenizer():
    spec = json.loads(BUILT_IN.read_bytes())
    assert spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == SPLIT


def test_making_it_again_gives_the_same_ids():
    pytest.importorskip("jieba")
    from data.make_tokenizer import make_tokenizer

    first, second = make_tokenizer(), make_tokenizer()
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == TOKENIZER.vocab_size


def test_a_missing_special_token_is_named():
    with pytest.raises(ValueError, match=r"<\|slice\|>"):
        TOKENIZER.special("<|slice|>")


def test_a_folder_without_tokenizer_is_refused_by_its_path(tmp_path):
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("text", ["你好，世界！鬼魅魍魉𠮷野家", "a b", "emoji 👩‍👩‍👧 é ñ", "", "x\ufffdy"])
def test_a_stream_gives_whole_characters_and_all_of_the_text(text):
    tokenizer = load_tokenizer(None)
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.end() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_of_any_ids_is_their_text():
    tokenizer = load_tokenizer(None)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, tokenizer.vocab_size, 30).tolist()
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.add, ids), stream.end()]) == tokenizer.decode(ids)
