"""Runs on every rank: noise objectives under each engine, against one process that sees all batches."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from averaging_worker import load_plainly, logits, shared_folder
from engines import ENGINES, EngineCase, batch, full_masters, prepared, tiny_bert
from harness import worker_main

import swaft

STEPS, ACCUMULATION, LEARNING_RATE = 3, 2, 0.5
UNCLIPPED = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
FP32 = {
    "ddp": EngineCase(None, "fp32"),
    **{f"zero{stage}": EngineCase(stage, "fp32", top=UNCLIPPED) for stage in range(4)},
}
BF16 = ["ddp bf16", "zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16"]


def r3f() -> swaft.R3F:
    """Noise large enough to leave its mark on the weights: as large as the embeddings themselves."""
    return swaft.R3F(weight=20.0, preset="relative", sigma=1.0, seed=5)


def sgd(model) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train_on_ranks(case: EngineCase, objective) -> tuple:
    """(model, optimizer, losses) after a few steps, two micro-batches each, on every rank's own batches."""
    accelerator, model, optimizer = prepared(
        case, accumulation=ACCUMULATION, model=tiny_bert(dropout=0.0), build_optimizer=sgd
    )
    model.train()
    losses = []
    for micro_step in range(STEPS * ACCUMULATION):
        with accelerator.accumulate(model):
            out = objective(model, batch(micro_step, dist.get_rank()))
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


def train_in_one_process() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The same steps by a plain loop: gradients averaged over the batches of both ranks by hand."""
    model = tiny_bert(dropout=0.0).train()
    optimizer = sgd(model)
    objectives = [r3f() for _ in range(dist.get_world_size())]
    losses = []
    for micro_step in range(STEPS * ACCUMULATION):
        for rank, objective in enumerate(objectives):
            with acting_as(rank):
                out = objective(model, batch(micro_step, rank))
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


def fp32_case():
    start = {name: p.detach().clone() for name, p in tiny_bert(dropout=0.0).named_parameters()}
    expected, expected_losses = train_in_one_process()
    for name, case in FP32.items():

        def check(case=case):
            model, optimizer, losses = train_on_ranks(case, r3f())
            masters = full_masters(case, model, optimizer)
            error = relative_distance(masters, expected, start)
            print(f"{error:.2e} of the way apart", flush=True)
            assert error <= 1e-5, f"weights are {error:.2e} of the way apart"
            torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)

        yield f"{name} trains to the weights of one process", check

    def control():
        model, optimizer, _ = train_on_ranks(FP32["zero3"], swaft.TaskLoss())
        masters = full_masters(FP32["zero3"], model, optimizer)
        apart = relative_distance(masters, expected, start)
        assert apart > 1e-3, f"only {apart:.2e} of the way apart"

    yield "without noise the weights differ, so the comparison can fail", control


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
    worker_main({"fp32": fp32_case, "bf16": bf16_case, "r4f": r4f_case})
