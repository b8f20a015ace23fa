"""Runs on every rank: weight averaging under each engine, against means taken in one process."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from engines import ENGINES, EngineCase, batch, full_masters, prepared, tiny_bert
from harness import worker_main
from transformers import AutoModelForSequenceClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.averaging.export import gather_state_dict
from swaft.averaging.host import HostAverage
from swaft.averaging.layout import Fragment, merge
from swaft.errors import AveragingError, LayoutError

STEPS, START = 6, 2
COLLECTIVES = [
    *("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_single"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter_tensor"),
    *("all_to_all", "barrier", "send", "recv", "isend", "irecv", "scatter"),
]


def _count(calls: list[str], name: str, original, *args, **kwargs):
    calls.append(name)
    return original(*args, **kwargs)


def train(case: EngineCase, *, averaged: bool, swap_at: int | None = None, on_step=None, accumulation=1):
    """Train the tiny model; (model, optimizer, averager or None)."""
    accelerator, model, optimizer = prepared(case, accumulation=accumulation)
    rule = swaft.SWA(start=START)
    averager = None
    if averaged:
        averager = swaft.WeightAverager(model, optimizer, rule=rule, total_steps=STEPS)
    torch.manual_seed(7 + dist.get_rank())
    model.train()
    for step in range(STEPS * accumulation):
        with accelerator.accumulate(model):
            loss = model(**batch(step, dist.get_rank())).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if averager:
            averager.step()
        if on_step:
            on_step(step, model, optimizer)
        if averager and step == swap_at:
            state = torch.get_rng_state()
            with averager.swapped_in():
                logits(model)
            model.train()
            torch.set_rng_state(state)
    return model, optimizer, averager


def logits(model) -> torch.Tensor:
    """Evaluation logits on a fixed batch."""
    model.eval()
    with torch.no_grad():
        return model(**batch(0, 0)).logits.float()


def load_plainly(folder: Path):
    """The folder as a script without DeepSpeed opens it: transformers must forget that stage 3 is on."""
    unset_hf_deepspeed_config()
    return AutoModelForSequenceClassification.from_pretrained(folder)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def engine_case(case: EngineCase):
    """All checks under one engine, on two trainings of the same run: with and without an averager."""
    live, recorded = {}, []

    def record(step, model, optimizer):
        # The public accessor, which is the oracle here, returns other parameters' values under round robin,
        # so there the oracle is the run with the plain order, which takes the same steps.
        recorded.append(full_masters(case, model, optimizer))

    round_robin = case.zero.get("round_robin_gradients", False)
    oracle_case = EngineCase(2, case.precision, top=case.top) if round_robin else case
    train(oracle_case, averaged=False, on_step=record)
    live["plain"] = recorded[-1]
    model, _, averager = train(case, averaged=True, swap_at=4)
    engine = averager.engine

    def the_average_has_the_bits_of_the_single_process_mean():
        members = recorded[START - 1 :]
        assert averager.num_averaged == len(members) == averager.total_members
        whole = gather_state_dict(engine, averager.shard())
        if dist.get_rank() != 0:
            return
        for name, member in members[0].items():
            mean = HostAverage(merge([Fragment(name, 0, member.numel(), 0, 0)]), chunk_numel=11)
            for n, masters in enumerate(members):
                mean.add([masters[name].view(-1)], 1 / (n + 1))
            assert same_bits(whole[name].view(-1), mean.mean), name

    def training_with_averager_and_swap_ends_in_the_bits_of_training_without():
        whole = gather_state_dict(engine, engine.live_shard())
        if dist.get_rank() == 0:
            for name, weight in live["plain"].items():
                assert same_bits(whole[name], weight), name
        assert engine.working_is_cast()

    def every_rank_owns_a_fair_part_and_no_more():
        numels = engine.ranks.gather(engine.numel)
        total = sum(engine.full_shape(p).numel() for p in engine.trainable.values())
        assert sum(numels) == total
        slack = len(engine.trainable) + 4  # ZeRO-3 rounds every parameter up, the flat engines the group
        assert max(numels) <= math.ceil(total / 2) + slack, numels
        assert averager.shard().numel() == engine.numel

    def a_swap_gives_the_outputs_of_a_plain_model_holding_the_average():
        message = [gather_state_dict(engine, averager.shard())]
        dist.broadcast_object_list(message, src=0)
        plain = tiny_bert()
        plain.load_state_dict(message[0])
        if case.stage is not None and case.precision == "bf16":
            plain.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.stage is None and case.precision == "bf16"):
            expected = logits(plain)
        before = logits(model)
        with averager.swapped_in():
            during = logits(model)
        assert torch.equal(during, expected), (during - expected).abs().max()
        assert not torch.equal(before, during)
        assert torch.equal(logits(model), before)

    def an_exception_inside_a_swap_leaves_the_live_weights():
        before = logits(model)
        try:
            with averager.swapped_in():
                raise RuntimeError("evaluation broke")
        except RuntimeError as error:
            assert str(error) == "evaluation broke"
        assert torch.equal(logits(model), before)
        assert not engine.swap.active

    def a_folder_written_inside_a_swap_holds_the_live_weights():
        with shared_folder() as folder:
            with averager.swapped_in():
                with contextlib.suppress(AveragingError):
                    model.state_dict()
                    raise AssertionError("the average was handed out as the model's state")
                swaft.averaging.save_pretrained(engine, folder / "live")
            if dist.get_rank() == 0:
                loaded = load_plainly(folder / "live").state_dict()
                for name, weight in live["plain"].items():
                    assert same_bits(loaded[name], weight), name

    def the_exported_average_loads_in_plain_transformers_bit_for_bit():
        whole = gather_state_dict(engine, averager.shard())
        with shared_folder() as folder:
            averager.save_pretrained(folder / "average")
            if dist.get_rank() == 0:
                loaded = load_plainly(folder / "average")
                assert loaded.dtype == torch.float32
                assert loaded.state_dict().keys() == whole.keys()
                for name, weight in loaded.state_dict().items():
                    assert same_bits(weight, whole[name]), name
            try:
                averager.save_pretrained(folder / "average")
            except AveragingError as error:
                assert "holds files already" in str(error)
            else:
                raise AssertionError("an existing folder was overwritten")

    def an_averaging_event_is_one_message_and_no_gather():
        calls = []
        with contextlib.ExitStack() as patched:
            for name in COLLECTIVES:
                if hasattr(dist, name):
                    counted = functools.partial(_count, calls, name, getattr(dist, name))
                    patched.enter_context(mock.patch.object(dist, name, counted))
            averager._take_in()
        assert calls == ["all_reduce"], calls

    def a_layout_that_misses_elements_is_refused_on_every_rank():
        intact = engine.fragments
        engine.fragments = intact[1:]
        try:
            engine.prove_layout()
        except LayoutError as error:
            assert "expected every element exactly once" in str(error)
        else:
            raise AssertionError("a layout that misses a fragment was accepted")
        finally:
            engine.fragments = intact

    def a_master_that_is_not_where_it_should_be_is_refused_on_every_rank():
        if engine.masters_are_working():
            return  # one storage: there is nothing to misplace
        target = engine.masters()[engine.fragments[0].buffer]
        saved = target.clone()
        try:
            if dist.get_rank() == 1:
                target.copy_(target.roll(1))
            engine.prove_layout()
        except LayoutError as error:
            assert "is not the cast of the master" in str(error)
        else:
            raise AssertionError("a rolled master was accepted")
        finally:
            target.copy_(saved)

    checks = [
        the_average_has_the_bits_of_the_single_process_mean,
        training_with_averager_and_swap_ends_in_the_bits_of_training_without,
        every_rank_owns_a_fair_part_and_no_more,
        a_swap_gives_the_outputs_of_a_plain_model_holding_the_average,
        an_exception_inside_a_swap_leaves_the_live_weights,
        a_folder_written_inside_a_swap_holds_the_live_weights,
        the_exported_average_loads_in_plain_transformers_bit_for_bit,
        an_averaging_event_is_one_message_and_no_gather,
        a_layout_that_misses_elements_is_refused_on_every_rank,
        a_master_that_is_not_where_it_should_be_is_refused_on_every_rank,
    ]
    for check in checks:
        yield check.__name__, check


class shared_folder:
    """A temporary folder that all ranks agree on."""

    def __enter__(self) -> Path:
        message = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(message, src=0)
        return Path(message[0])

    def __exit__(self, *_: object) -> None:
        dist.barrier()


def counting_case():
    """Steps are counted when they happened: neither micro-batches nor skipped steps."""
    for name in ("ddp fp32", "zero0 bf16", "zero2 bf16", "zero3 fp32"):

        def accumulation(name=name):
            _, _, averager = train(ENGINES[name], averaged=True, accumulation=2)
            assert averager.applied_steps == STEPS
            assert averager.num_averaged == STEPS - START + 1

        yield f"{name}, two micro-batches a step", accumulation

    for name in ("zero0 bf16", "zero1 bf16", "zero2 bf16", "zero3 bf16"):

        def skipped(name=name):
            accelerator, model, optimizer = prepared(ENGINES[name])
            averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=9)
            for step in range(4):
                loss = model(**batch(step, dist.get_rank())).loss
                accelerator.backward(loss * (torch.nan if step == 1 else 1.0))
                optimizer.step()
                averager.step()
            assert averager.applied_steps == 3, averager.applied_steps
            assert averager.num_averaged == 4

        yield f"{name}, one skipped step", skipped


def refusal_case():
    """Modes whose masters are not what they say are refused before training, on every rank."""

    def autocast_fp16():
        case = EngineCase(2, "fp32", top={"torch_autocast": {"enabled": True, "dtype": "float16"}})
        _, model, optimizer = prepared(case)
        try:
            swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=9)
        except AveragingError as error:
            assert "torch_autocast" in str(error)
        else:
            raise AssertionError("fp16 torch_autocast was accepted")

    def bare_model():
        model = tiny_bert()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        try:
            swaft.WeightAverager(model, optimizer, rule=swaft.SWA(), total_steps=9)
        except AveragingError as error:
            assert "accelerator.prepare" in str(error)
        else:
            raise AssertionError("a bare model on two ranks was accepted")

    yield "a bare model on two ranks", bare_model
    yield "torch_autocast in fp16", autocast_fp16  # last: it leaves autocast state behind in the process


if __name__ == "__main__":
    cases = {name: (lambda case=case: engine_case(case)) for name, case in ENGINES.items()}
    worker_main(cases | {"counting": counting_case, "refused": refusal_case})
