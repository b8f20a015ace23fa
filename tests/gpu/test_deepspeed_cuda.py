"""DeepSpeed on one GPU: fp16 with its loss scale, DeepSpeed's own optimizers, offload in part."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin
from models import MICRO_BATCH, adamw, batch, tiny_bert

import swaft
from swaft.averaging.arithmetic import reference_mean
from swaft.errors import UnsupportedEngineError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

STEPS, OVERFLOW_AT = 24, 12
CPU = {"device": "cpu", "pin_memory": True}
CASES = {
    **{
        f"zero{stage} {precision}": (stage, precision, "torch", {})
        for stage in (0, 1, 2, 3)
        for precision in ("fp16", "bf16")
    },
    "zero0 bf16, fused Adam": (0, "bf16", "FusedAdam", {}),
    "zero2 bf16, fused Adam": (2, "bf16", "FusedAdam", {}),
    "zero2 bf16, Adam on the host": (2, "bf16", "DeepSpeedCPUAdam", {"offload_optimizer": CPU}),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process that is a world of one."""
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }.items():
        monkeypatch.setenv(name, value)


def build(case: str):
    """(accelerator, engine, optimizer) on the device."""
    pytest.importorskip("deepspeed")
    stage, precision, kind, zero = CASES[case]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, **zero},
        precision: {"enabled": True},
    }
    accelerator = Accelerator(
        mixed_precision=precision, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)
    )
    model = tiny_bert()
    if kind == "torch":
        optimizer = adamw(model)
    else:
        compiler = pytest.importorskip("torch.utils.cpp_extension", exc_type=ImportError)  # by setuptools
        if kind == "FusedAdam" and compiler.CUDA_HOME is None:
            pytest.skip("FusedAdam is compiled when it is first used, and there is no CUDA toolkit here")
        from deepspeed.ops import adam

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = getattr(adam, kind)(trained, lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert model.zero_optimization_stage() == stage
    return accelerator, model, optimizer


def on_device(step: int) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in batch(step, 0).items()}


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model(**on_device(0)).logits.float()
    model.train()
    return found


@pytest.mark.parametrize("case", CASES)
def test_masters_are_averaged_bit_for_bit_and_skipped_steps_are_not(case):
    accelerator, model, optimizer = build(case)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=STEPS)
    recorded: dict[int, torch.Tensor] = {}
    for step in range(STEPS):
        loss = model(**on_device(step)).loss
        accelerator.backward(loss * (torch.inf if step == OVERFLOW_AT else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        averager.step()
        recorded[averager.applied_steps] = averager.engine.read(averager.engine.masters())
    assert averager.applied_steps < STEPS, "the step that overflowed was counted"
    members = [recorded[step] for step in sorted(recorded) if step >= 1]
    expected = reference_mean(members, [1 / (n + 1) for n in range(len(members))])
    assert torch.equal(averager.shard(), expected)

    before = logits(model)
    with averager.swapped_in():
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_half_of_adam_on_the_host_is_refused_for_its_other_half_is_stepped_past_the_hooks(monkeypatch):
    half = {"offload_optimizer": CPU | {"ratio": 0.5}, "sub_group_size": 500}
    monkeypatch.setitem(CASES, "half", (3, "bf16", "DeepSpeedCPUAdam", half))
    _, model, optimizer = build("half")
    with pytest.raises(UnsupportedEngineError, match=r"offload_optimizer\.ratio < 1"):
        swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=STEPS)
