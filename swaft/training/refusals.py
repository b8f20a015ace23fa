"""What every run refuses before it starts, whatever its task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from swaft.errors import ConfigError
from swaft.training.pretrained import AnyModel, model_path

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""The files of which a model's folder has one."""
ADAPTER = "adapter_config.json"
"""In the folder of an adapter, which names the model that it belongs to."""


def refuse_compilation(environ: Mapping[str, str]) -> None:
    """Refuse a launch that has accelerate compile the model.

    Args:
        environ: what the launcher left, or would leave.

    Raises:
        ConfigError: as said.
    """
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if backend != "NO":
        raise ConfigError(
            f"the launcher asks for dynamo_backend {backend}, and the recipes do not compile: hooks and borrowed "
            "heads would break the graph at every step; remove dynamo_config from the accelerate configuration "
            "(and --dynamo_backend from the line)"
        )


def require_weights(model: AnyModel, model_config: object) -> None:
    """Refuse a folder without weights; whether the hub has some is seen when they are fetched.

    Args:
        model: section ``model``, which names a pretrained one.
        model_config: its transformers configuration.

    Raises:
        ConfigError: as said.
    """
    folder = Path(model_path(model))
    named = getattr(model_config, "transformers_weights", None)
    expected = (*WEIGHTS, ADAPTER) if named is None else (named,)
    if folder.is_dir() and not any((folder / name).is_file() for name in expected):
        raise ConfigError(
            f"model.model_name_or_path: {model.model_name_or_path} has a configuration and no weights; expected "
            f"{' or '.join((named,) if named else (SAFE_WEIGHTS_NAME, WEIGHTS_NAME))} in that folder"
        )
