"""Runs on every rank: what must hold under every engine, for every model, against means taken in one process."""

from __future__ import annotations

import math
from unittest import mock

import torch
import torch.distributed as dist
from engines import ENGINES, EngineCase, full_masters, gather_state_dict
from harness import worker_main
from models import MODELS, ModelCase
from run_on_ranks import (
    MEMBERS,
    STEPS,
    TOTAL_STEPS,
    counted_collectives,
    logits,
    mean_in_one_process,
    raised_on_every_rank,
    same_bits,
    shared_folder,
    train,
)
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.averaging.adapters import is_peft
from swaft.averaging.shards import outside
from swaft.errors import AveragingError, LayoutError


def engine_case(case: EngineCase, model_case: ModelCase):
    """All checks under one engine, on two trainings of the same run: with and without an averager."""
    recorded: list[dict[str, Tensor]] = []

    def record(step, model, optimizer):
        # The public accessor, which is the oracle here, returns other parameters' values under round robin,
        # so there the oracle is the run with the plain order, which takes the same steps.
        recorded.append(full_masters(oracle_case, model, optimizer))

    round_robin = case.zero.get("round_robin_gradients", False)
    oracle_case = EngineCase(2, case.precision, top=case.top) if round_robin else case
    train(oracle_case, model_case, averaged=False, on_step=record)
    live = recorded[-1]
    accelerator, model, optimizer, averager = train(case, model_case, averaged=True, swap_at=4)
    assert averager is not None
    engine = averager.engine
    a_batch = model_case.batch(0, 0)

    def the_average_has_the_bits_of_the_single_process_mean():
        members = [recorded[step - 1] for step in MEMBERS]
        assert averager.num_averaged == len(members)
        whole, drift = gather_state_dict(engine, averager.shard()), averager.drift()
        if dist.get_rank() == 0:
            apart = 0.0
            for name, last in live.items():
                mean = mean_in_one_process([member[name] for member in members])
                assert same_bits(whole[name].view(-1), mean), name
                apart += (mean.double() - last.view(-1).double()).square().sum().item()
            assert math.isclose(drift, math.sqrt(apart), rel_tol=1e-12), (drift, apart)

    def training_with_averager_and_swap_ends_in_the_bits_of_training_without():
        whole = gather_state_dict(engine, engine.live_shard())
        if dist.get_rank() == 0:
            for name, weight in live.items():
                assert same_bits(whole[name], weight), name
        assert engine.misplaced() is None

    def attaching_without_updating_changes_nothing():
        logits(model, a_batch)
        before = _everything(model, optimizer, engine)
        late = swaft.WeightAverager(
            model, optimizer, rule=swaft.SWA(start=TOTAL_STEPS - 1), total_steps=TOTAL_STEPS
        )
        assert late.applied_steps == STEPS  # of DeepSpeed's engine, or of the optimizer's state
        after = _everything(model, optimizer, engine)
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        raised_on_every_rank(AveragingError, "nothing is averaged yet", late.swapped_in().__enter__)

    def every_rank_owns_a_fair_part_and_no_more():
        numels = engine.ranks.gather(engine.numel)
        shapes = [engine.full_shape(p) for p in engine.trainable.values()]
        total = sum(shape.numel() for shape in shapes)
        assert sum(numels) == total == sum(weight.numel() for weight in live.values())
        # ZeRO-3 rounds every parameter up, FSDP2 to whole rows, the flat engines their groups.
        slack = 4 + sum(shape.numel() // shape[0] if engine.name == "fsdp2" else 1 for shape in shapes)
        assert max(numels) <= math.ceil(total / dist.get_world_size()) + slack, numels
        assert averager.shard().numel() == engine.numel

    def a_swap_gives_the_outputs_of_a_plain_model_holding_the_average():
        message = [gather_state_dict(engine, averager.shard())]
        dist.broadcast_object_list(message, src=0)
        plain = model_case.build()
        plain.load_state_dict(message[0])
        sharded_cast = case.stage is not None or case.fsdp is not None
        if sharded_cast and case.precision == "bf16":
            plain.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=not sharded_cast and case.precision == "bf16"):
            expected = logits(plain, a_batch)
        before = logits(model, a_batch)
        for _ in range(2):
            with averager.swapped_in():
                during = logits(model, a_batch)
            assert torch.equal(during, expected), (during - expected).abs().max()
            assert not torch.equal(before, during)
            assert torch.equal(logits(model, a_batch), before)

    def a_swap_inside_a_swap_is_refused_and_the_outer_one_survives():
        with averager.swapped_in():
            during = logits(model, a_batch)
            raised_on_every_rank(AveragingError, "swapped in already", averager.swapped_in().__enter__)
            assert torch.equal(logits(model, a_batch), during)

    def an_exception_inside_a_swap_leaves_the_live_weights():
        before = logits(model, a_batch)
        try:
            with averager.swapped_in():
                logits(model, a_batch)
                raise RuntimeError("evaluation broke")
        except RuntimeError as error:
            assert str(error) == "evaluation broke"
        assert torch.equal(logits(model, a_batch), before)
        assert not engine.swap.active

    def a_folder_written_inside_a_swap_holds_the_live_weights():
        with shared_folder() as folder:
            with averager.swapped_in():
                logits(model, a_batch)
                swaft.averaging.save_pretrained(engine, folder / "live")
            if dist.get_rank() == 0:
                unset_hf_deepspeed_config()
                loaded = model_case.load(folder / "live")
                for name, weight in live.items():
                    assert same_bits(loaded[name], weight), name

    def what_hands_out_or_replaces_weights_is_refused_inside_a_swap():
        part = next(part for part in engine.module.modules() if [*part.parameters(recurse=False)])
        with shared_folder() as folder:
            calls = [
                *(engine.module.state_dict, part.state_dict, lambda: part.load_state_dict({}, strict=False)),
                lambda: accelerator.get_state_dict(model),
                lambda: accelerator.save_model(model, str(folder)),
            ]
            if accelerator._models:
                calls += [lambda: accelerator.save_state(str(folder))]
            if case.stage is not None:
                calls += [
                    lambda name=name: getattr(model, name)(str(folder))
                    for name in ("save_checkpoint", "load_checkpoint", "save_16bit_model")
                ]
            elif case.fsdp is None and case.precision == "fp32":  # of the others there is no pickle anyway
                calls += [lambda: torch.save(model, folder / f"{dist.get_rank()}.pt")]
            with averager.swapped_in():
                during = logits(model, a_batch)
                for i, call in enumerate(calls):
                    print(f"call {i} of {len(calls)}", flush=True)
                    raised_on_every_rank(AveragingError, "while averaged weights are swapped in", call)
                assert torch.equal(logits(model, a_batch), during)
        accelerator.get_state_dict(model)

    def weights_written_on_one_rank_inside_a_swap_are_an_error_on_all():
        before = logits(model, a_batch)

        def write():
            with averager.swapped_in():
                if dist.get_rank() == dist.get_world_size() - 1:
                    engine.spans[0].of(engine.working()).detach().add_(1)

        raised_on_every_rank(AveragingError, "what was written is lost", write)
        assert torch.equal(logits(model, a_batch), before)

    def the_exported_average_loads_without_an_engine_bit_for_bit():
        whole = gather_state_dict(engine, averager.shard())
        with shared_folder() as folder:
            averager.save_pretrained(folder / "average")
            if dist.get_rank() == 0:
                unset_hf_deepspeed_config()
                loaded = model_case.load(folder / "average")
                if model_case.all_in_folder:
                    assert loaded.keys() == whole.keys()
                for name in loaded if model_case.all_in_folder else live:
                    assert same_bits(loaded[name], whole[name]), name
            dist.barrier()
            raised_on_every_rank(
                AveragingError, "holds files already", lambda: averager.save_pretrained(folder / "average")
            )

    def a_blend_lies_on_the_line_through_the_last_weights_and_the_average():
        last, average = engine.live_shard().double(), averager.shard().double()
        shard = averager.shard(swaft.Readout(blend=0.3))
        rounding = 2.0**-23 * (last.abs() + average.abs())
        assert ((shard.double() - (last + 0.3 * (average - last))).abs() <= rounding).all()
        whole = gather_state_dict(engine, shard)
        before = logits(model, a_batch)
        with averager.swapped_in():
            averaged = logits(model, a_batch)
        for blend, expected in ((0.0, before), (1.0, averaged)):
            with averager.swapped_in(blend=blend):
                assert torch.equal(logits(model, a_batch), expected)
        with shared_folder() as folder:
            with averager.swapped_in(blend=0.3):
                assert not torch.equal(logits(model, a_batch), averaged)
                averager.save_pretrained(folder / "blend", blend=0.3)
            if dist.get_rank() == 0:
                unset_hf_deepspeed_config()
                loaded = model_case.load(folder / "blend")
                assert all(same_bits(loaded[name], whole[name]) for name in live)
        assert torch.equal(logits(model, a_batch), before)

    def a_scope_leaves_the_same_weights_after_a_forward():
        scope = "no_head" if is_peft(engine.module) else "no_embeddings"
        engine.release_gathered()
        before = outside(engine, scope)
        logits(model, a_batch)
        assert outside(engine, scope) == before

    def an_averaging_event_is_one_message_and_an_ordinary_step_none():
        message = ["all_reduce"] if dist.get_world_size() > 1 else []
        for step, expected in ((STEPS + 1, []), (STEPS + 2, message)):
            with mock.patch.object(engine, "applied_steps", return_value=step), counted_collectives() as seen:
                averager.step()
                averager.shard()  # returns once the event is over
            assert seen == expected, (step, seen)

    def publishing_takes_the_collectives_it_says():
        with counted_collectives() as seen:
            engine.release_gathered()
            engine.publish()
        assert len(seen) == _collectives_of_publishing(engine, model), seen

    def a_layout_that_misses_elements_is_refused_on_every_rank():
        intact = engine.fragments
        engine.fragments = intact[1:]
        try:
            raised_on_every_rank(LayoutError, "expected every element exactly once", engine.prove_layout)
        finally:
            engine.fragments = intact

    def a_master_that_is_not_where_it_should_be_is_refused_on_every_rank():
        last = dist.get_world_size() - 1
        target = engine.masters()[engine.fragments[0].buffer]
        saved = target.clone()
        try:
            if dist.get_rank() == last:
                target.copy_(target.roll(1))
            raised_on_every_rank(LayoutError, "is not the cast of the master", engine.prove_layout)
        finally:
            target.copy_(saved)

    checks = [
        the_average_has_the_bits_of_the_single_process_mean,
        training_with_averager_and_swap_ends_in_the_bits_of_training_without,
        attaching_without_updating_changes_nothing,
        every_rank_owns_a_fair_part_and_no_more,
        a_swap_gives_the_outputs_of_a_plain_model_holding_the_average,
        a_swap_inside_a_swap_is_refused_and_the_outer_one_survives,
        an_exception_inside_a_swap_leaves_the_live_weights,
        a_folder_written_inside_a_swap_holds_the_live_weights,
        what_hands_out_or_replaces_weights_is_refused_inside_a_swap,
        weights_written_on_one_rank_inside_a_swap_are_an_error_on_all,
        the_exported_average_loads_without_an_engine_bit_for_bit,
        a_blend_lies_on_the_line_through_the_last_weights_and_the_average,
        a_scope_leaves_the_same_weights_after_a_forward,
        publishing_takes_the_collectives_it_says,
        a_layout_that_misses_elements_is_refused_on_every_rank,
    ]
    if not engine.masters_are_working():  # in one storage there is nothing to misplace
        checks.append(a_master_that_is_not_where_it_should_be_is_refused_on_every_rank)
    checks.append(an_averaging_event_is_one_message_and_an_ordinary_step_none)  # last: it adds a member
    for check in checks:
        yield check.__name__, check


def _everything(model, optimizer, engine) -> list[Tensor]:
    """The bits of all that training depends on, as copies."""
    inner = engine.inner_optimizer
    state = [value for of_one in inner.state.values() for value in of_one.values() if torch.is_tensor(value)]
    held = [p for group in inner.param_groups for p in group["params"]]
    tensors = [*engine.masters(), *engine.working(), *engine.module.buffers(), *state, *held]
    local = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in tensors]
    rates = torch.tensor([group["lr"] for group in optimizer.param_groups])
    return [
        tensor.cpu().clone().contiguous().view(-1).view(torch.uint8)
        for tensor in [torch.get_rng_state(), rates, *local]
    ]


def _collectives_of_publishing(engine, model) -> int:
    """One broadcast a replica, one gather a flat group or a resident parameter, none where forwards gather."""
    engine_name = engine.name
    if engine_name == "fsdp2":
        mesh = next(iter(engine.trainable.values())).device_mesh
        return mesh.size(0) if mesh.ndim == 2 and mesh.size(0) > 1 else 0
    if dist.get_world_size() == 1:
        return 0
    if engine_name in ("ddp", "deepspeed-zero0"):
        return dist.get_world_size()
    if engine_name == "deepspeed-zero3":
        return len(model.optimizer.persistent_parameters)
    return len(model.optimizer.optimizer.param_groups)


def all_cases() -> dict:
    """Every engine with every model, by name."""
    return {
        f"{engine} / {model}": lambda case=ENGINES[engine], model_case=MODELS[model]: engine_case(
            case, model_case
        )
        for engine in ENGINES
        for model in MODELS
    }


if __name__ == "__main__":
    worker_main(all_cases())
