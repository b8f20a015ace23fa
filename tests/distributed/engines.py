"""Builds one tiny model under each engine through accelerate, the way a user's script would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers import BertConfig, BertForSequenceClassification

MICRO_BATCH = 2
VOCABULARY, LENGTH, CLASSES = 53, 7, 3


@dataclass(frozen=True)
class EngineCase:
    """One engine: a ZeRO stage (None for DDP), a precision, and what else its DeepSpeed config says."""

    stage: int | None
    precision: str
    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)

    def deepspeed_config(self, accumulation: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "zero_force_ds_cpu_optimizer": False,
            **({"bf16": {"enabled": True}} if self.precision == "bf16" else {}),
            **self.top,
        }


CPU = {"device": "cpu", "pin_memory": False}
ENGINES = {
    "ddp fp32": EngineCase(None, "fp32"),
    "ddp bf16": EngineCase(None, "bf16"),
    "zero0 fp32": EngineCase(0, "fp32"),
    "zero0 bf16": EngineCase(0, "bf16"),
    "zero1 fp32": EngineCase(1, "fp32"),
    "zero1 bf16": EngineCase(1, "bf16"),
    "zero1 bf16, fp32 accumulation": EngineCase(1, "bf16", top={"data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2 fp32": EngineCase(2, "fp32"),
    "zero2 bf16": EngineCase(2, "bf16"),
    # No clipping here: the order of the sum in the gradient norm would differ from the plain order's.
    "zero2 bf16, round robin": EngineCase(
        2, "bf16", {"round_robin_gradients": True}, {"gradient_clipping": 0.0}
    ),
    "zero2 bf16, optimizer offload": EngineCase(2, "bf16", {"offload_optimizer": CPU}),
    "zero3 fp32": EngineCase(3, "fp32"),
    "zero3 bf16": EngineCase(3, "bf16"),
    "zero3 bf16, nothing resident, small sub-groups": EngineCase(
        3, "bf16", {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    ),
    "zero3 bf16, some resident": EngineCase(3, "bf16", {"stage3_param_persistence_threshold": 100}),
    "zero3 bf16, optimizer and parameter offload": EngineCase(
        3, "bf16", {"offload_optimizer": CPU, "offload_param": CPU}
    ),
}


def tiny_bert(seed: int = 0, *, dropout: float = 0.1) -> BertForSequenceClassification:
    """A BERT of odd sizes, with one frozen table and parameters smaller than two ranks share evenly."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=17,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=CLASSES,
        )
    )
    model.bert.embeddings.token_type_embeddings.weight.requires_grad_(False)
    return model


def adamw(model) -> torch.optim.AdamW:
    """Two parameter groups, as every recipe has them."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    )


def prepared(case: EngineCase, *, accumulation: int = 1, model=None, build_optimizer=None):
    """(accelerator, model, optimizer) under the engine, asserted to be what was asked for."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    plugin = None
    if case.stage is not None:
        plugin = DeepSpeedPlugin(hf_ds_config=case.deepspeed_config(accumulation))
    accelerator = Accelerator(
        mixed_precision="bf16" if case.precision == "bf16" else "no",
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        cpu=case.stage is None,
    )
    model = tiny_bert() if model is None else model
    optimizer = (build_optimizer or adamw)(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    expected = DistributedType.MULTI_CPU if case.stage is None else DistributedType.DEEPSPEED
    assert accelerator.distributed_type == expected, accelerator.distributed_type
    assert accelerator.num_processes == torch.distributed.get_world_size()
    if case.stage is not None:
        assert model.zero_optimization_stage() == case.stage
    return accelerator, model, optimizer


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    """The same batch for the same step and rank, whatever the engine."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (MICRO_BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(MICRO_BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, CLASSES, (MICRO_BATCH,), generator=generator),
    }


def full_masters(case: EngineCase, model, optimizer) -> dict[str, torch.Tensor]:
    """Every trainable parameter's whole fp32 master on every rank, by a way that swaft does not use."""
    module = model.module
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if case.stage is None or (case.stage == 0 and case.precision == "fp32"):
        return {name: p.detach().clone() for name, p in names.items()}
    if case.stage == 0:
        wrapper = optimizer.optimizer
        masters = {
            id(p): m
            for weights, group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for p, m in zip(weights, group, strict=True)
        }
        return {name: masters[id(p)].detach().clone() for name, p in names.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in names.items()}
