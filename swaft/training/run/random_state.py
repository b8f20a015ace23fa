"""All of a process's random generators as tensors, so that a run that goes on draws what it would have drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

DEVICE = "random.device"
REST = "random"
"""Name of the text beside the tensors: what of Python's and numpy's generators is no vector."""


def capture_random(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take the state of Python's, numpy's and torch's generators, the device's included.

    Args:
        device: that the process trains on.

    Returns:
        Tensors by name, 1-dim (torch's state uint8, the others' words int64), and text beside them.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.python": torch.tensor(words, dtype=torch.int64),
        "random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if device.type != "cpu":
        tensors[DEVICE] = torch.get_device_module(device).get_rng_state(device)
    rest = {"python": [version, gauss], "numpy": [name, position, has_gauss, cached]}
    return tensors, {REST: json.dumps(rest)}


def restore_random(tensors: Mapping[str, Tensor], text: Mapping[str, str], device: torch.device) -> None:
    """Put every generator back to where :func:`capture_random` found it."""
    rest = json.loads(text[REST])
    version, gauss = rest["python"]
    name, position, has_gauss, cached = rest["numpy"]
    random.setstate((version, tuple(tensors["random.python"].tolist()), gauss))
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["random.torch"])
    if DEVICE in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[DEVICE], device)
