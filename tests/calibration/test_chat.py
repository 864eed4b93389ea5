"""Rows that are chats, written by the model's own template."""

from __future__ import annotations

import re

import pytest
from helpers.samples import BOS, TEMPLATE, ids, save_tokenizer, tokens

from mergekit_pave.errors import PaveError

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def chatty(tmp_path):
    save_tokenizer(tmp_path / "chatty", chat_template=TEMPLATE)
    return str(tmp_path / "chatty")


MESSAGES = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
SHARED = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "w1"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "w2"}]}]


@pytest.mark.parametrize("column, chat, asked", [
    ("messages", MESSAGES, "text"), ("conversations", SHARED, "text"),
    ("dialogue", SHARED, "dialogue"), ("messages", PARTS, "messages")])
def test_chats_use_the_models_own_template(load, chatty, column, chat, asked):
    samples = load([{column: chat}], path=chatty, text_column=asked)
    assert ids(samples) == [[BOS, 44, 46, *tokens(1), 45, 46, *tokens(2)]]  # a single BOS
    assert samples.notes["chat_template"] is True
    assert load([{"text": "w1"}], path=chatty).notes["chat_template"] is False


def test_chat_without_a_template(load, model):
    with pytest.raises(PaveError, match=f"tokenizer of {model} has no chat template; add a "
                                        "chat_template.jinja .* or name a column of plain text"):
        load([{"messages": MESSAGES}])


def test_rows_that_the_template_refuses_are_skipped(load, chatty):
    refused = [{"role": "system", "content": "w9"}, *MESSAGES]
    samples = load([{"messages": refused}, {"messages": MESSAGES}], path=chatty)
    assert samples.notes["skipped"] == {"refused by the chat template": 1}
    with pytest.raises(PaveError, match=r"refused by the chat template \(no system\): 1"):
        load([{"messages": refused}], path=chatty)


@pytest.mark.parametrize("messages, problem", [
    ([{"role": "narrator", "content": "secret"}], "a message with an unknown role ('narrator')"),
    ([{"content": "secret"}], "a message with an unknown role (None)"),
    ([{"role": "user", "content": [{"type": "secret"}]}],
     "a message whose content is not text ([{'type': str}])"),
    ([{"role": "user", "content": None}], "a message whose content is not text (NoneType)"),
])
def test_strange_messages_are_skipped_and_their_text_not_shown(load, chatty, messages, problem):
    samples = load([{"messages": messages}, {"messages": MESSAGES}], path=chatty)
    assert samples.notes["skipped"] == {problem.partition(" (")[0]: 1}
    with pytest.raises(PaveError, match=re.escape(problem)) as raised:
        load([{"messages": messages}], path=chatty)
    assert "secret" not in raised.value.message


def test_a_template_that_writes_the_date_gives_the_same_rows_every_day(load, tmp_path):
    save_tokenizer(tmp_path / "dated", chat_template=(
        "{{ strftime_now('%f') }} {% for m in messages %}{{ m.content }} {% endfor %}"))
    once, again = (load([{"messages": MESSAGES}], path=tmp_path / "dated") for _ in range(2))
    assert once.digest == again.digest


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_needs_no_text(load, chatty, key):
    call = [MESSAGES[0], {"role": "assistant", "content": None, key: [{"name": "w2"}]}]
    assert load([{"messages": call}], path=chatty).notes["skipped"] == {}


def test_negative_token_ids(load, model):
    with pytest.raises(PaveError, match="the token id -1; .* attention_mask"):
        load([{"input_ids": [5, 6, -1]}], text_column="input_ids")


@pytest.mark.parametrize("value, problem", [
    ("[{'role': 'user'}]", "holds str"), (["a", "b"], "holds \\[str, ... 2 in all\\]"),
    ({"en": "a"}, "holds {'en': str}")])
def test_columns_of_another_shape(load, chatty, value, problem):
    with pytest.raises(PaveError, match=f"'messages' {problem}, which cannot be read"):
        load([{"messages": value}], path=chatty)


def test_empty_chats_are_skipped_and_tool_calls_reach_the_template(load, tmp_path):
    save_tokenizer(tmp_path / "tools", chat_template=(
        "{% for m in messages %}{{ m.content }} {% if m.tool_calls is defined %}"
        "{{ m.tool_calls[0].name }} {% endif %}{% endfor %}"))
    call = [{"role": "user", "content": "w1"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "w2"}]}]
    samples = load([{"messages": []}, {"messages": call}], path=tmp_path / "tools")
    assert ids(samples) == [tokens(1, 2)] and samples.notes["skipped"] == {"empty": 1}
