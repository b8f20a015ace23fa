"""The evidence: what averaging and noise buy on real tasks. `python -m benchmarks.study --help` says how to run it.

    grid.py       which cells there are, in what order, and the rules for every choice
    cell.py       one cell: a training of one task with one seed, and all that is read out of it
    tasks.py      rows of the tasks, in batches          model.py      the encoder, its scores, its weights rounded
    trainings.py  the objectives and schedules           rivals.py     SMART, FreeLB and distillation, in small
    loop.py       the training loop
    readouts.py   what is read out of one training       outcomes.py   numbers from logits
    numerics.py   the fingerprint of the arithmetic      store.py      rows on disk, and claims on cells
    fitting.py    a model trained, teachers first        reading.py     its readouts scored
    collapse.py   probes and chains of tasks             flatness.py    weight noise, the line, curvature
    evidence.py   the page, from the rows                tables.py  figures.py  default.py  beyond.py   its parts
    arms.py       which rows stand side by side          statistics.py paired differences, intervals, tests

It uses only swaft's public interface and plain torch, so rows made before and after a change of the recipes can be
compared.
"""
