"""The evidence: what averaging and noise gain on real tasks. `python -m benchmarks.study --help` shows usage.

    grid.py       which cells there are, in what order, and the criteria for all choices
    cell.py       one cell: one task, training and seed, and everything measured on it
    tasks.py      rows of the tasks, in batches          model.py      the encoder, its logits, its weights rounded
    trainings.py  the objectives and schedules           rivals.py     small forms of SMART, FreeLB and distillation
    loop.py       the training loop
    readouts.py   which weights one training yields      outcomes.py   numbers from logits
    numerics.py   the fingerprint of the arithmetic      store.py      rows on disk, and claims on cells
    fitting.py    trains a model, teachers first         reading.py    scores its readouts
    collapse.py   probes and chains of tasks             flatness.py   weight noise, the line, curvature
    evidence.py   the page, from the rows                tables.py  figures.py  default.py  beyond.py   its parts
    arms.py       which rows are compared                statistics.py paired differences, intervals, tests

It uses only the public interface of swaft and plain torch, so rows made before and after a rewrite of the recipes
can be compared.
"""
