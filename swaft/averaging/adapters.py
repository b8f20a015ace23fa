"""How peft wraps a model, and what an adapter folder holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from swaft.averaging.buffers import copy_with, persistent_buffers
from swaft.averaging.layout import clean_name
from swaft.errors import AveragingError

PROMPT = "prompt_embeddings"
"""Stands for a prompt among the names of tensors."""
GENERATION = "generation_config.json"
"""File with the tokens and settings that a model generates with."""


def is_peft(module: nn.Module) -> bool:
    """Whether peft wraps the model."""
    # Looked up by name, so that a run without peft never imports it.
    return any(cls.__name__ == "PeftModel" for cls in type(module).__mro__)


def folder_of(adapter: str, folder: Path) -> Path:
    """Where peft keeps an adapter inside a saved folder."""
    return folder if adapter == "default" else folder / adapter


def merged_layers(module: nn.Module) -> list[Any]:
    """The layers whose weights have adapters merged into them."""
    return [part for part in module.modules() if getattr(part, "merged_adapters", None)]


def how_to_open(module: Any, folder: Path) -> list[str]:
    """How to open a written adapter folder with what peft does not read from it: lines of Markdown.

    Args:
        module: the `PeftModel`; if its base is a classifier, the lines hold the class names, which are in no file.
        folder: where `AdapterFolder` wrote it.
    """
    base, lines = module.get_base_model(), list[str]()
    name = type(base).__name__
    if name.endswith("Classification"):
        keys = ("num_labels", "id2label", "problem_type")
        given = ", ".join(f"{key}={value!r}" for key in keys if (value := getattr(base.config, key, None)))
        known = re.search("For(Sequence|Token)Classification$", name)
        opener = f"AutoPeftModel{known[0] if known else ''}"
        lines += ["", "The class names are in no other file. Open the folder with them:", "", "```python"]
        lines += [f"from peft import {opener}", ""]
        lines += [f"model = {opener}.from_pretrained({folder.name!r}, {given})", "```"]
    if (folder / GENERATION).exists():
        lines += ["", f"peft does not read `{GENERATION}`. Once the model is loaded:", "", "```python"]
        lines += ["from transformers import GenerationConfig", ""]
        read = f"GenerationConfig.from_pretrained({folder.name!r})"
        lines += [f"model.get_base_model().generation_config = {read}", "```"]
    return lines


class AdapterFolder:
    """The adapter folder that peft would write, with tensors from elsewhere.

    Peft picks what it saves from a state dict, by name, so it is given a state dict of empty marks. What it picks
    is recognised by identity; anything that is not a mark would have come from the live model. What peft computes
    from a prompt encoder (prompt tuning, prefix tuning and their relatives) is computed by a copy of that encoder
    instead.

    Args:
        module: the `PeftModel`.

    Raises:
        AveragingError: peft takes some of the tensors from the live model.
    """

    def __init__(self, module: nn.Module):
        from peft import get_peft_model_state_dict

        self._module: Any = module
        # OFT also has buffers that are not persistent, under names that peft picks.
        tensors = (
            *module.named_parameters(remove_duplicate=False),
            *persistent_buffers(module, aliases=True),
        )
        self._marks = {name: torch.empty(0) for name, _ in tensors}
        self._prompt = torch.empty(0)
        names = {id(mark): clean_name(name) for name, mark in self._marks.items()}
        names[id(self._prompt)] = PROMPT
        self._picked: dict[str, dict[str, str]] = {}
        for adapter, config in self._module.peft_config.items():
            with self._marked_prompts():
                picked = get_peft_model_state_dict(module, state_dict=self._marks, adapter_name=adapter)
            for key, value in picked.items():
                if id(value) not in names:
                    raise AveragingError(
                        f"peft takes {key!r} of adapter {adapter!r} ({type(config).__name__}) from the live model, "
                        "so the folder would not hold the averaged weights; expected a method whose weights "
                        "peft finds by name, such as LoRA"
                    )
            self._picked[adapter] = {clean_name(key): names[id(value)] for key, value in picked.items()}

    @property
    def names(self) -> set[str]:
        """Clean names of the tensors that go into the folder, or from which its content is computed."""
        picked = {name for names in self._picked.values() for name in names.values()}
        encoders = tuple(f"prompt_encoder.{adapter}." for adapter in self._picked)
        return picked - {PROMPT} | {clean_name(name) for name in self._marks if name.startswith(encoders)}

    def write(self, folder: Path, state_dict: dict[str, Tensor]) -> None:
        """Write configuration, peft's model card, the tensors of every adapter, and how the model generates.

        Peft itself leaves `generation_config.json` out. There is no `config.json`: transformers would take the
        folder for a whole model.

        Args:
            folder: folder to write; every adapter but `default` gets a folder inside it.
            state_dict: whole tensors by clean name, parametrizations folded; at least :attr:`names`.
        """
        with self._marked_prompts():
            self._module.save_pretrained(folder, state_dict=self._marks)
        for adapter, picked in self._picked.items():
            tensors = {
                _plain(key): self._prompt_of(adapter, state_dict)
                if name == PROMPT
                else state_dict[_plain(name)].clone()
                for key, name in picked.items()
            }
            save_file(
                tensors, folder_of(adapter, folder) / "adapter_model.safetensors", metadata={"format": "pt"}
            )
        generation = getattr(self._module.get_base_model(), "generation_config", None)
        if generation is not None:
            # Its own `save_pretrained` refuses some settings that do no harm, and the weights would be lost.
            generation.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])

    @contextmanager
    def _marked_prompts(self) -> Iterator[None]:
        """Inside, peft gets a mark for a prompt and runs no encoder: a sharded one would wait for other ranks."""
        self._module.get_prompt_embedding_to_save = lambda adapter: self._prompt
        try:
            yield
        finally:
            del self._module.get_prompt_embedding_to_save

    @torch.no_grad()
    def _prompt_of(self, adapter: str, state_dict: dict[str, Tensor]) -> Tensor:
        """What peft would save for a prompt encoder that holds these tensors."""
        encoder = self._module.prompt_encoder[adapter]
        holder = SimpleNamespace(
            prompt_encoder={adapter: copy_with(encoder, f"prompt_encoder.{adapter}.", state_dict)},
            prompt_tokens=self._module.prompt_tokens,
            peft_config=self._module.peft_config,
        )
        return type(self._module).get_prompt_embedding_to_save(holder, adapter).clone()


def _plain(name: str) -> str:
    """The name of the tensor that a part of a parametrization belongs to; other names unchanged."""
    return re.sub(r"\bparametrizations\.([^.]+)\..*", r"\1", name)
