"""Runs on every rank: layouts of a batch of eight rows over two ranks, against one process that saw them all."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from engines import EngineCase, full_masters, prepared
from harness import worker_main
from uneven_texts import MODELS, OBJECTIVES, distance, loader_of, reference_file, sgd, train_prepared

LAYOUTS = ((4, 1), (1, 4))
"""Rows of a micro-batch, and micro-batches of a step; two ranks. In the second layout the last micro-batch of an
epoch has no row of its own on one rank."""


def case_of(engine: EngineCase, models=tuple(MODELS), objectives=tuple(OBJECTIVES), layouts=LAYOUTS):
    def checks():
        for kind, objective, (batch_size, accumulation) in product(models, objectives, layouts):

            def check(kind=kind, objective=objective, batch_size=batch_size, accumulation=accumulation):
                accelerator, model, optimizer = prepared(
                    engine,
                    accumulation=accumulation,
                    model=MODELS[kind](dropout=0.0),
                    build_optimizer=sgd,
                )
                loader = accelerator.prepare_data_loader(loader_of(kind, batch_size=batch_size))
                model.train()
                logged = train_prepared(accelerator, model, optimizer, loader, objective)
                expected, expected_log = torch.load(reference_file(Path(sys.argv[1]).parent, kind, objective))
                found = full_masters(engine, model, optimizer)
                apart = distance(found, {name: expected[name] for name in found})
                assert apart < 1e-6, apart
                for name in expected_log[0].keys() & {"loss", "task_loss", "divergence"}:
                    apart = [a[name] - b[name] for a, b in zip(logged, expected_log, strict=True)]
                    assert max(map(abs, apart)) < 2e-5 * expected_log[0]["loss"], (name, apart)

            yield f"{kind}, {objective}, {accumulation} x {batch_size}", check

    return checks


if __name__ == "__main__":
    untested = {"zero_allow_untested_optimizer": True}
    one = {"models": ("t5",), "objectives": ("r3f",), "layouts": LAYOUTS[1:]}
    worker_main(
        {
            "ddp": case_of(EngineCase(None, "fp32")),
            "zero2": case_of(EngineCase(2, "fp32", top=untested), **one),
            "zero3": case_of(EngineCase(3, "fp32", top=untested), **one),
            "fsdp2": case_of(EngineCase(None, "fp32", fsdp={}), **one),
        }
    )
