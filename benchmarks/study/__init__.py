"""The evidence: what averaging and noise buy on real tasks. `python -m benchmarks.study --help` says how to run it.

    grid.py       which cells there are, in what order, and the rules by which anything is chosen
    cell.py       one cell: a training of one task by one seed, and all that is read out of it
    tasks.py      rows of the tasks, in batches          model.py      the encoder, its scores, its weights rounded
    trainings.py  the objectives and schedules           rivals.py     SMART, FreeLB and distillation, in small
    loop.py       the training loop
    readouts.py   what is read out of one training       outcomes.py   numbers from logits
    numerics.py   the fingerprint of the arithmetic      store.py      rows on disk, and claims on cells
    fitting.py    a model trained, teachers first        reading.py     its readouts scored
    collapse.py   probes and chains of tasks             flatness.py    weight noise, the line, curvature
    evidence.py   the page, from the rows                tables.py  figures.py  default.py  beyond.py   its parts
    arms.py       which rows stand side by side          statistics.py paired differences, intervals, tests

The public interface of swaft and plain torch are all it uses, so rows made today and after a rebuilding of the
recipes can stand side by side.
"""
