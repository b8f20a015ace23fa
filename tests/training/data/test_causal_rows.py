from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny_causal import CHAT, WORDS, ids, made, tokenized, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swaft.errors import DataError
from swaft.training.data.causal_lm import (
    CausalCollator,
    CausalDataConfig,
    CausalEvalConfig,
    asked_rows,
    ends_of_answers,
    find_columns,
)
from swaft.training.data.packing import pack
from swaft.training.data.texts import read_as_text
from swaft.training.evaluation.evaluate import evaluate_answers_given
from swaft.training.evaluation.generation import write_answers

pytestmark = pytest.mark.unit


def starting(added: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds special tokens to texts: `<bos> $A`."""
    made = tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    names = [name for name in added.split() if name != "$A"]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=added, special_tokens=[(name, made.convert_tokens_to_ids(name)) for name in names]
    )
    return made


def rows_of(reader: PreTrainedTokenizerFast, *rows: dict, **settings: object) -> Dataset:
    data = CausalDataConfig(**settings)
    columns = find_columns({"train": Dataset.from_list([*rows])}, data)
    return tokenized(columns.rows["train"], reader, columns, data)


def words(ids: list[int]) -> str:
    return " ".join([*WORDS, "<bos>"][each] for each in ids)


def test_the_answer_and_its_end_are_learnt_and_the_prompt_is_not():
    row = made([{"prompt": "a b", "completion": "c"}], prompt_suffix=" d")[0]
    assert row["input_ids"] == ids("a b d c </s>")
    assert row["labels"] == [-100, -100, -100, *ids("c </s>")]


def test_of_a_text_without_a_prompt_all_but_the_first_token_is_learnt():
    assert made([{"text": "a b c"}])[0]["labels"] == [-100, *ids("b c </s>")]


def test_a_long_prompt_loses_its_beginning_and_leaves_room_for_the_answer():
    row = made([{"prompt": "a b c d e f", "completion": "a b"}], max_length=5)[0]
    assert row["input_ids"] == ids("d e f a b")
    assert row["labels"][-2:] == ids("a b")


@pytest.mark.parametrize(
    ("added", "given", "text"),
    [
        ("</s> $A", "</s> a", "</s> b c </s>"),  # as OPT: its start is its end
        ("$A </s>", "a", "b c </s>"),
        ("<bos> $A </s>", "<bos> a", "<bos> b c </s>"),
    ],
)
def test_texts_and_prompts_have_the_start_that_the_tokenizer_gives_them(added, given, text):
    reader = starting(added)
    assert words(rows_of(reader, {"prompt": "a", "completion": "b"})[0]["input_ids"]) == f"{given} b </s>"
    [row] = rows_of(reader, {"text": "b c"})
    assert words(row["input_ids"]) == text
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_tokenizer_without_an_end_token_ends_answers_with_its_separator():
    reader = starting("<bos> $A </s>")
    reader.eos_token = None
    rows = rows_of(reader, {"prompt": "a", "completion": "b"})
    assert words(rows[0]["input_ids"]) == "<bos> a b </s>"
    assert rows[0]["labels"][-2:] == ids("b </s>")
    assert ends_of_answers(rows) == {*ids("</s>")}


def test_a_long_prompt_keeps_the_special_tokens_in_front_of_it():
    long = {"prompt": "a b c d e f", "completion": "a b"}
    for added in ("<bos> $A", "<bos> $A </s>"):
        [row] = rows_of(starting(added), long, max_length=5)
        assert words(row["input_ids"]) == "<bos> e f a b"
        assert row["labels"] == [-100, -100, -100, *row["input_ids"][3:]]
    [row] = rows_of(starting("<bos> <user> $A"), long, max_length=7)
    assert words(row["input_ids"]) == "<bos> <user> e f a b </s>"
    reader = starting("<bos> $A")
    [asked] = asked_rows(rows_of(reader, long, max_length=5), 1, reader)["input_ids"]
    assert words(asked) == "<bos> e f"


@pytest.mark.parametrize("added", ["<bos> $A", "<bos> $A </s>"])
def test_the_start_and_the_end_that_a_text_spells_are_not_repeated(added):
    for row, expected in (
        ({"text": "<bos> a b </s>"}, "<bos> a b </s>"),
        ({"text": "a </s> b"}, "<bos> a </s> b </s>"),
        ({"text": "a <bos>"}, "<bos> a <bos> </s>"),
        ({"prompt": "<bos> a", "completion": "b </s>"}, "<bos> a b </s>"),
        ({"prompt": "a </s>", "completion": "b"}, "<bos> a </s> b </s>"),
    ):
        [made] = rows_of(starting(added), row, split_special_tokens=False)
        assert words(made["input_ids"]) == expected
        assert made["labels"][0] == -100
        assert made["labels"][-1] == WORDS.index("</s>")
    [around] = rows_of(starting("<bos> $A <bos>"), {"text": "a"}, split_special_tokens=False)
    assert words(around["input_ids"]) == "<bos> a </s>"  # what is put behind a text belongs to no prompt


@pytest.mark.parametrize("split", [True, False])
def test_the_saved_tokenizer_of_a_decoder_reads_special_tokens_also_without_a_chat_template(split, tmp_path):
    reader = tokenizer()
    reader.chat_template = None
    read_as_text(reader, split)  # as recipes do at their start
    rows_of(reader, {"text": "a b"}, split_special_tokens=split)
    reader.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert not saved.split_special_tokens
    assert saved("a </s>")["input_ids"] == ids("a </s>")


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
    with pytest.raises(DataError, match="row 2 of train has nothing in column 'label'"):
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
        (
            [{"question": "a", "choices": ["b", "c"], "answer": "c"}],
            {},
            "have 'choices' besides question and",
        ),
        (
            [{"article": "a", "question": "b", "answer": "c"}],
            {},
            "have 'article' besides question and answer",
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
        ([{"prompt": "a", "completion": " "}], {}, "row 1 of train has an empty text"),
        ([{"text": "a", "x": "b"}], {"answer_column": "z"}, "no column 'z'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "no message of the assistant"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            {},
            "no message of the assistant after another",
        ),
        ([{"messages": CHAT}], {"prompt_prefix": "a"}, "data.prompt_prefix and .* the rows are chats"),
        ([{"messages": [{"role": "user"}]}], {}, "expected messages with a role"),
        (
            [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
            {},
            "chats are read from one column: put all",
        ),
        ([{"conversations": [{"from": "human", "value": "a"}]}], {}, "'human' as user, 'gpt' as assistant"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
            {},
            "write the parts of a content as one text",
        ),
    ],
)
def test_rows_that_nothing_can_be_learnt_from_are_refused(rows, settings, message):
    with pytest.raises(DataError, match=message):
        made(rows, **settings)


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
    torch.manual_seed(7)
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
    sums, right = [], []
    for row in rows:
        batch = collate([row])
        batch.pop("idx")
        output = model(**batch)
        sums.append(float(output.loss) * (len(row["labels"]) - 1))
        right += (output.logits[0, :-1].argmax(-1) == batch["labels"][0, 1:]).tolist()
    model.loss_function = lambda **_: pytest.fail("the model computes a loss of its own, which nobody reads")
    found = evaluate_answers_given(model, [collate([*rows])], alone, num_rows=2)
    assert found.scores["loss"] == pytest.approx(sum(sums) / 5, rel=1e-6)
    assert found.scores["perplexity"] == pytest.approx(math.exp(sum(sums) / 5), rel=1e-5)
    assert right == [False, False, True, False, False]
    assert found.scores["token_accuracy"] == pytest.approx(1 / 5)
    model.lm_head.weight.data *= 1e6
    lost = evaluate_answers_given(model, [collate([*rows])], alone, num_rows=2)
    assert lost.scores["loss"] > 710 > math.log(lost.scores["perplexity"])  # e^710 is past the largest float


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
