"""Runs on every rank: what happens to averaging when training takes a turn that not every run takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
from engines import ENGINES, full_masters, gather_state_dict, prepared, unwrapped
from harness import worker_main
from models import MODELS, Normalised, tiny_gpt2, uneven
from run_on_ranks import logits, mean_in_one_process, raised_on_every_rank, same_bits, shared_folder
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import swaft
from swaft.averaging import attach_engine
from swaft.errors import AveragingError, LayoutError

LAYERED = ["ddp fp32", "zero2 bf16", "zero3 bf16", "fsdp2 fp32"]
"""One engine of each kind."""


def run(
    engine: str,
    micro_steps: Iterable[int] = range(4),
    *,
    model: nn.Module | None = None,
    accumulation: int = 1,
    bad: Collection[int] = (),
    change: Callable = lambda model: model,
    on_step: Callable = lambda *_: None,
):
    """Train on given micro-batches; (model, averager of every step's weights).

    Args:
        engine: name of an engine.
        micro_steps: which micro-batches, in order.
        model: what to train; by default the uneven one.
        accumulation: micro-batches a step.
        bad: micro-batches whose loss is not a number.
        change: what to do to the prepared model, before the averager is attached.
        on_step: called with (micro-batch, model, optimizer) after each.
    """
    model = uneven() if model is None else model
    accelerator, model, optimizer = prepared(ENGINES[engine], accumulation=accumulation, model=model)
    model = change(model)
    averager = swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=0), total_steps=99)
    for micro_step in micro_steps:
        torch.manual_seed(micro_step)
        with accelerator.accumulate(model):
            loss = model(**_batch(model, micro_step)).loss
            accelerator.backward(loss * (torch.nan if micro_step in bad else 1.0))
            optimizer.step()
            optimizer.zero_grad()
        averager.step()
        on_step(micro_step, model, optimizer)
    return model, averager


def _batch(model: nn.Module, micro_step: int) -> dict[str, Tensor]:
    generates = hasattr(unwrapped(model), "generate")
    return MODELS["tied" if generates else "uneven"].batch(micro_step, dist.get_rank())


def counting():
    """Steps are counted when they happened: neither micro-batches nor skipped steps."""
    accumulations = {"ddp fp32": 2, "zero0 bf16": 3, "zero2 bf16": 2, "zero3 fp32": 3, "fsdp2 bf16": 2}
    for engine, accumulation in accumulations.items():

        def micro_batches(engine=engine, accumulation=accumulation):
            _, averager = run(engine, range(4 * accumulation), accumulation=accumulation)
            assert averager.engine.applied_steps() == 4
            assert averager.num_averaged == 5

        yield f"{engine}, {accumulation} micro-batches a step", micro_batches

    def same_average(engine: str, with_bad: dict, without: list[int], accumulation: int, steps: int):
        _, one = run(engine, range(8), **with_bad, accumulation=accumulation)
        _, other = run(engine, without, accumulation=accumulation)
        assert one.engine.applied_steps() == other.engine.applied_steps() == steps
        assert one.num_averaged == other.num_averaged == steps + 1
        assert torch.equal(one.shard(), other.shard())

    skipping = [
        "zero0 bf16",
        "zero0 bf16, fused",
        "zero1 bf16",
        "zero1 bf16, fp32 accumulation",
        "zero2 bf16",
    ]
    for engine in [*skipping, "zero3 bf16", "zero3 fp32"]:

        def skipped(engine=engine):
            same_average(engine, {"bad": {1, 2, 5}}, [0, 3, 4, 6, 7], accumulation=1, steps=5)

        yield f"{engine}, steps skipped, two of them in a row", skipped

    def skipped_for_one_micro_batch():
        same_average("zero2 bf16", {"bad": {2, 5}}, [0, 1, 6, 7], accumulation=2, steps=2)

    yield "zero2 bf16, steps skipped for their first or their last micro-batch", skipped_for_one_micro_batch

    def state_filled_by_a_step():
        model, averager = run("fsdp2 fp32", ())
        optimizer = averager.engine.inner_optimizer
        get_state_dict(model, optimizer)  # a checkpoint of the start
        for step in range(2):
            model(**_batch(model, step)).loss.backward()
            optimizer.step()
            averager.step()
        assert averager.num_averaged == 3

    yield "fsdp2 fp32, a step by which torch fills the optimizer's state", state_filled_by_a_step


def offloaded_states():
    """DeepSpeed gives the masters other storage in between, with a member perhaps still being read."""
    for engine in ("zero1 bf16", "zero2 bf16", "zero3 bf16"):

        def moved(engine=engine):
            addresses = []

            def offload_and_reload(_, model, __):
                zero = model.optimizer
                by_group = (
                    "fp32_partitioned_groups_flat"
                    if engine.startswith("zero3")
                    else ("single_partition_of_fp32_groups")
                )
                master = getattr(zero, by_group)[0]
                before = master.data_ptr()
                model.offload_states()
                model.reload_states()
                addresses.append((before, master.data_ptr()))

            def all_trained() -> nn.Module:  # stage 3 fails to move the states of a model with frozen parts
                return uneven().requires_grad_(True)

            _, left_alone = run(engine, model=all_trained())
            # Stage 3 moves the states of DeepSpeed's fused Adam only, so torch's AdamW is taken for it.
            with mock.patch("deepspeed.ops.adam.fused_adam.FusedAdam", torch.optim.AdamW):
                _, averager = run(engine, model=all_trained(), on_step=offload_and_reload)
            assert any(before != after for before, after in addresses)
            assert torch.equal(averager.shard(), left_alone.shard())

        yield f"{engine}, states offloaded and reloaded after every step", moved

    def freed():
        _, model, optimizer = prepared(ENGINES["zero2 bf16"], model=uneven())
        engine = attach_engine(model, optimizer)
        assert engine.masters()
        storage = StorageWeakRef(model.optimizer.single_partition_of_fp32_groups[0].untyped_storage())
        model.offload_states()
        assert storage.expired()
        model.reload_states()
        assert engine.misplaced() is None

    yield "zero2 bf16, what DeepSpeed gives up is free", freed


def compiled_models():
    """A compiled model, or one with compiled parts, is averaged under the names it has uncompiled."""

    def compile_whole(model):
        if hasattr(model, "optimizer"):  # a DeepSpeed engine compiles what it wraps, in place
            model.compile(backend="eager")
            return model
        return torch.compile(model, backend="eager")

    def with_compiled_blocks() -> nn.Module:
        model = uneven()
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, backend="eager")  # type: ignore[assignment]
        return model

    for engine in LAYERED:
        # DeepSpeed's stage 3 itself fails on a compiled block.
        for part in ("the whole", "block by block")[: 1 if engine.startswith("zero3") else 2]:

            def compiled(engine=engine, part=part):
                _, eager = run(engine)
                whole = part == "the whole"
                model, averager = run(
                    engine,
                    model=None if whole else with_compiled_blocks(),
                    change=compile_whole if whole else lambda model: model,
                )
                assert averager.engine.state_names == eager.engine.state_names
                (average, live), (expected, eager_live) = (
                    [
                        gather_state_dict(each.engine, shard)
                        for shard in (each.shard(), each.engine.live_shard())
                    ]
                    for each in (averager, eager)
                )
                assert average.keys() == expected.keys()
                # torch 2.11 trains a model that was compiled whole to other weights under FSDP2 and stage 3.
                if all(same_bits(live[name], eager_live[name]) for name in live):
                    assert all(same_bits(average[name], expected[name]) for name in expected)
                before = _outputs(model)
                with averager.swapped_in():
                    assert not torch.equal(_outputs(model), before)
                assert torch.equal(_outputs(model), before)

            yield f"{engine}, {part}", compiled

    def a_compiled_layer():
        model = uneven()
        model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
        raised_on_every_rank(
            LayoutError, "that the model does not", lambda: run("zero3 bf16", [], model=model)
        )

    yield "zero3 bf16, a layer that loses its own parameters by that", a_compiled_layer


def _outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**_batch(model, 0)).logits.float()


def gathered_root():
    """FSDP2 leaves the root's parameters gathered after a forward."""
    engine = "fsdp2 bf16"

    def forwarded(model: nn.Module) -> nn.Module:
        _outputs(model)
        assert any(p.dtype == torch.bfloat16 for p in model.parameters())
        return model.train()

    def attached():
        _, expected = run(engine)
        model, averager = run(engine, change=forwarded)
        assert torch.equal(averager.shard(), expected.shard())
        forwarded(model)
        assert torch.equal(averager.engine.live_shard(), expected.engine.live_shard())

    def written():
        model, averager = run(engine)
        live = averager.engine.live_shard()
        with averager.swapped_in():
            averaged = _outputs(model)
        before = _outputs(model)
        averager.engine.write(averager.shard())
        averager.engine.publish()
        assert torch.equal(_outputs(model), averaged)
        averager.engine.write(live)
        averager.engine.publish()
        assert torch.equal(_outputs(model), before)

    yield "attached after a forward", attached
    yield "written to after a forward", written


def generation():
    """Tokens generated inside a swap are those of a plain model that holds the average."""
    for engine in (
        "zero3 bf16",
        "zero3 bf16, nothing resident, small sub-groups",
        "fsdp2 fp32",
        "fsdp2 bf16",
    ):

        def generated(engine=engine):
            model, averager = run(engine, model=tiny_gpt2())
            message = [gather_state_dict(averager.engine, averager.shard())]
            dist.broadcast_object_list(message, src=0)
            before = _generate(unwrapped(model))
            with averager.swapped_in():
                during = _generate(unwrapped(model))
            after = _generate(unwrapped(model))
            unset_hf_deepspeed_config()
            plain = tiny_gpt2()
            plain.load_state_dict(message[0])
            expected = _generate(plain.bfloat16() if engine.endswith("bf16") or "zero3" in engine else plain)
            assert all(map(torch.equal, during, expected))
            assert all(map(torch.equal, after, before))
            assert not all(map(torch.equal, during, before))

        yield engine, generated


def _generate(model: nn.Module) -> list[Tensor]:
    """Greedy tokens and the scores they won by; every rank has its own prompt and its own length."""
    model.eval()
    prompt = _batch(model, 0)["input_ids"]
    result = model.generate(  # type: ignore[operator]
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=3 + 2 * dist.get_rank(),
        do_sample=False,
        pad_token_id=0,
        synced_gpus=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return [result.sequences, *result.scores]


def buffers():
    """What goes with the weights goes with the averaged ones, under every engine, and is as it was after a swap."""
    a_batch = MODELS["uneven"].batch(0, 0)
    for engine in ("ddp fp32", "zero2 fp32", "zero3 fp32", "zero3 bf16", "fsdp2 fp32"):
        narrow = engine.endswith("bf16")
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if narrow else {"rtol": 1e-4, "atol": 1e-5}
        model, averager = run(engine, range(12), model=Normalised(narrow=narrow))
        layered = averager.engine
        rows = [MODELS["uneven"].batch(100 + step, dist.get_rank()) for step in range(4)]
        live = {name: buffer.clone() for name, buffer in layered.module.named_buffers()}

        def as_before(layered=layered, live=live):
            return all(torch.equal(buffer, live[name]) for name, buffer in layered.module.named_buffers())

        def expected(averager=averager, layered=layered, narrow=narrow) -> nn.Module:
            """A plain model of the average with vectors and statistics of its own, on every rank."""
            message = [gather_state_dict(layered, averager.shard())]
            dist.broadcast_object_list(message, src=0)
            plain = Normalised(narrow=narrow)
            plain.load_state_dict(message[0])
            u, _, v = torch.linalg.svd(plain.head.parametrizations.weight.original.detach())
            norm = plain.head.parametrizations.weight[0]
            norm._u.copy_(u[:, 0])
            norm._v.copy_(v[0])
            norm.eval()
            for layer in [each for each in plain.modules() if isinstance(each, nn.BatchNorm1d)]:
                layer.reset_running_stats()
                layer.momentum = None
                layer.train()
            with torch.no_grad():
                for rank, step in product(range(2), range(4)):
                    plain(**MODELS["uneven"].batch(100 + step, rank))
            return plain.eval()

        def recomputed(averager=averager, rows=rows, as_before=as_before):
            random_state = torch.get_rng_state()
            averager.update_bn(rows)
            assert as_before()
            assert torch.equal(torch.get_rng_state(), random_state)
            raised_on_every_rank(
                AveragingError,
                "1 of 2 ranks have a batch number 2",
                lambda: averager.update_bn(rows[: 1 + dist.get_rank()]),
            )
            assert as_before()

        def swapped(model=model, averager=averager, as_before=as_before, expected=expected, tol=tolerance):
            plain = expected()
            with averager.swapped_in():
                during = logits(model, a_batch)
                held = {name: buffer.clone() for name, buffer in averager.engine.module.named_buffers()}
            assert all(
                torch.allclose(held[name].abs(), buffer.abs(), **tol)  # singular vectors have no sign
                for name, buffer in plain.named_buffers()
                if buffer.is_floating_point()
            )
            assert torch.allclose(during, logits(plain, a_batch), **tol)
            assert as_before()

        def exported(averager=averager, plain=expected, tol=tolerance):
            plain = plain()
            with shared_folder() as folder:
                averager.save_pretrained(folder / "average")
                if dist.get_rank() == 0:
                    saved = load_file(folder / "average" / "model.safetensors")
                    assert abs(torch.linalg.svdvals(saved["head.weight"])[0] - 1) < 1e-5
                    name = "fixed.1.running_mean"
                    assert name not in saved or torch.allclose(saved[name], plain.get_buffer(name), **tol)

        if not narrow:
            yield f"{engine}, statistics recomputed", recomputed
        yield f"{engine}, in a swap", swapped
        yield f"{engine}, in a folder", exported


def changed_parameters():
    """What is frozen, thawed or trained by others after the averager was attached."""
    for engine in LAYERED:

        def frozen_after_attach(engine=engine):
            recorded = []

            def record_and_freeze(step, model, optimizer):
                frozen = unwrapped(model).get_parameter("head.bias").requires_grad_(True)
                recorded.append(full_masters(ENGINES[engine], model, optimizer))
                frozen.requires_grad_(step < 1)

            _, averager = run(engine, on_step=record_and_freeze)
            whole = gather_state_dict(averager.engine, averager.shard())
            if dist.get_rank() == 0:
                first = {name: weight.detach() for name, weight in uneven().named_parameters()}
                if engine.endswith("bf16"):
                    first = {name: weight.bfloat16().float() for name, weight in first.items()}
                for name in recorded[0]:
                    members = [each[name] for each in (first, *recorded)]
                    assert same_bits(whole[name].view(-1), mean_in_one_process(members)), name

        def thawed_after_attach(engine=engine):
            model, averager = run(engine)
            unwrapped(model).get_parameter("fixed.bias").requires_grad_(True)
            raised_on_every_rank(
                LayoutError, "'fixed.bias' became trainable", averager.swapped_in().__enter__
            )

        if engine != "ddp fp32":  # DDP itself does not go on after that
            yield f"{engine}, a parameter frozen after attaching", frozen_after_attach
        yield f"{engine}, a parameter thawed after attaching", thawed_after_attach

    for engine in ("ddp fp32", "fsdp2 fp32"):

        def rebuilt_optimizer(engine=engine):
            model, averager = run(engine)
            rebuilt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            model(**_batch(model, 0)).loss.backward()
            averager.shard()  # the last member has been read: nothing but the step itself is wrong
            raised_on_every_rank(AveragingError, "another SGD than the one", rebuilt.step)

        yield f"{engine}, an optimizer rebuilt after attaching", rebuilt_optimizer


if __name__ == "__main__":
    worker_main(
        {
            "counting": counting,
            "offloaded states": offloaded_states,
            "compiled": compiled_models,
            "gathered root": gathered_root,
            "generation": generation,
            "changed parameters": changed_parameters,
            "buffers": buffers,
        }
    )
