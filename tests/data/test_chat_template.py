"""A checkpoint folder's own chat template: its system turn is adopted, another form is refused."""

import json
import shutil

import pytest

from data.chat_template import adopt_template
from data.config import RELEASED_SYSTEM, TemplateConfig
from data.sample import Message, Part
from data.template import render
from data.tokenizer import BUILT_IN, load_tokenizer

TURN = "{{ '<|role_start|>' + message['role'] + '<|role_end|>' + message['content'] + '<|turn_end|>' }}"
LOOP = "{% for message in messages %}" + TURN + "{% endfor %}"
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|role_start|>system<|role_end|>Be brief.<|turn_end|>' }}{% endif %}"
)
TOKENIZER = load_tokenizer(None)


@pytest.fixture
def folder(tmp_path):
    shutil.copyfile(BUILT_IN, tmp_path / "tokenizer.json")
    return tmp_path


def first_turn(config: TemplateConfig) -> str:
    message = Message("user", [Part("text", text="hi")])
    return TOKENIZER.decode(render([message], {}, config, TOKENIZER).input_ids.tolist())


def test_the_folders_system_turn_wins_over_the_default(folder):
    (folder / "chat_template.jinja").write_text(SYSTEM + LOOP)
    adopted = adopt_template(TemplateConfig(), folder, TOKENIZER)
    assert first_turn(adopted).startswith("<|role_start|>system<|role_end|>Be brief.<|turn_end|>")


def test_a_folder_without_a_system_turn_has_none_added(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": LOOP}))
    adopted = adopt_template(TemplateConfig(), folder, TOKENIZER)
    assert first_turn(adopted) == "<|role_start|>user<|role_end|>hi<|turn_end|>"


def test_what_a_person_sets_wins_over_the_folder(folder):
    (folder / "chat_template.jinja").write_text(SYSTEM + LOOP)
    assert adopt_template(TemplateConfig(system="Mine."), folder, TOKENIZER).system == "Mine."


@pytest.mark.parametrize("config", [None, "{}", '{"chat_template": null}'])
def test_without_a_template_the_released_system_turn_stands(folder, config):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config)
    adopted = adopt_template(TemplateConfig(), folder, TOKENIZER)
    assert RELEASED_SYSTEM in first_turn(adopted) and adopted == TemplateConfig()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP.replace("<|turn_end|>", "<|turn_end|>\\n"), "where this program writes"),
        ("{{ raise_exception('roles must alternate') }}", "its chat template fails"),
        ("{% for message in messages %}", "its chat template fails"),
    ],
)
def test_another_form_is_refused_unless_it_is_not_to_be_checked(folder, template, said):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"^data.tokenizer={folder}: its chat template.*{said}|{said}"):
        adopt_template(TemplateConfig(), folder, TOKENIZER)
    assert adopt_template(TemplateConfig(check=False), folder, TOKENIZER) == TemplateConfig(check=False)
