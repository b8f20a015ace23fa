"""Every type of model trains under noise and averaging on rows of all lengths, or is refused in words.

Refused is: by a launch before it trains, and by `swaft validate` with the same words. The slow tests go over all
types of transformers, and a table of them is printed where the tests end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from every_type import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedTokenizerFast,
)

from swaft.errors import ConfigError, SwaftError
from swaft.training.checks import ROUTE_AMONG_MODULES, keep_all_layers
from swaft.training.config import load_config
from swaft.training.launch.ddp import allow_unused_weights
from swaft.training.launch.failure import message_of
from swaft.training.models.checks import NOT_FROM_TEXT
from swaft.training.models.pretrained import GROWING, longest_input
from swaft.training.models.special_tokens import COUNT_FROM_PADDING
from swaft.training.planning.preflight import check_run

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("fresh_accelerate")]

ROOT = Path(__file__).parents[2]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = [f"w{number}" for number in range(60)]
IDS = {
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "decoder_start_token_id": 2,
}
LENGTHS = (5, 8, 13, 30, 37, 3, 20, 41, 16, 9, 33, 6)  # of texts, in words
MAPPINGS = {
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "question_answering": MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
LONGEST = {
    "classification": ("data.max_seq_length=48",),
    "question_answering": ("data.max_seq_length=48", "data.doc_stride=8"),
    "seq2seq": ("data.max_source_length=48", "data.max_target_length=24", "eval.max_new_tokens=4"),
}
OF_TYPE = {
    "fsmt": {"src_vocab_size": 64, "tgt_vocab_size": 64},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "reformer": {"axial_pos_shape": (6, 8), "axial_pos_embds_dim": (16, 16), "max_position_embeddings": 48},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}
REFUSED_WITH_NOISE = {
    "canine",
    "ibert",
    "perceiver",
    "reformer",
}  # no table to disturb, or masks not to be shared
NEED_A_PACKAGE = {"layoutlmv2"}  # detectron2
SAMPLE = {
    ("classification", "longformer"),
    ("classification", "funnel"),
    ("classification", "llama"),
    ("question_answering", "led"),
    ("question_answering", "lxmert"),
    ("question_answering", "reformer"),
    ("seq2seq", "bigbird_pegasus"),
    ("seq2seq", "qwen2_audio"),
}
TYPES = {
    (recipe, kind.model_type): (kind, mapping[kind])
    for recipe, mapping in MAPPINGS.items()
    for kind in mapping
    if kind.model_type not in NEED_A_PACKAGE
}


def is_refused(recipe: str, name: str) -> bool:
    """Whether models of a type are no matter for a recipe, whatever their settings."""
    return name in NOT_FROM_TEXT or (recipe == "seq2seq" and not TYPES[recipe, name][0]().is_encoder_decoder)


def of_types(keys: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    some = [pytest.param(*key, marks=() if key in SAMPLE else pytest.mark.slow) for key in sorted(keys)]
    return pytest.mark.parametrize(("recipe", "name"), some)


READ_TEXT = [key for key in TYPES if not is_refused(*key)]
new_type = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "led" else pytest.mark.slow)
        for recipe, name in sorted(TYPES)
        if recipe == "seq2seq" and TYPES[recipe, name][0]().is_encoder_decoder
    ],
)


def text(words: int, first: int) -> str:
    return " ".join(WORDS[(first + 7 * word) % len(WORDS)] for word in range(words))


def answer(number: int) -> dict[str, Any]:
    return {"text": [text(1, number)], "answer_start": [0]}


ROWS = {
    "classification": [{"text": text(n, i), "label": i % 2} for i, n in enumerate(LENGTHS)],
    "question_answering": [
        {"id": str(i), "question": "w3 w4", "context": text(n, i), "answers": answer(i)}
        for i, n in enumerate(LENGTHS)
    ],
    "seq2seq": [{"source": text(n, i), "target": text(2 + n // 3, i)} for i, n in enumerate(LENGTHS)],
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with rows for each recipe, and a tokenizer of few tokens."""
    folder = tmp_path_factory.mktemp("every-type")
    for recipe, rows in ROWS.items():
        (folder / f"{recipe}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder / "tokenizer")
    return folder


def tiny(recipe: str, name: str) -> Any:
    """The configuration of a model of a few thousand weights."""
    config = tiny_config(TYPES[recipe, name][0], **IDS | OF_TYPE.get(name, {}))
    if name == "encoder-decoder":
        config.decoder.is_decoder = config.decoder.add_cross_attention = True
    return config


def save_model(recipe: str, name: str, folder: Path) -> None:
    """A random model; no weights of one that is refused for its type alone."""
    kind, made = TYPES[recipe, name]
    if recipe == "seq2seq" and not kind().is_encoder_decoder:
        kind().save_pretrained(folder)
        (folder / "model.safetensors").touch()
        return
    torch.manual_seed(0)
    made(tiny(recipe, name)).base_model.save_pretrained(folder)  # without the head of the task


def launch(recipe: ModuleType, settings: list[str], reopen: type) -> list[str]:
    """What is wrong with a run, in swaft's words; nothing of one that came to its end and left a whole model."""
    config = load_config(recipe.Config, settings)
    try:
        recipe.train(config)
    except ConfigError as error:
        return error.problems
    except SwaftError as error:
        return [message_of(error)]
    summary = json.loads((Path(config.train.output_dir) / "summary.json").read_text())
    scores = summary["scores"]["validation"]
    assert all(math.isfinite(scores[weights]["loss"]) for weights in ("last", "averaged"))
    read = reopen.from_pretrained(Path(config.train.output_dir) / "final-averaged", output_loading_info=True)[
        1
    ]
    assert not any(read[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return []


def try_both_ways(recipe: str, name: str, module: ModuleType, settings: list[str], output: Path) -> list[str]:
    """Validate and launch a run with noise, and without where it is refused; returns what became of each."""
    outcomes = []
    for noise in ("r3f", "none"):
        given = [*settings, f"noise.kind={noise}", f"train.output_dir={output / noise}"]
        given += ["noise.sigma=0.01"] if noise == "r3f" else []
        words = ["--config_file", str(ROOT / "launch/accelerate/single.yaml"), str(module.__file__)]
        listed = check_run([*words, *given]).problems
        refused = launch(module, given, TYPES[recipe, name][1])
        assert listed == refused or (refused and set(refused) <= set(listed))
        outcomes.append(f"refused: {' '.join(refused)}".replace(f"{output}/", "") if refused else "trained")
        assert bool(refused) == (is_refused(recipe, name) or (noise == "r3f" and name in REFUSED_WITH_NOISE))
        if not refused:
            break
    return outcomes


def common(recipe: str, texts: Path) -> list[str]:
    rows = texts / f"{recipe}.jsonl"
    return [
        *(f"data.train_file={rows}", f"data.validation_file={rows}", *LONGEST[recipe]),
        *("train.per_device_train_batch_size=2", "train.max_steps=6", "train.warmup_steps=0"),
        *("train.save_steps=null", "train.disable_tqdm=true", "averaging.rule=swa", "averaging.start=1"),
    ]


@of_types(TYPES)
def test_a_type_trains_or_is_refused_by_validate_and_a_launch_alike(
    recipe, name, texts, tmp_path, request, record_property
):
    save_model(recipe, name, tmp_path / "model")
    model = [f"model.model_name_or_path={tmp_path / 'model'}", f"model.tokenizer_name={texts / 'tokenizer'}"]
    module = request.getfixturevalue(recipe)
    outcomes = try_both_ways(recipe, name, module, [*model, *common(recipe, texts)], tmp_path)
    record_property("type", [recipe, name, *outcomes])


def without(entries: dict[str, Any], *names: str) -> dict[str, Any]:
    """The entries of a configuration and its parts, but for some."""
    parts = {
        key: without(value, *names) if isinstance(value, dict) else value for key, value in entries.items()
    }
    return {key: value for key, value in parts.items() if key not in names}


@new_type
def test_a_new_model_of_a_type_trains_or_is_refused_alike(name, texts, tmp_path, seq2seq, record_property):
    entries = tiny("seq2seq", name).to_diff_dict() | {"model_type": name}
    config = without(entries, *IDS, "vocab_size", "decoder_vocab_size", "transformers_version")
    (tmp_path / "new.yaml").write_text(json.dumps({"model": {"config": config, "vocab_size": 300}}))
    settings = ["--config", str(tmp_path / "new.yaml"), *common("seq2seq", texts)]
    outcomes = try_both_ways("seq2seq", name, seq2seq, settings, tmp_path)
    record_property("type", ["seq2seq", f"{name} (new)", *outcomes])


@of_types(READ_TEXT)
def test_a_type_takes_as_many_tokens_as_it_is_said_to_take_and_no_more_from_padding_on(recipe, name):
    config = tiny(recipe, name)
    model = TYPES[recipe, name][1](config).eval()
    source, target = (min(longest_input(config, None, decoder=decoder), 200) for decoder in (False, True))
    with torch.no_grad():
        model(**batch(recipe, config, source, target))
        if name in COUNT_FROM_PADDING - GROWING:
            with pytest.raises((IndexError, RuntimeError)):
                model(**batch(recipe, config, source + 1, target))


@of_types(key for key in READ_TEXT if key[1] not in ROUTE_AMONG_MODULES)  # which several ranks refuse
def test_a_type_with_weights_that_text_leaves_unused_is_known_to_ddp(recipe, name):
    config = tiny(recipe, name)
    keep_all_layers(config, 2)
    model = TYPES[recipe, name][1](config).train()
    model(**batch(recipe, config, 48, 8)).loss.backward()
    unused = [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    accelerator = SimpleNamespace(ddp_handler=None)
    allow_unused_weights(accelerator, model)  # type: ignore[arg-type]
    assert accelerator.ddp_handler is not None or not unused


def batch(recipe: str, config: Any, source: int, target: int) -> dict[str, torch.Tensor]:
    """Two rows without padding, of so many tokens."""
    ids = torch.full((2, source), 7)
    ids[:, 2:5] = config.sep_token_id  # Longformer wants three of them, and BART an end
    labels = {
        "classification": {"labels": torch.tensor([0, 1])},
        "question_answering": dict.fromkeys(("start_positions", "end_positions"), torch.tensor([0, 9])),
        "seq2seq": {"labels": torch.full((2, target), 7)},
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels[recipe]}
