"""Runs on every rank: noise objectives under each engine, against one process that sees all batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engines import ENGINES, EngineCase, full_masters, prepared
from harness import worker_main
from models import batch, language_batch, tiny_bart, tiny_bert, tiny_gpt2, tiny_t5, translation_batch
from run_on_ranks import load_plainly, logits, raised_on_every_rank, shared_folder
from torch.nn.parallel import DistributedDataParallel

import swaft
from swaft.errors import NoiseError

STEPS, ACCUMULATION, LEARNING_RATE = 3, 2, 0.5
UNCLIPPED = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
FP32 = {
    "ddp": EngineCase(None, "fp32"),
    **{f"zero{stage}": EngineCase(stage, "fp32", top=UNCLIPPED) for stage in range(4)},
}
BF16 = ["ddp bf16", "zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16"]


@dataclass(frozen=True)
class Trained:
    """A model without dropout, and what it trains on."""

    name: str
    build_anew: Callable[..., Any]
    batch: Callable[[int, int], dict[str, torch.Tensor]]
    checkpointed: bool = False

    def build(self) -> Any:
        model = self.build_anew(dropout=0.0)
        if self.checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def start(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.build().named_parameters()}


BERT = Trained("bert", tiny_bert, batch)
T5 = Trained("t5", tiny_t5, translation_batch)
CHECKPOINTED_T5 = Trained("t5", tiny_t5, translation_batch, checkpointed=True)
BART = Trained("bart", tiny_bart, translation_batch)
GPT2 = Trained("gpt2", tiny_gpt2, language_batch)


def r3f(**options) -> swaft.R3F:
    """Noise large enough to leave its mark on the weights: as large as the embeddings themselves."""
    return swaft.R3F(weight=20.0, preset="relative", sigma=1.0, seed=5, **options)


def sgd(model) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train_on_ranks(case: EngineCase, objective, trained: Trained) -> tuple:
    """(model, optimizer, losses) after a few steps, two micro-batches each, on every rank's own batches."""
    accelerator, model, optimizer = prepared(
        case, accumulation=ACCUMULATION, model=trained.build(), build_optimizer=sgd
    )
    model.train()
    losses = []
    for micro_step in range(STEPS * ACCUMULATION):
        with accelerator.accumulate(model):
            if case.fsdp is not None:  # what accelerate does for a model that it has sharded itself
                model.set_requires_gradient_sync(accelerator.sync_gradients)
            out = objective(model, trained.batch(micro_step, dist.get_rank()))
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(out.loss.detach())
    return model, optimizer, losses


@contextmanager
def acting_as(rank: int):
    """Draw the noise that this rank would draw."""
    with mock.patch("swaft.noise.objectives.current_rank", return_value=rank):
        yield


def train_in_one_process(
    build_objective, trained: Trained
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The same steps by a plain loop: gradients averaged over the batches of both ranks by hand."""
    model = trained.build().train()
    optimizer = sgd(model)
    objectives = [build_objective() for _ in range(dist.get_world_size())]
    losses = []
    for micro_step in range(STEPS * ACCUMULATION):
        for rank, objective in enumerate(objectives):
            with acting_as(rank):
                out = objective(model, trained.batch(micro_step, rank))
            (out.loss / (ACCUMULATION * len(objectives))).backward()
            if rank == dist.get_rank():
                losses.append(out.loss.detach())
        if (micro_step + 1) % ACCUMULATION == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, losses


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], start) -> float:
    """||a - b|| over the distance that training went."""
    apart = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    gone = sum(float((b[name] - start[name]).double().square().sum()) for name in b)
    return (apart / gone) ** 0.5


def hold_to_one_process(case: EngineCase, build_objective, trained: Trained, expected, losses) -> None:
    """Train on the ranks, and compare with what one process got."""
    model, optimizer, found_losses = train_on_ranks(case, build_objective(), trained)
    error = relative_distance(full_masters(case, model, optimizer), expected, trained.start())
    print(f"{error:.2e} of the way apart", flush=True)
    assert error <= 1e-5, f"weights are {error:.2e} of the way apart"
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=0)


def fp32_case():
    expected, losses = train_in_one_process(r3f, BERT)
    for name, case in FP32.items():
        yield (
            f"{name} trains to the weights of one process",
            partial(hold_to_one_process, case, r3f, BERT, expected, losses),
        )

    def control():
        model, optimizer, _ = train_on_ranks(FP32["zero3"], swaft.TaskLoss(), BERT)
        masters = full_masters(FP32["zero3"], model, optimizer)
        apart = relative_distance(masters, expected, BERT.start())
        assert apart > 1e-3, f"only {apart:.2e} of the way apart"

    yield "without noise the weights differ, so the comparison can fail", control

    def buffers_sent():
        sent = mock.patch.object(DistributedDataParallel, "_sync_buffers", autospec=True)
        with sent as calls:  # torch before 2.13 refuses the backward of a pass whose buffers were sent again
            train_on_ranks(FP32["ddp"], r3f(), BERT)
        assert calls.call_count == STEPS, calls.call_count

    yield "DDP sends the buffers once a step, not between the two passes", buffers_sent

    def backward_without_the_engine():
        _, model, _ = prepared(FP32["zero2"], model=BERT.build(), build_optimizer=sgd)
        model.train()
        out = r3f()(model, batch(0, dist.get_rank()))
        raised_on_every_rank(NoiseError, "expected engine.backward", out.loss.backward)

    yield "a backward pass that DeepSpeed's engine does not run is refused", backward_without_the_engine


def fused_case():
    """The loss computed inside the head, where sharded engines have the weight for a moment only."""
    one_sided = partial(r3f, detach="noised")
    # Small weights stay whole under ZeRO-3 unless it is told otherwise.
    partitioned = {"stage3_param_persistence_threshold": 0}
    engines = FP32 | {
        "zero3": EngineCase(3, "fp32", partitioned, UNCLIPPED),
        "fsdp2": EngineCase(None, "fp32", fsdp={}),
        "fsdp2, root resharded": EngineCase(None, "fp32", fsdp={"reshard_after_forward": True}),
    }
    for trained, names in (
        (T5, ("ddp", "zero2", "zero3", "fsdp2")),
        (BART, ("zero2", "zero3")),
        (GPT2, ("zero3", "fsdp2, root resharded")),
    ):
        expected, losses = train_in_one_process(r3f, trained)
        for name in names:
            yield (
                f"{trained.name} under {name} trains to the weights of one process",
                partial(hold_to_one_process, engines[name], r3f, trained, expected, losses),
            )
    for title, build_objective, trained, names in (
        ("one-sided", one_sided, T5, ("ddp", "zero3", "fsdp2")),
        ("doubled", partial(r3f, passes="doubled"), T5, ("zero3",)),
        ("checkpointed", r3f, CHECKPOINTED_T5, ("zero3",)),
    ):
        expected, losses = train_in_one_process(build_objective, trained)
        for name in names:
            yield (
                f"{title} {trained.name} under {name} trains to the weights of one process",
                partial(hold_to_one_process, engines[name], build_objective, trained, expected, losses),
            )

    for name in ("zero3 bf16, nothing resident, small sub-groups", "fsdp2 bf16"):

        def sixteen_bit(name=name):
            for trained in (T5, BART):
                accelerator, model, optimizer = prepared(ENGINES[name], model=trained.build())
                model.train()
                objective, losses = r3f(), []
                for step in range(3):
                    out = objective(model, trained.batch(step, dist.get_rank()))
                    accelerator.backward(out.loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    assert out.logits is None
                    losses.append(float(out.task_loss))
                assert all(0 < loss < 10 for loss in losses), losses

        yield f"{name} trains", sixteen_bit


def bf16_case():
    for name in BF16:

        def check(name=name):
            accelerator, model, optimizer = prepared(ENGINES[name])
            objective = r3f()
            averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=3)
            model.train()
            for step in range(3):
                out = objective(model, batch(step, dist.get_rank()))
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
                averager.step()
                assert out.loss.isfinite()
                assert 0.3 < float(out.noise_to_signal) < 1.5, out.noise_to_signal
                assert float(out.changed) > 0.9
            assert averager.applied_steps == 3

        yield name, check


def r4f_case():
    for name in ("ddp fp32", "zero2 fp32", "zero3 fp32", "zero3 bf16"):

        def check(name=name):
            objective = swaft.R4F(weight=1.0, preset="relative", sigma=0.1)
            model = tiny_bert()
            objective.prepare_model(model)
            accelerator, model, optimizer = prepared(ENGINES[name], model=model)
            averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=1), total_steps=3)
            model.train()
            for step in range(3):
                accelerator.backward(objective(model, batch(step, dist.get_rank())).loss)
                optimizer.step()
                optimizer.zero_grad()
                averager.step()
            with averager.swapped_in():
                averaged_logits = logits(model)
            with shared_folder() as folder:
                averager.save_pretrained(folder / "average")
                if dist.get_rank() == 0:
                    plain = load_plainly(folder / "average")
                    assert "classifier.weight" in plain.state_dict()
                    tolerance = 2e-2 if "bf16" in name else 1e-6
                    torch.testing.assert_close(logits(plain), averaged_logits, rtol=0, atol=tolerance)

        yield f"{name}: the exported average scores as the swapped-in one", check


if __name__ == "__main__":
    worker_main({"fp32": fp32_case, "fused": fused_case, "bf16": bf16_case, "r4f": r4f_case})
