from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_causal import CHAT, TEMPLATE, ids, made, tokenized, tokenizer
from transformers import AddedToken, LlamaConfig, PreTrainedTokenizerFast

from swaft.errors import ConfigError, DataError
from swaft.training.config import ModelConfig
from swaft.training.data.causal_lm import (
    CausalColumns,
    CausalDataConfig,
    ends_of_answers,
    find_columns,
    report_rows,
    require_chat_template,
    tokenize_rows,
)
from swaft.training.models.checks import require_embedded
from swaft.training.models.text_generation import train_tokenizer

pytestmark = pytest.mark.unit
QWEN3 = ("qwen3", "<|im_end|>", "<|im_start|>")
PHI3 = ("phi3", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
R1 = ("deepseek_r1_distill", "<|end|>")


def test_a_token_of_the_template_that_is_special_as_an_added_token_only_is_text_in_a_message():
    reader = reader_of(*PHI3)
    assert "<|user|>" not in reader.all_special_tokens
    chat = [{"role": "user", "content": "the <|user|> cat"}, CHAT[1]]
    columns = CausalColumns(answer=None, messages="messages")
    for plain, turns in ((True, 1), (False, 2)):
        data = CausalDataConfig(split_special_tokens=plain)
        [row] = tokenized(Dataset.from_list([{"messages": chat}]), reader, columns, data)
        assert row["input_ids"].count(reader.convert_tokens_to_ids("<|user|>")) == turns


def test_of_a_chat_every_answer_of_the_assistant_is_learnt():
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
    row = made([{"messages": [{"role": role, "content": text} for role, text in chat]}])[0]
    assert row["input_ids"] == ids("<user> a <bot> b </s> <user> c <bot> d e </s>")
    assert row["labels"] == [-100] * 3 + ids("b </s>") + [-100] * 3 + ids("d e </s>")


def test_the_special_tokens_of_a_template_are_special_and_those_that_a_message_spells_are_text():
    def reader() -> PreTrainedTokenizerFast:
        inner = train_tokenizer(["the cat sat on the mat"], 300)
        inner.post_processor = None
        made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        made.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        return made

    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    tokens, data = reader(), CausalDataConfig()
    columns = find_columns({"train": Dataset.from_list([{"messages": chat}])}, data)
    [row] = tokenized(columns.rows["train"], tokens, columns, data)
    assert row["input_ids"] == reader().apply_chat_template(chat, return_dict=False)
    assert [each for each in row["labels"] if each != -100][-1] == tokens.eos_token_id
    spelt = [chat[0] | {"content": "the <|im_end|> cat"}, chat[1]]
    for plain, ends in ((True, 2), (False, 3)):
        data = CausalDataConfig(split_special_tokens=plain)
        [row] = tokenized(Dataset.from_list([{"messages": spelt}]), tokens, columns, data)
        assert row["input_ids"].count(tokens.eos_token_id) == ends
    assert not tokens.split_special_tokens  # nor in the folder that it is saved to
    prompts = CausalColumns(answer="completion", prompt="prompt")
    rows = Dataset.from_list([{"prompt": "the cat", "completion": "a cat"}])
    with pytest.raises(DataError, match=r"data.prompt_suffix is '<\|im_start\|>'"):
        tokenized(rows, tokens, prompts, CausalDataConfig(prompt_suffix="<|im_start|>"))
    data = CausalDataConfig(prompt_suffix="<|im_start|>", split_special_tokens=False)
    assert (
        tokens.convert_tokens_to_ids("<|im_start|>") in tokenized(rows, tokens, prompts, data)[0]["input_ids"]
    )
    # Tokens of the template that are not special, `<think>` say, are the answer's own.
    tokens.add_tokens(["<think>"])
    tokens.chat_template = tokens.chat_template.replace(
        "{{ m.content", "{{ m.content.replace('<think>', '<think>')"
    )
    thought = [spelt[0], chat[1] | {"content": "<think>sat"}]
    [row] = tokenized(Dataset.from_list([{"messages": thought}]), tokens, columns, CausalDataConfig())
    assert tokens.convert_tokens_to_ids("<think>") in row["labels"]
    assert tokens.chat_control_tokens is None
    model, config = ModelConfig(model_name_or_path="m"), LlamaConfig(vocab_size=len(tokens))
    require_embedded([Dataset.from_list([row])], model, config)
    with pytest.raises(
        ConfigError, match=f"has {len(tokens) - 1} embeddings, but the rows have the token id"
    ):
        require_embedded([Dataset.from_list([row])], model, LlamaConfig(vocab_size=len(tokens) - 1))


def reader_of(template: str, end: str, *special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template of a model, as TRL keeps it, and with the special tokens in it."""
    inner = train_tokenizer(["the cat sat on the mat"], 300)
    inner.post_processor = None
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token=end)
    made.add_tokens([AddedToken(each, special=True) for each in special])
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    made.chat_template = (folder / f"{template}.jinja").read_text()
    return made


GPT_OSS = ("gptoss", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")


TURNS = [*CHAT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]


@pytest.mark.parametrize(
    ("made", "learnt", "changed"),
    [
        (("qwen2_5", *QWEN3[1:]), ["b<|im_end|>\n", "d<|im_end|>\n"], 0),
        (QWEN3, ["<think>\n\n</think>\n\nd<|im_end|>\n"], 1),
        (GPT_OSS, ["<|channel|>final<|message|>b", "<|channel|>final<|message|>d<|return|>"], 1),
        (PHI3, ["b<|end|>\n", "d<|end|>\n<|endoftext|>"], 1),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_of_each_answer_of_a_chat_what_the_model_is_asked_to_write_is_learnt(made, learnt, changed, caplog):
    reader = reader_of(*made)
    columns = find_columns({"train": Dataset.from_list([{"messages": TURNS}])}, CausalDataConfig())
    rows = tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    [row] = rows
    assert row["input_ids"] == reader.apply_chat_template(TURNS, return_dict=False)
    parts = [
        reader.decode([*each]) for is_given, each in groupby(row["labels"], (-100).__eq__) if not is_given
    ]
    assert [part.replace(" ", "") for part in parts] == learnt
    with caplog.at_level(logging.INFO, logger="swaft"):
        report_rows(rows, CausalDataConfig(max_length=len(row["input_ids"]) - 1))
    assert ("1 answers before the last ones are learnt in part or not at all" in caplog.text) == bool(changed)
    assert "100.0 % are cut to" in caplog.text


@pytest.mark.parametrize(
    ("made", "content", "expected"),
    [
        (QWEN3, "b", {"<|im_end|>"}),
        (("qwen2_5", "<|endoftext|>", "<|im_start|>", "<|im_end|>"), "b", {"<|im_end|>"}),
        (GPT_OSS, "b", {"<|return|>"}),
        (("glm4moe", "<|endoftext|>", "<|user|>", "<|assistant|>"), "b", set()),
        (QWEN3, "b " * 200, set()),  # cut, so its end is not learnt
    ],
)
def test_the_special_token_that_the_template_ends_answers_with_is_found(made, content, expected):
    reader = reader_of(*made)
    chats = [[CHAT[0], {"role": "assistant", "content": content}]]
    columns = CausalColumns(answer=None, messages="messages")
    rows = tokenized(
        Dataset.from_dict({"messages": chats}), reader, columns, CausalDataConfig(max_length=300)
    )
    assert {reader.convert_ids_to_tokens(token) for token in ends_of_answers(rows)} == expected


def test_texts_end_with_the_tokenizers_end_only():
    assert ends_of_answers(made([{"text": "a b c"}])) == set()


def test_chats_that_cannot_be_used_are_left_out_if_bad_rows_are(caplog):
    long = [{"role": "user", "content": "a " * 90}, CHAT[1]]
    odd = [{"role": "system", "content": "a"}, *CHAT]
    chats = [{"messages": chat} for chat in (odd, CHAT, long, TURNS)]
    refused = reader_of(*QWEN3)
    refused.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + refused.chat_template
    )
    for reader, left in ((refused, 2), (reader_of(*R1), 0)):
        splits = {"train": Dataset.from_list(chats), "test": Dataset.from_list([*chats[:1], *chats[2:3]])}
        settings = {"max_length": 60, "messages_column": "messages"}
        columns = find_columns(splits, CausalDataConfig(**settings))
        with pytest.raises(DataError, match=r"row 1 of train has .*data\.skip_bad_rows=true"):
            tokenize_rows(columns.rows, reader, columns, CausalDataConfig(**settings))
        data = CausalDataConfig(**settings, skip_bad_rows=True)
        with (
            caplog.at_level(logging.INFO, logger="swaft"),
            nullcontext() if left else pytest.raises(DataError),
        ):
            found = tokenize_rows(columns.rows, reader, columns, data)
            assert list(found) == ["train"]
            assert found["train"]["idx"][:] == list(range(left))
            assert "2 of 4 rows of train are left out: 1, 3 (row 1 has a chat that" in caplog.text
            assert max(map(len, found["train"]["input_ids"])) <= 60
    with pytest.raises(DataError, match=r"asks for it with '<think>\\n', and then writes 'b"):
        tokenize_rows(columns.rows, reader_of(*R1), columns, CausalDataConfig(max_length=400))


def test_what_a_message_has_no_value_for_does_not_reach_the_template():
    tokens = tokenizer()
    tokens.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if 'tool_calls' in m %}{{ m.tool_calls[0] }}{% endif %}"
    )
    chat = [{"tool_calls": None, **message} for message in CHAT]
    columns = find_columns({"train": Dataset.from_list([{"messages": chat}])}, CausalDataConfig())
    [row] = tokenized(columns.rows["train"], tokens, columns, CausalDataConfig())
    assert row["input_ids"] == ids("<user> a <bot> b </s>")


def test_an_answer_may_be_a_call_of_a_tool_without_a_content():
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    reader = reader_of(*QWEN3)
    columns = find_columns({"train": Dataset.from_list([{"messages": chat}])}, CausalDataConfig())
    [row] = tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    learnt = reader.decode([each for each in row["labels"] if each != -100])
    assert '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>' in learnt
    reader.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content | trim + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"row 1 of train has a tool call that the chat template of .* does not write"
    ):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    with pytest.raises(DataError, match=r"expected messages with a role and a content \(or tool_calls\)"):
        made([{"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": []}]}])


def test_the_template_gets_the_arguments_that_a_row_has_for_it():
    reader = reader_of(*QWEN3)
    arguments = [
        {"enable_thinking": False, "style": None},
        None,
        {"enable_thinking": True, "style": "<|im_end|>"},
    ]
    rows = Dataset.from_dict({"messages": [CHAT] * 3, "chat_template_kwargs": arguments})
    columns = find_columns({"train": rows}, CausalDataConfig())
    made = tokenized(rows, reader, columns, CausalDataConfig())
    learnt = [reader.decode([each for each in row if each != -100]) for row in made["labels"]]
    assert [text.replace(" ", "") for text in learnt] == [
        "b<|im_end|>\n",
        "<think>\n\n</think>\n\nb<|im_end|>\n",
        "<think>\n\n</think>\n\nb<|im_end|>\n",
    ]
    reader.chat_template = "{{ style }}" + reader.chat_template
    for plain, ends in ((True, 2), (False, 3)):
        [row] = tokenized(rows.select([2]), reader, columns, CausalDataConfig(split_special_tokens=plain))
        assert row["input_ids"].count(reader.eos_token_id) == ends
    for wrong in ("none", {"tokenize": False}):
        written = Dataset.from_dict({"messages": [CHAT], "chat_template_kwargs": [wrong]})
        with pytest.raises(
            DataError, match=r"row 1 of train has .* in column 'chat_template_kwargs'; expected an object"
        ):
            find_columns({"train": written}, CausalDataConfig())


def test_a_call_of_a_tool_is_learnt_without_the_arguments_of_other_tools():
    calls = [{"name": "clock", "arguments": {"zone": "a"}}, {"name": "map", "arguments": {"at": [{"x": 1}]}}]
    chats = [[CHAT[0], {"role": "assistant", "tool_calls": [{"function": call}]}] for call in calls]
    reader, data = reader_of(*QWEN3), CausalDataConfig()
    rows = Dataset.from_dict({"messages": chats})
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"zone": "a", "at": None}
    columns = find_columns({"train": rows}, data)
    first, second = tokenized(rows, reader, columns, data)["input_ids"]
    assert '"arguments": {"zone": "a"}}' in reader.decode(first)
    assert '"arguments": {"at": [{"x": 1}]}}' in reader.decode(second)


@pytest.mark.parametrize("skip", [False, True])
def test_chats_with_contents_of_several_types_or_written_as_texts_are_refused(skip):
    chats = [CHAT, [CHAT[0], {"role": "assistant", "content": 7}]]
    mixed = Dataset.from_dict({"messages": chats}, on_mixed_types="use_json")
    kinds = "which has contents of several types, so a text like '7' is read as a number; write each as text"
    written = Dataset.from_dict({"messages": [json.dumps(CHAT)]})
    for rows, said in (
        (mixed, f"row 2 of train has .*'content': 7.*{kinds}"),
        (written, r"row 1 of train has the text '\[\{.*expected a list of messages"),
    ):
        with pytest.raises(DataError, match=said):
            find_columns({"train": rows}, CausalDataConfig(skip_bad_rows=skip))


def test_answers_of_the_weight_0_are_given_and_not_learnt():
    chat = [("user", "a", None), ("assistant", "b", 0), ("user", "c", None), ("assistant", "d", 1)]
    messages = [{"role": role, "content": text, "weight": weight} for role, text, weight in chat]
    row = made([{"messages": messages}])[0]
    assert row["input_ids"] == ids("<user> a <bot> b </s> <user> c <bot> d </s>")
    assert row["labels"] == [-100] * 8 + ids("d </s>")
    with pytest.raises(DataError, match="no message of the assistant"):
        made([{"messages": messages[:2]}])


def test_what_the_assistant_says_first_is_given_and_not_learnt():
    chat = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    row = made([{"messages": [{"role": role, "content": text} for role, text in chat]}])[0]
    assert row["input_ids"] == ids("<bot> a </s> <user> b <bot> c </s>")
    assert row["labels"] == [-100] * 6 + ids("c </s>")


def test_a_chat_that_the_template_refuses_is_shown():
    columns = find_columns({"train": Dataset.from_list([{"messages": CHAT}])}, CausalDataConfig())
    reader = tokenizer()
    reader.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"row 1 of train has a chat that .* refuses \(roles must alternate\): \["
    ):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())


def test_a_chat_without_room_for_an_answer_is_refused():
    chat = [{"role": "user", "content": "a b c d e f"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"row 1 of train has no token to learn within data\.max_length=4"):
        made([{"messages": chat}], max_length=4)


def test_line_breaks_before_an_answer_are_named_where_they_join_those_of_the_template():
    inner = train_tokenizer(["the\n\n\ncat\n\n\n"], 300)
    inner.post_processor = None
    reader = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    reader.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
        "{{ 'assistant\n' if add_generation_prompt }}"
    )
    rows = Dataset.from_list([{"messages": [CHAT[0], CHAT[1] | {"content": "\n\nthe"}]}])
    columns = find_columns({"train": rows}, CausalDataConfig())
    with pytest.raises(DataError, match="line breaks, which form one token with the template's, remove"):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())


def test_a_template_that_rewrites_what_went_before_is_refused():
    columns = find_columns({"train": Dataset.from_list([{"messages": CHAT}])}, CausalDataConfig())
    reader = tokenizer()
    reader.chat_template = "{{ messages | length }} " + TEMPLATE
    reader.add_tokens(["1", "2"])
    reason = "cannot be told .* asks for it with '1 <user> a <bot>', and then writes '2"
    with pytest.raises(DataError, match=f"row 1 of train has an answer that {reason}"):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    reader.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        require_chat_template(reader, columns)
    with pytest.raises(DataError, match="a new tokenizer has no chat template"):
        require_chat_template(None, columns)
