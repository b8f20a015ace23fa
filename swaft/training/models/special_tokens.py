"""Makes a model's special tokens follow the tokenizer's; row lengths at which padding does not change logits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from swaft.errors import ConfigError

logger = logging.getLogger(__name__)


KINDS = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")

COUNT_FROM_PADDING = frozenset(
    {
        *("camembert", "data2vec-text", "esm", "fsmt", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
        *("m2m_100", "markuplm", "mpnet", "nllb-moe", "prophetnet", "roberta", "roberta-prelayernorm"),
        *("seamless_m4t", "seamless_m4t_v2", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    }
)
"""Types of models whose positions start after the padding id: with another id they would use other positions
than they were trained with."""
MIX_PADDING_IN = frozenset(
    {
        *("canine", "convbert", "fnet", "funnel", "mobilebert", "mra", "nystromformer", "reformer"),
        *("t5gemma", "t5gemma2", "yoso"),
    }
)
"""Types whose logits for a row change with the amount of padding, whatever the attention mask says: they
convolve, hash, pool or transform over it, or read the answer one token further on."""


def follow_tokenizer(model_config: Any, tokenizer: Any) -> None:
    """Set a model's special tokens to the tokenizer's, and the tokenizer's padding side to one the model can take.

    Absolute positions, and heads that read the first token, need padding on the right. Decoders read the last token
    that is not padding, so right padding works for them too. XLNet reads the very last token.

    Args:
        model_config: transformers configuration; its token ids, and those of its parts, become the tokenizer's.
            Tokens that the tokenizer lacks are left unchanged.
        tokenizer: its padding side is set.
    """
    for kind in KINDS:
        write_token(model_config, kind, getattr(tokenizer, f"{kind}_token_id", None))
    tokenizer.padding_side = "left" if getattr(model_config, "summary_type", None) == "last" else "right"


def write_token(model_config: Any, kind: str, token_id: int | None) -> None:
    """Write the id of a special token into a configuration and those of its parts that have such a token.

    Every configuration has a padding token. One that counts its positions from the padding id keeps that id. The
    kind is one of `KINDS`; with None as the id nothing changes.
    """
    name = f"{kind}_token_id"
    for config in _parts(model_config):
        found = getattr(config, name, None)
        is_needed = config.model_type in COUNT_FROM_PADDING and isinstance(found, int) and found >= 0
        if token_id is None or (is_needed if kind == "pad" else not hasattr(config, name)):
            continue
        setattr(config, name, put_first(token_id, found))


def one_length(model_config: Any, max_length: int, *, generates: bool = False) -> int | None:
    """Return the length that every row has to be padded to so that its logits do not depend on its batch.

    Args:
        model_config: transformers configuration.
        max_length: tokens that rows are cut to.
        generates: whether the model generates texts, and rows are its sources.

    Returns:
        The length in tokens; None: a batch may be as long as its longest row.

    Raises:
        ConfigError: another length, for a model that reads rows of one length (a Nyströmformer with landmarks, a
            Reformer); too short a length, for one that shortens its rows inside (CANINE, Funnel).
    """
    kind, only, least = model_config.model_type, max_length, 1
    if kind == "nystromformer" and model_config.segment_means_seq_len != model_config.num_landmarks:
        only = model_config.segment_means_seq_len
    elif kind == "reformer":
        only = _reformer_length(model_config, max_length)
    elif kind == "canine":
        least = model_config.downsampling_rate
    elif kind == "funnel":  # each block but the first halves its row, and needs at least two tokens
        least = 2 ** (len(model_config.block_sizes) - 1) + 1
    if only != max_length:
        raise ConfigError(
            f"data.max_seq_length: this {kind} reads rows of {only} tokens and no others; "
            f"expected data.max_seq_length={only}"
        )
    if max_length < least:
        raise ConfigError(
            f"data.max_seq_length is {max_length}, but this {kind} shortens its rows inside, which takes at least "
            f"{least} tokens; expected data.max_seq_length={least} or more"
        )
    # BigBird switches to full attention at a short batch, and never back: all rows need the same blocks.
    sparse = getattr(model_config, "attention_type", None) == "block_sparse" and (
        max_length > (5 + 2 * model_config.num_random_blocks) * model_config.block_size
    )
    if not sparse and (generates or kind not in MIX_PADDING_IN):
        return None
    logger.info("every row is padded to %d tokens: padding changes the answers of a %s", max_length, kind)
    return max_length


def whole_windows(model_config: Any) -> int | None:
    """Return the number that has to divide the length of every batch; None: any length will do.

    LED itself pads to whole windows, and embeds the padding in a separate call. Ranks that each hold a shard
    of the embedding table have to make that call together, but their batches differ in length.
    """
    if model_config.model_type != "led":
        return None
    window = model_config.attention_window
    return max(window) if isinstance(window, list | tuple) else window


def _reformer_length(model_config: Any, max_length: int) -> int:
    """The length that a Reformer trains on: the product of its axes, or the next multiple of its chunks."""
    if model_config.axial_pos_embds:
        return math.prod(model_config.axial_pos_shape)
    kinds = set(model_config.attn_layers)
    chunk = math.lcm(*(getattr(model_config, f"{kind}_attn_chunk_length") for kind in kinds))
    return math.ceil(max_length / chunk) * chunk


def _parts(model_config: Any) -> Iterator[Any]:
    """Yield a configuration, and those inside it that have a vocabulary."""
    yield model_config
    for part in vars(model_config).values():
        if isinstance(part, PreTrainedConfig) and hasattr(part, "vocab_size"):
            yield from _parts(part)


def put_first(token_id: int, known: Any) -> Any:
    """Return the id, followed by the others if several were known: a text may end with one of many."""
    if not isinstance(known, list):
        return token_id
    return [token_id, *(other for other in known if other != token_id)]
