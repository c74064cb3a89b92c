import base64
import json
import os
import resource
import socket

import pytest

from data.config import LimitsConfig
from data.layouts import Quarantined, parse_members
from data.records import FolderMedia, Record, SampleMaker, find_files, read_records
from data.sample import SampleError

LIMITS = LimitsConfig()
PIXEL = b"picture bytes"
SOUND = b"sound bytes"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpeg").write_bytes(PIXEL)
    (tmp_path / "in" / "b.PNG").write_bytes(PIXEL + b"2")
    (tmp_path / "in" / "c.wav").write_bytes(SOUND)
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    return str(tmp_path / "in")


def made(format, record, folder, tags=()):
    """Writes one record to a file, reads it back and returns what becomes of it."""
    path = os.path.join(folder, "records.jsonl")
    with open(path, "w") as file:
        file.write(record if isinstance(record, str) else json.dumps(record))
    (read,) = read_records(path, "records.jsonl")
    return SampleMaker(format, tags, LIMITS).make(read, folder)


def turns(sample):
    """Messages in short: role and parts, media by name."""
    return [
        (message.role, [part.text or part.media for part in message.parts]) for message in sample.messages
    ]


def refused(format, record, folder):
    found = made(format, record, folder)
    assert isinstance(found, Quarantined)
    return found.cause


def chat(content, answer="yes"):
    return {"conversations": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def llava(value, **fields):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}], **fields}


def openai(content):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}


def test_megrez_puts_pictures_first_then_clips_then_text(folder):
    content = {"text": "what?", "audio": "c.wav", "image": ["a.jpeg", "b.PNG"]}
    sample = made("megrez", chat(content), folder)
    assert turns(sample) == [("user", ["0.jpg", "1.png", "2.wav", "what?"]), ("assistant", ["yes"])]
    assert sample.media == {"0.jpg": PIXEL, "1.png": PIXEL + b"2", "2.wav": SOUND}
    assert sample.origin == "records.jsonl:1" and sample.tags == ()


def test_megrez_takes_strings_and_objects_and_null_is_absent(folder):
    sample = made("megrez", chat("hi", {"text": "yes", "image": None, "audio": None}), folder)
    assert turns(sample) == [("user", ["hi"]), ("assistant", ["yes"])]


def test_llava_puts_media_where_the_marks_stand(folder):
    value = "<image>\nfirst <image> then <audio>"
    sample = made("llava", llava(value, image=["a.jpeg", "b.PNG"], audio="c.wav"), folder)
    assert turns(sample)[0] == ("user", ["0.jpg", "first", "1.png", "then", "2.wav"])


@pytest.mark.parametrize(
    ("value", "image", "message"),
    [
        ("<image><image><image>", ["a.jpeg", "b.PNG"], "3 image marks but 2 images"),
        ("no mark", "a.jpeg", "0 image marks but 1 image"),
        ("<image> alone", None, "1 image mark but 0 images"),
    ],
)
def test_llava_marks_and_media_must_match(folder, value, image, message):
    found = made("llava", llava(value, image=image), folder)
    assert (found.cause, found.message) == ("marks_mismatch", message)


def test_openai_takes_paths_data_urls_and_base64(folder):
    payload = base64.b64encode(PIXEL).decode()
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "a.jpeg"}},
        {"type": "image_url", "image_url": f"data:image/webp;base64,{payload}"},
        {"type": "input_audio", "input_audio": {"data": payload, "format": "mp3"}},
        {"type": "audio_url", "audio_url": {"url": "c.wav"}},
    ]
    sample = made("openai", openai(content), folder)
    assert turns(sample)[0] == ("user", ["look", "0.jpg", "1.webp", "2.mp3", "3.wav"])
    assert sample.media["1.webp"] == sample.media["2.mp3"] == PIXEL


def test_openai_never_fetches_from_the_web(folder):
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}
    assert refused("openai", openai([part]), folder) == "media_missing"


def test_caption_becomes_a_question_without_text_unless_there_is_a_prompt(folder):
    sample = made("caption", {"image": "a.jpeg", "caption": "a cat"}, folder, tags=("zh",))
    assert turns(sample) == [("user", ["0.jpg"]), ("assistant", ["a cat"])]
    assert sample.tags == ("caption", "zh")
    sample = made("caption", {"image": "a.jpeg", "text": "a cat", "prompt": "Describe."}, folder)
    assert turns(sample)[0] == ("user", ["0.jpg", "Describe."])


@pytest.mark.parametrize(
    ("language", "word"), [(None, "Transcribe"), ("en", "Transcribe"), ("zh-CN", "转写")]
)
def test_asr_becomes_an_instruction_in_its_language(folder, language, word):
    sample = made("asr", {"audio": "c.wav", "transcript": "hello", "language": language}, folder)
    assert word in turns(sample)[0][1][1] and turns(sample)[1] == ("assistant", ["hello"])
    assert sample.tags == ("asr",)


def test_text_becomes_a_document(folder):
    sample = made("text", {"text": " once \n"}, folder)
    assert turns(sample) == [("document", [" once \n"])] and sample.tags == ("text",)


def test_folder_of_txt_files_is_one_document_each(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00bad")
    maker = SampleMaker("text", (), LIMITS)
    files = find_files(str(tmp_path), "text")
    found = [maker.make(record, ".") for path, name in files for record in read_records(path, name)]
    assert [item.origin for item in found] == ["a.txt", "c.txt", "deep/b.txt"]
    assert isinstance(found[1], Quarantined) and found[1].cause == "record_malformed"


def test_json_list_is_read_like_lines(tmp_path, folder):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([chat("a"), chat("b")]))
    assert [record.origin for record in read_records(str(path), "records.json")] == [
        "records.json[0]",
        "records.json[1]",
    ]


def test_strings_like_special_tokens_are_left_alone(folder):
    text = "<|turn_end|><|image_start|> <image>"
    assert turns(made("megrez", chat(text), folder))[0] == ("user", [text])


@pytest.mark.parametrize("path", ["../outside.jpg", "link.jpg", "in/../../outside.jpg", "ABSOLUTE"])
def test_media_outside_the_prefix_is_refused(folder, path):
    os.symlink("../outside.jpg", os.path.join(folder, "link.jpg"))
    path = os.path.join(os.path.dirname(folder), "outside.jpg") if path == "ABSOLUTE" else path
    assert refused("megrez", chat({"image": path}), folder) == "path_outside"


def test_absolute_path_inside_the_prefix_is_taken(folder):
    sample = made("megrez", chat({"image": os.path.join(folder, "a.jpeg")}), folder)
    assert sample.media == {"0.jpg": PIXEL}


@pytest.mark.parametrize("path", ["none.jpg", "", ".", "a.jpeg/b", "nul\0.jpg", "x" * 5000])
def test_media_that_is_not_there_is_named(folder, path):
    record = {"image": path, "caption": "a cat"}
    assert refused("caption", record, folder) == ("media_missing" if path else "record_malformed")


def test_named_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(os.path.join(folder, "pipe.jpg"))
    assert refused("megrez", chat({"image": "pipe.jpg"}), folder) == "media_missing"


def test_socket_and_circle_of_links_are_no_files(folder):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.join(folder, "socket.jpg"))
    os.symlink("circle.jpg", os.path.join(folder, "circle.jpg"))
    for name in ("socket.jpg", "circle.jpg"):
        assert refused("megrez", chat({"image": name}), folder) == "media_missing"


def test_disk_that_fails_is_no_fault_of_the_record():
    # The first page of a process is mapped by none, so reading it is an input/output error.
    record = Record({"image": "mem", "caption": "a cat"}, "records.jsonl:7")
    with pytest.raises(RuntimeError, match=r"^records.jsonl:7: image 'mem' cannot be read \(\[Errno 5\]"):
        SampleMaker("caption", (), LIMITS).make(record, "/proc/self")


def test_too_many_open_files_are_no_fault_of_the_record(folder):
    record = Record({"image": "a.jpeg", "caption": "a cat"}, "records.jsonl:7")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RuntimeError, match=r"Too many open files.*start the same command again"):
            SampleMaker("caption", (), LIMITS).make(record, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_file_beyond_the_limit_is_not_read(folder):
    media = FolderMedia(folder, LimitsConfig(image_bytes=3))
    with pytest.raises(SampleError) as caught:
        media.part("image", "a.jpeg")
    assert caught.value.cause == "image_too_large" and media.inlined == {}


@pytest.mark.parametrize(
    ("format", "record", "cause"),
    [
        ("megrez", "{not json", "record_malformed"),
        ("megrez", "[" * 100_000, "record_malformed"),
        ("megrez", '"a string"', "record_malformed"),
        ("megrez", {}, "record_malformed"),
        ("megrez", {"conversations": []}, "record_malformed"),
        ("megrez", {"conversations": [7]}, "record_malformed"),
        ("megrez", chat(7), "record_malformed"),
        ("megrez", chat({"text": "x", "video": "v.mp4"}), "record_malformed"),
        ("megrez", chat({"image": [1]}), "record_malformed"),
        ("megrez", chat({}), "record_malformed"),
        ("megrez", chat("hi", {"image": "a.jpeg"}), "record_malformed"),
        ("megrez", chat("\ud800"), "record_malformed"),
        ("megrez", {"conversations": [{"role": "tool", "content": "x"}]}, "record_malformed"),
        ("megrez", {"conversations": [{"role": "user", "content": "x"}]}, "no_assistant"),
        ("llava", llava(None), "record_malformed"),
        ("openai", openai([{"type": "video_url"}]), "record_malformed"),
        ("openai", openai([{"type": "image_url", "image_url": "data:image/png,xx"}]), "record_malformed"),
        ("openai", openai([{"type": "input_audio", "input_audio": {"data": "%%"}}]), "record_malformed"),
        ("caption", {"caption": "no picture"}, "record_malformed"),
        ("caption", {"image": "a.jpeg", "caption": "  "}, "record_malformed"),
        ("asr", {"text": "no clip"}, "record_malformed"),
        ("text", {"text": ""}, "record_malformed"),
    ],
)
def test_bad_record_is_quarantined_with_its_cause_and_line(folder, format, record, cause):
    found = made(format, record, folder)
    assert isinstance(found, Quarantined) and found.origin == "records.jsonl:1"
    assert found.cause == cause and found.message


def test_keys_last_when_records_are_sorted_or_added_and_never_repeat(folder):
    records = [chat(str(number)) for number in range(20)] + [chat("0"), chat("0")]

    def keys(chosen):
        path = os.path.join(folder, "records.jsonl")
        with open(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in chosen)
        maker = SampleMaker("megrez", (), LIMITS)
        return [maker.make(record, folder).key for record in read_records(path, "records.jsonl")]

    first = keys(records)
    assert len(set(first)) == len(first) and not any(set(key) & {".", "/"} for key in first)
    assert keys(records) == first
    assert sorted(keys(records[::-1])) == sorted(first)
    assert keys([chat("new"), *records])[1:] == first


@pytest.mark.parametrize(
    ("layout", "members", "expected"),
    [
        ("caption", {"jpg": b"", "txt": b" a cat\n"}, [("user", ["jpg"]), ("assistant", ["a cat"])]),
        (
            "caption",
            {"png": b"", "json": b'{"caption": "a cat"}'},
            [("user", ["png"]), ("assistant", ["a cat"])],
        ),
        (
            "asr",
            {"flac": b"", "txt": b"hi"},
            [("user", ["flac", "Transcribe this clip."]), ("assistant", ["hi"])],
        ),
        (
            "llava",
            {"0.jpg": b"", "json": json.dumps(llava("<image>\nwhat?", image="0.jpg")).encode()},
            [("user", ["0.jpg", "what?"]), ("assistant", ["yes"])],
        ),
        (
            "megrez",
            {"1.wav": b"", "json": json.dumps(chat({"audio": "1.wav"})).encode()},
            [("user", ["1.wav"]), ("assistant", ["yes"])],
        ),
    ],
)
def test_members_of_shards_made_by_others_become_a_sample(layout, members, expected):
    sample = parse_members(layout, "k", members, members.__getitem__)
    assert turns(sample) == expected and sample.media == {}


@pytest.mark.parametrize(
    ("layout", "members", "cause"),
    [
        ("native", {"0.jpg": b""}, "record_malformed"),
        ("native", {"json": b"[1]"}, "record_malformed"),
        ("native", {"json": b"\xff"}, "record_malformed"),
        ("caption", {"jpg": b"", "png": b"", "txt": b"two"}, "record_malformed"),
        ("caption", {"jpg": b"", "txt": b"\xff"}, "record_malformed"),
        ("asr", {"txt": b"no clip"}, "record_malformed"),
        ("llava", {"json": json.dumps(llava("<image>", image="gone.jpg")).encode()}, "media_missing"),
    ],
)
def test_members_that_are_no_sample_are_refused_with_a_cause(layout, members, cause):
    with pytest.raises(SampleError) as caught:
        parse_members(layout, "k", members, members.__getitem__)
    assert caught.value.cause == cause


def test_record_of_more_media_than_the_limit_is_refused_before_they_are_read(folder, monkeypatch):
    reads = []
    read = FolderMedia._read

    def note(self, *args):
        reads.append(args)
        return read(self, *args)

    monkeypatch.setattr(FolderMedia, "_read", note)
    assert refused("megrez", chat({"image": ["a.jpeg"] * 400}), folder) == "too_many_parts"
    assert len(reads) == LIMITS.parts
    url = {"type": "image_url", "image_url": "data:image/jpeg;base64,AAAA"}
    assert refused("openai", openai([url] * 400), folder) == "too_many_parts"


def test_record_nested_too_deeply_has_a_cause_and_the_key_of_its_line_or_place():
    value = []
    for _ in range(100_000):
        value = [value]
    records = [Record(value, "a[0]"), Record(value, "a[1]"), Record(value, "b:1", raw=b"x")]
    moved = Record(value, "b:2", raw=b"x")
    found = [SampleMaker("megrez", (), LIMITS).make(record, ".") for record in [*records, moved]]
    assert {item.cause for item in found} == {"record_malformed"}
    assert len({item.key for item in found[:3]}) == 3 and found[3].key == found[2].key


def test_role_nested_too_deeply_to_be_quoted_is_malformed(monkeypatch):
    value = []
    for _ in range(100_000):
        value = [value]
    monkeypatch.setattr("data.records.json.dumps", lambda *args, **options: "fits")
    nested = {"conversations": [{"role": value, "content": "x"}]}
    assert SampleMaker("megrez", (), LIMITS).make(Record(nested, "a"), ".").cause == "record_malformed"


def test_empty_system_turn_is_absent(folder):
    turn = {"from": "system", "value": ""}
    record = {"conversations": [turn, *llava("hi")["conversations"]]}
    assert turns(made("llava", record, folder)) == [("user", ["hi"]), ("assistant", ["yes"])]


@pytest.mark.parametrize(
    ("path", "advice"), [("link.jpg", "Copy it there"), ("/etc/hostname", "Use --prefix with a folder that")]
)
def test_advice_for_a_path_outside_is_of_use(path, advice, folder):
    os.symlink("../outside.jpg", os.path.join(folder, "link.jpg"))
    assert advice in made("megrez", chat({"image": path}), folder).message
