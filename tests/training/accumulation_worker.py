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
"""Rows of a micro-batch, and micro-batches of a step; two ranks."""


def case_of(engine: EngineCase, models=tuple(MODELS), objectives=tuple(OBJECTIVES)):
    def checks():
        for kind, objective, (batch_size, accumulation) in product(models, objectives, LAYOUTS):

            def check(kind=kind, objective=objective, batch_size=batch_size, accumulation=accumulation):
                accelerator, model, optimizer = prepared(
                    engine,
                    accumulation=accumulation,
                    model=MODELS[kind](dropout=0.0),
                    build_optimizer=sgd,
                )
                loader = accelerator.prepare_data_loader(loader_of(kind, count=24, batch_size=batch_size))
                model.train()
                train_prepared(accelerator, model, optimizer, loader, objective)
                expected = torch.load(reference_file(Path(sys.argv[1]).parent, kind, objective))
                found = full_masters(engine, model, optimizer)
                apart = distance(found, {name: expected[name] for name in found})
                assert apart < 1e-6, apart

            yield f"{kind}, {objective}, {accumulation} x {batch_size}", check

    return checks


if __name__ == "__main__":
    untested = {"zero_allow_untested_optimizer": True}
    worker_main(
        {
            "ddp": case_of(EngineCase(None, "fp32")),
            "zero2": case_of(EngineCase(2, "fp32", top=untested), models=("t5",), objectives=("r3f",)),
        }
    )
