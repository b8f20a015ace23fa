"""A row's logits do not depend on its batch, for every type of model of transformers that the recipes train."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from every_type import tiny_config
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    BertConfig,
    EncoderDecoderConfig,
    LEDConfig,
    PreTrainedTokenizerFast,
)

from swaft.errors import ConfigError
from swaft.noise.inputs import task_logits
from swaft.training.data.texts import Collator
from swaft.training.models.classes import READ_THEIR_END, require_end_token
from swaft.training.models.special_tokens import (
    COUNT_FROM_PADDING,
    MIX_PADDING_IN,
    follow_tokenizer,
    one_length,
    whole_windows,
)

pytestmark = pytest.mark.unit

LENGTHS, MAX_LENGTH = (90, 6, 37, 11), 128  # the longest first, for what BigBird does ever after a short one
SAMPLE = {"bert", "roberta", "xlnet", "llama", "gpt2", "bart", "fnet", "big_bird"}
NOT_BUILT = {"layoutlmv2"}  # wants detectron2
NO_ATTENTION_WITHOUT_GPU = {"mra"}  # its kernel's stand-in gives zeros
KINDS = {kind.model_type: kind for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}
MOVED_WITH_PADDING = COUNT_FROM_PADDING - {"mpnet"}  # which counts from 1, whatever its configuration says
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


def build(config: Any, heads: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING) -> Any:
    """A model in which every token can be felt."""
    torch.manual_seed(0)
    model = heads[type(config)](config).eval()
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
    return (max(gaps) / (alone - alone.mean(0)).abs().max().clamp(min=1e-2)).item()


@every_type
def test_a_rows_logits_do_not_depend_on_its_batch(name):
    made = tokenizer()
    texts = [" ".join(f"w{(7 * i + n) % 59}" for i in range(n - 2)) for n in LENGTHS]
    rows = [dict(made(text, return_token_type_ids=False)) for text in texts]
    settings = config(name)
    for wrong in (None, -1, 0):
        for part in (settings, settings.get_text_config()):
            with suppress(StrictDataclassError):  # some refuse None
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
        assert moved == (name in MOVED_WITH_PADDING)
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


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.model_type, marks=() if kind.model_type == "xlnet" else pytest.mark.slow)
        for kind in MODEL_FOR_QUESTION_ANSWERING_MAPPING
        if kind.model_type not in NOT_BUILT | {"lxmert"}  # answers about pictures
    ],
)
def test_the_logits_of_the_tokens_to_point_at_do_not_depend_on_the_batch(kind):
    made = tokenizer()
    settings = tiny_config(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, sep_token_id=2)
    follow_tokenizer(settings, made)
    model = build(settings, MODEL_FOR_QUESTION_ANSWERING_MAPPING)
    pad = Collator(made, one_length(settings, MAX_LENGTH))
    rows = [{"input_ids": [1, 7, 2, 2, *((9 * i + n) % 50 + 8 for i in range(n)), 2]} for n in LENGTHS]

    def pointed(rows: list[Any]) -> list[torch.Tensor]:
        batch = pad(rows)
        with torch.no_grad():
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        kept = batch["attention_mask"].bool()
        return [row[:, mask] for row, mask in zip(task_logits(out), kept, strict=True)]

    alone = [pointed([row])[0] for row in rows]
    for count in (2, 3, 4):
        for together, logits in zip(pointed(rows[:count]), alone, strict=False):
            assert (together - logits).abs().max() < 1e-4 * logits.std().clamp(min=1e-2)


WRITERS = {
    *(
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "encoder-decoder",
        "led",
        "longt5",
        "m2m_100",
    ),
    *("marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "seamless_m4t"),
    *("seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5"),
}
WRITERS_SAMPLE = {"bigbird_pegasus", "encoder-decoder", "m2m_100"}


def writer_config(name: str, pad: int) -> Any:
    ids = {"pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2}
    if name != "encoder-decoder":
        kinds = {kind.model_type: kind for kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING}
        return tiny_config(kinds[name], **ids)
    decoder = tiny_config(BertConfig, is_decoder=True, add_cross_attention=True, **ids)
    ids["decoder_start_token_id"] = 1
    return EncoderDecoderConfig.from_encoder_decoder_configs(tiny_config(BertConfig, **ids), decoder, **ids)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in WRITERS_SAMPLE else pytest.mark.slow)
        for name in sorted(WRITERS)
    ],
)
def test_the_logits_of_a_text_to_write_do_not_depend_on_its_batch(name):
    made, settings = tokenizer(), writer_config(name, pad=0)
    follow_tokenizer(settings, made)
    model = build(settings, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    words = [" ".join(f"w{(7 * i + n) % 59}" for i in range(n - 2)) for n in LENGTHS]
    targets = [made(text).input_ids[: 4 + 3 * row] for row, text in enumerate(reversed(words))]
    rows = [
        dict(made(text, return_token_type_ids=False), labels=target)
        for text, target in zip(words, targets, strict=True)
    ]
    collate = Collator(made, one_length(settings, MAX_LENGTH, generates=True))

    def written(rows: list[Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**collate(rows)).logits

    alone = [written([row])[0] for row in rows]
    for count in (2, 3, 4):
        for together, logits in zip(written(rows[:count]), alone, strict=False):
            assert (together[: len(logits)] - logits).abs().max() < 1e-4 * logits.std()
    # Positions that are counted from padding stay where they were.
    other = build(writer_config(name, pad=5), MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    other.load_state_dict(model.state_dict(), strict=False)
    source, target = torch.tensor([[1, *range(10, 40), 2]]), torch.tensor([[1, *range(20, 30)]])
    with torch.no_grad():
        one, two = (each(input_ids=source, decoder_input_ids=target).logits for each in (model, other))
    assert ((one - two).abs().max() > 1e-5) == (name in MOVED_WITH_PADDING)


@pytest.mark.parametrize(
    ("entries", "length"),
    [({"axial_pos_shape": (8, 16)}, 128), ({"axial_pos_embds": False, "attn_layers": ["local", "lsh"]}, 56)],
)
def test_a_reformer_names_the_one_length_it_trains_on(entries, length):
    chunks = {"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 14}
    settings = config("reformer", **chunks, **entries)
    assert one_length(settings, length) == length
    with pytest.raises(ConfigError, match=rf"expected data\.max_seq_length={length}"):
        one_length(settings, 50)


def test_batches_for_a_led_are_of_whole_windows():
    settings, made = tiny_config(LEDConfig, attention_window=[8, 16]), tokenizer()
    assert whole_windows(settings) == 16
    assert whole_windows(config("longformer")) is None
    rows = [{**made("w1 " * length), "labels": [5], "idx": 0} for length in (3, 15)]
    batch = Collator(made, None, whole_windows(settings))(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 32)
    assert batch["attention_mask"].sum(1).tolist() == [5, 17]
