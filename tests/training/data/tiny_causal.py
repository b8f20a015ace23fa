"""A tokenizer of a few words with a chat template, and rows made with it."""

from __future__ import annotations

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from swaft.training.data.causal_lm import CausalDataConfig, find_columns, tokenize_rows

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
