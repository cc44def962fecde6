"""Chat templates: rendered as transformers renders them, found where models have them, and unable to do harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.server.chat import ChatError, ChatTemplate, load_template

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "<b>1 & 2</b> é"},
    {"role": "assistant", "content": "{}"},
    {"role": "user", "content": "again"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "with blocks on lines": (
        "{%- if messages[0].role == 'system' %}\n    {{- bos_token + messages[0].content | trim }}\n{%- endif %}\n"
        "{% for m in messages[1:] %}\n    {% if loop.last %}\nlast\n    {% endif %}\n"
        "  {{ m | tojson }} {{ loop.index0 % 2 }}\n{% endfor %}\n"
    ),
    "with loop controls and marks": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}{{ {'a': 'é<'} | tojson(indent=2) }}"
    ),
    "with variables": "{% if thinking is defined and thinking %}<think>{% endif %}{{ eos_token }}{{ messages | length }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(TEMPLATES[name], special).render(MESSAGES, {"thinking": True})
    (theirs,), _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, thinking=True, **special
    )
    assert ours == theirs


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatError, match="^roles must alternate$"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__bases__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include 'x' %}",
        "{{ undefined.attribute }}",
    ],
)  # fmt: skip
def test_what_a_template_must_not_do_is_an_error(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_that_writes_too_much_is_stopped() -> None:
    with pytest.raises(ChatError, match="more than"):
        ChatTemplate("{% for i in range(9999) %}{{ messages[0].content * 1000 }}{% endfor %}").render(MESSAGES)


def test_a_template_that_is_none() -> None:
    with pytest.raises(ValueError, match="the chat template cannot be used"):
        ChatTemplate("{% if %}")


def test_where_models_have_theirs(tmp_path: Path) -> None:
    assert load_template(None) is None and load_template(tmp_path) is None
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}

    def rendered(source: str | None = None) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        template = load_template(tmp_path, source)
        assert template is not None
        return template.render([])

    config["chat_template"] = "{{ bos_token }}one"
    assert rendered() == "<s>one"
    config["chat_template"] = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}two"}]
    assert rendered() == "</s>two"
    (tmp_path / "chat_template.jinja").write_text("three{{ pad_token is defined }}")
    assert rendered() == "threeFalse"
    assert rendered("{{ eos_token }}four") == "</s>four"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_template(tmp_path)
