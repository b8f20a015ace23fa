from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swaft.errors import ConfigError, DataError
from swaft.training.config import ModelConfig
from swaft.training.data.causal_lm import (
    CausalCollator,
    CausalColumns,
    CausalDataConfig,
    CausalEvalConfig,
    asked_rows,
    ends_of_answers,
    find_columns,
    report_rows,
    require_chat_template,
    tokenize_rows,
)
from swaft.training.data.packing import pack
from swaft.training.evaluation.evaluate import evaluate_answers_given
from swaft.training.evaluation.generation import write_answers
from swaft.training.models.checks import require_embedded
from swaft.training.models.encoder_decoder import train_tokenizer

pytestmark = pytest.mark.unit
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WORDS = ["<pad>", "</s>", "<user>", "<bot>", "a", "b", "c", "d", "e", "f"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' </s>' if m.role == 'assistant' else '' }} {% endfor %}{{ '<bot> ' if add_generation_prompt }}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def made(rows: list[dict], **settings: object) -> Dataset:
    data = CausalDataConfig(**settings)
    columns = find_columns({"train": Dataset.from_list(rows)}, data)
    return tokenized(columns.rows["train"], tokenizer(), columns, data)


def tokenized(train: Dataset, *others: object) -> Dataset:
    return tokenize_rows({"train": train}, *others)["train"]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_the_answer_and_its_end_are_learnt_and_the_prompt_is_not():
    row = made([{"prompt": "a b", "completion": "c"}], prompt_suffix=" d")[0]
    assert row["input_ids"] == ids("a b d c </s>")
    assert row["labels"] == [-100, -100, -100, *ids("c </s>")]


def test_of_a_text_without_a_prompt_all_but_the_first_token_is_learnt():
    assert made([{"text": "a b c"}])[0]["labels"] == [-100, *ids("b c </s>")]


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


QWEN3 = ("qwen3", "<|im_end|>", "<|im_start|>")
GPT_OSS = ("gptoss", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")
PHI3 = ("phi3", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
R1 = ("deepseek_r1_distill", "<|end|>")
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
        with pytest.raises(DataError, match=r"row 0 of train has .*data\.skip_bad_rows=true"):
            tokenize_rows(columns.rows, reader, columns, CausalDataConfig(**settings))
        data = CausalDataConfig(**settings, skip_bad_rows=True)
        with (
            caplog.at_level(logging.INFO, logger="swaft"),
            nullcontext() if left else pytest.raises(DataError),
        ):
            found = tokenize_rows(columns.rows, reader, columns, data)
            assert list(found) == ["train"]
            assert found["train"]["idx"][:] == list(range(left))
            assert "2 of 4 rows of train are left out: 0, 2 (row 0 has a chat that" in caplog.text
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
        DataError, match=r"row 0 of train has a tool call that the chat template of .* does not write"
    ):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    with pytest.raises(DataError, match=r"expected messages with a role and a content \(or tool_calls\)"):
        made([{"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": []}]}])


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
    kinds = (
        "which has contents of several types, which change how texts are read; write each of them as a text"
    )
    written = Dataset.from_dict({"messages": [json.dumps(CHAT)]})
    for rows, said in (
        (mixed, f"row 1 of train has .*'content': 7.*{kinds}"),
        (written, r"row 0 of train has the text '\[\{.*expected a list of messages"),
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
        DataError, match=r"row 0 of train has a chat that .* refuses \(roles must alternate\): \["
    ):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())


def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_the_answer():
    row = made([{"prompt": "a b c d e f", "completion": "a b"}], max_length=5)[0]
    assert row["input_ids"] == ids("d e f a b")
    assert row["labels"][-2:] == ids("a b")


def test_classes_are_written_by_their_names():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["c", "d"])})
    split = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data = CausalDataConfig(prompt_column="text", answer_column="label")
    assert find_columns({"train": split}, data).rows["train"]["label"][:] == ["d", "c"]


def test_a_second_part_of_the_prompt_is_left_out_where_it_is_empty_or_the_columns_are_named():
    row = {"instruction": "a", "input": "", "output": "c"}
    assert made([row])[0]["input_ids"] == ids("a c </s>")
    named = {"prompt_column": "instruction", "answer_column": "output"}
    assert made([row | {"input": "b"}], **named)[0]["input_ids"] == ids("a c </s>")


def test_a_class_that_is_withheld_is_a_row_without_an_answer():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["c", "d"])})
    split = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    settings = {"prompt_column": "text", "answer_column": "label"}
    with pytest.raises(DataError, match="row 1 of train has nothing in column 'label'"):
        find_columns({"train": split}, CausalDataConfig(**settings))
    kept = find_columns({"train": split}, CausalDataConfig(**settings, skip_bad_rows=True)).rows["train"]
    assert kept["label"][:] == ["d"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "a"}], {}, "set data.prompt_column"),
        (
            [{"instruction": "a", "input": "b", "output": "c"}],
            {},
            "have 'input' besides instruction and output",
        ),
        ([{"messages": CHAT, "tools": "[{}]"}], {}, "a column 'tools', which is not written into the chats"),
        (
            [{"messages": CHAT, "system": "a"}],
            {},
            "put it into the chats as messages, or .*messages_column=mess",
        ),
        (
            [{"prompt": "a", "completion": "b", "history": [["c", "d"]]}],
            {},
            "'history' besides prompt and compl",
        ),
        ([{"prompt": "a", "completion": " "}], {}, "row 0 of train has an empty text"),
        ([{"text": "a", "x": "b"}], {"answer_column": "z"}, "no column 'z'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "no message of the assistant"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            {},
            "no message of the assistant after another",
        ),
        ([{"messages": CHAT}], {"prompt_prefix": "a"}, "data.prompt_prefix and .* the rows are chats"),
        ([{"messages": [{"role": "user"}]}], {}, "expected messages with a role"),
    ],
)
def test_rows_that_nothing_can_be_learnt_from_are_refused(rows, settings, message):
    with pytest.raises(DataError, match=message):
        made(rows, **settings)


def test_a_chat_without_room_for_an_answer_is_refused():
    chat = [{"role": "user", "content": "a b c d e f"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"row 0 of train has no token to learn within data\.max_length=4"):
        made([{"messages": chat}], max_length=4)


def test_a_template_that_rewrites_what_went_before_is_refused():
    columns = find_columns({"train": Dataset.from_list([{"messages": CHAT}])}, CausalDataConfig())
    reader = tokenizer()
    reader.chat_template = "{{ messages | length }} " + TEMPLATE
    reader.add_tokens(["1", "2"])
    reason = "cannot be told .* asks for it with '1 <user> a <bot>', and then writes '2"
    with pytest.raises(DataError, match=f"row 0 of train has an answer that {reason}"):
        tokenized(columns.rows["train"], reader, columns, CausalDataConfig())
    reader.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        require_chat_template(reader, columns)
    with pytest.raises(DataError, match="a new tokenizer has no chat template"):
        require_chat_template(None, columns)


def test_packed_rows_have_the_loss_they_have_alone():
    rows = made([{"prompt": p, "completion": c} for p, c in (("a b", "c d"), ("e", "f"), ("f a b", "c"))])
    packed = pack(rows, 12)
    assert [len(row) for row in packed["input_ids"]] == [10, 3]
    assert packed["position_ids"][0] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, use_cache=False,
        )
    ).double().eval()  # fmt: skip
    collate = CausalCollator(tokenizer())

    def total(dataset: Dataset) -> float:
        batch = collate([dataset[i] for i in range(len(dataset))])
        batch.pop("idx")
        count = (batch["labels"] != -100).sum()
        return float(model(**batch).loss * count)

    assert total(packed) == pytest.approx(total(rows), rel=1e-6)


def test_the_evaluation_is_a_mean_over_tokens():
    rows = made([{"text": "a b c"}, {"text": "d e"}])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).eval()
    collate = CausalCollator(tokenizer())
    alone = SimpleNamespace(gather=lambda parts: parts, pad_across_processes=lambda part, **_: part)
    sums = []
    for row in rows:
        batch = collate([row])
        batch.pop("idx")
        sums.append(float(model(**batch).loss) * (len(row["labels"]) - 1))
    model.loss_function = lambda **_: pytest.fail("the model computes a loss of its own, which nobody reads")
    found = evaluate_answers_given(model, [collate([*rows])], alone, num_rows=2)
    assert found.scores["loss"] == pytest.approx(sum(sums) / 5, rel=1e-6)


def test_the_last_answer_of_a_row_is_asked_for():
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"), ("user", "f")]
    rows = made([{"messages": [{"role": role, "content": text} for role, text in chat]}])
    asked = asked_rows(rows, 20, tokenizer())[0]
    assert asked["input_ids"] == ids("<user> a <bot> b </s> <user> c <bot>")
    assert asked["answer"] == "d e"
    assert asked_rows(made([{"text": "a b c"}]), 1, tokenizer())[0]["answer"] == "b c"


@pytest.mark.parametrize("max_length", [16, 6])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_written_does_not_depend_on_what_is_in_the_batch(batch_size, max_length, make_accelerator):
    prompts = ("a b c", "d", "e f")
    rows = made([{"prompt": prompt, "completion": "a"} for prompt in prompts], max_length=16)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=1.0, eos_token_id=1,
    )  # fmt: skip
    model, reader = LlamaForCausalLM(config).train(), tokenizer()
    written = write_answers(
        model,
        asked_rows(rows, 20, reader),
        make_accelerator(),
        tokenizer=reader,
        data=CausalDataConfig(max_length=max_length),
        evaluation=CausalEvalConfig(max_new_tokens=4, per_device_eval_batch_size=batch_size),
    )
    assert model.training
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([ids(prompt)])
        for _ in range(min(4, max_length - len(ids(prompt)))):
            tokens = torch.cat(
                [tokens, model.eval()(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
            )
            if tokens[0, -1] == 1:
                break
        expected.append(reader.decode(tokens[0, len(ids(prompt)) :], skip_special_tokens=True).strip())
    assert len({*expected}) == 3
    assert list(written.outputs) == expected
