"""A row's logits do not depend on its batch, for every type of classifier that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_type import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedTokenizerFast

from swaft.data import Collator
from swaft.errors import ConfigError
from swaft.training.special_tokens import (
    COUNT_FROM_PADDING,
    MIX_PADDING_IN,
    READ_THEIR_END,
    follow_tokenizer,
    one_length,
    require_end_token,
)

pytestmark = pytest.mark.unit

LENGTHS, MAX_LENGTH = (6, 11, 37, 90), 100
SAMPLE = {"bert", "roberta", "xlnet", "llama", "gpt2", "bart", "fnet", "big_bird"}
NOT_BUILT = {"layoutlmv2"}  # wants detectron2
NO_ATTENTION_WITHOUT_GPU = {"mra"}  # its kernel's stand-in gives zeros
KINDS = {kind.model_type: kind for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}
every_type = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
        for name in sorted(KINDS.keys() - NOT_BUILT)
    ],
)


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(59))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", "padding_side": "left"}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, split_special_tokens=True, **names, **ends)


def config(name: str, **entries: Any) -> Any:
    ids = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    return tiny_config(KINDS[name], num_labels=3, **(ids | entries))


def build(config: Any) -> Any:
    """A model in which every token can be felt."""
    torch.manual_seed(0)
    model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def logits(model: Any, collate: Collator, rows: list[Any]) -> torch.Tensor:
    batch = collate(rows)
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def farthest(model: Any, collate: Collator, rows: list[Any]) -> float:
    """How far a row's logits are from those that it has alone, as a share of what is between rows."""
    alone = torch.cat([logits(model, collate, [row]) for row in rows])
    gaps = [(logits(model, collate, rows[:k]) - alone[:k]).abs().max() for k in range(2, len(rows) + 1)]
    return (max(gaps) / (alone - alone.mean(0)).abs().max().clamp(min=1e-30)).item()


@every_type
def test_a_rows_logits_do_not_depend_on_its_batch(name):
    made = tokenizer()
    texts = [" ".join(f"w{(7 * i + n) % 59}" for i in range(n - 2)) for n in LENGTHS]
    rows = [dict(made(text, return_token_type_ids=False)) for text in texts]
    settings = config(name)
    for wrong in (None, -1, 0):
        for part in (settings, settings.get_text_config()):
            part.pad_token_id = wrong
        follow_tokenizer(settings, made)
        kept = name in COUNT_FROM_PADDING and wrong == 0
        assert settings.get_text_config().pad_token_id == (0 if kept else made.pad_token_id)
    require_end_token(settings, made)
    model = build(settings)
    assert farthest(model, Collator(made, one_length(settings, MAX_LENGTH)), rows) < 1e-4
    if name in MIX_PADDING_IN - NO_ATTENTION_WITHOUT_GPU:
        assert farthest(model, Collator(made), rows) > 1e-4  # the table holds no type too many


@every_type
def test_the_types_that_look_for_end_tokens_or_count_from_padding_are_those_of_the_tables(name):
    one, other = build(config(name)), build(config(name, pad_token_id=5))
    other.load_state_dict(one.state_dict(), strict=False)
    row = torch.tensor([[1, *range(10, 40), 2]])
    with torch.no_grad():
        moved = (one(input_ids=row).logits - other(input_ids=row).logits).abs().max() > 1e-5
        assert moved == (name in COUNT_FROM_PADDING)
        unequal = torch.tensor([[1, 10, 2, 11, 2], [1, 10, 12, 11, 2]])
        if name in READ_THEIR_END:
            with pytest.raises((ValueError, TypeError)):
                one(input_ids=unequal)
        elif name not in MIX_PADDING_IN:
            one(input_ids=unequal)


ENDS = [{"eos_token": None}, {"eos_token": "w1"}, {"pad_token": "</s>"}, {"split_special_tokens": False}]


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_a_classifier_that_reads_its_end_token_needs_one_of_its_own_in_every_text(end):
    made = tokenizer()
    for name, value in end.items():
        setattr(made, name, value)
    with pytest.raises(ConfigError, match="reads its answer at the end-of-text token"):
        require_end_token(config("bart"), made)
    require_end_token(config("bert"), made)


def test_a_nystromformer_with_landmarks_names_the_one_length_it_reads():
    settings = config("nystromformer", num_landmarks=8, segment_means_seq_len=64)
    assert one_length(settings, 64) == 64
    with pytest.raises(ConfigError, match=r"expected data\.max_seq_length=64"):
        one_length(settings, 100)
