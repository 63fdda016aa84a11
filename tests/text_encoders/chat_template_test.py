"""Chat templates: the text that transformers renders; what none may do ends in one line."""

import pathlib

import pytest
import tiny_models
from transformers import AutoTokenizer

from sage_grpo_jax.text_encoders import chat_template, qwen, template

SPECIAL = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
# Qwen2.5-VL's own, as far as text goes.
QWEN = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{% set image_count.value = image_count.value + 1 %}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHERS = [
    tiny_models.CHAT_TEMPLATE,
    QWEN,
    "{%- for m in messages if m.role == 'user' %}\n  {%- if loop.index > 9 %}{% break %}{% endif %}"
    "\n  {{- m | tojson }} {{ eos_token }}{{ m.content[::-1].strip() }}\n{% endfor %}\n",
    "{{ messages[-1]['content'] | trim }}{{ dict(a=1)['a'] }}{{ tools is none }}"
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(bos_token) }}",
]
PROMPTS = ["a cat walks", "  ", 'ein "Wort" – “наоборот”', "{{ 7 * 6 }}{% for %}", "a\n\nb "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models._save_tokenizer(path / "plain")
    return path / "plain"


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_same_text_as_transformers(folder, number):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OTHERS[number]
    chats = [template.conversation(prompt) for prompt in PROMPTS]
    want = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    assert chat_template.render(OTHERS[number], chats, tokenizer.special_tokens_map) == want


def render(text):
    return chat_template.render(text, [template.conversation("a cat")], SPECIAL)


FORBIDDEN = {
    "code": "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "classes": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{{ c }}{% endfor %}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 3 %}",
    "changes": "{{ messages.append(1) }}",
    "import": "{% include 'FILE' %}",
    "syntax": "{% for %}",
    "refusal": "{{ raise_exception('only one\nturn') }}",
    "absent": "{{ nothing.there }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_forbidden_ends_in_one_line(name, tmp_path):
    file = tmp_path / "touched"
    with pytest.raises(ValueError, match="chat template cannot be rendered: ") as caught:
        render(FORBIDDEN[name].replace("FILE", str(file)))
    assert not file.exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


# A doubling string, an endless loop, a large product, too much text.
GREEDY = {
    "memory": "{% set n = namespace(x='ab' * 999) %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "product": "{{ 'a' * 10 ** 12 }}",
    "text": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_memory_is_bounded(name):
    with pytest.raises(ValueError, match=r"more than (2 GiB of memory|67108864 characters)"):
        render(GREEDY[name])


def test_time_is_bounded(monkeypatch, tmp_path):
    script = (tmp_path / "short.py").absolute()
    text = pathlib.Path(chat_template.__file__).read_text()
    script.write_text(text.replace("MAX_SECONDS, MAX_BYTES = 20,", "MAX_SECONDS, MAX_BYTES = 1,"))
    monkeypatch.setattr(chat_template, "__file__", str(script))
    loop = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="takes more than 20 s, or 2 GiB"):
        render(loop)


def test_long_templates_are_refused():
    with pytest.raises(ValueError, match="has 1048577 characters: must be at most 1048576"):
        render(" " * (2**20 + 1))


def test_the_tokenizers_folder_is_named(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = FORBIDDEN["code"]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: the chat template cannot be rendered"):
        qwen.PromptTokenizer(tmp_path)


def test_code_beside_a_tokenizer_does_not_run(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass T: pass\n")
    config = tmp_path / "tokenizer_config.json"
    mapped = '{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "Other",'
    config.write_text(mapped + config.read_text().replace('"tokenizer_class"', '"before"')[1:])
    with pytest.raises(ValueError, match=f"{tmp_path}: cannot be loaded"):
        qwen.PromptTokenizer(tmp_path)
    assert not (tmp_path / "touched").exists()
