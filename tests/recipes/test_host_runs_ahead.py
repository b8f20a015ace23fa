"""No number is read from the device in a training step, so that the host can queue the next one meanwhile.

A CPU has no queue; what makes the host wait for a card is caught here where it hands a number to Python.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from swaft.noise.passes import SentCount
from swaft.training.run.run import Run
from swaft.training.run.step import Meter, count_rows

pytestmark = pytest.mark.recipe

FIRST, LAST = 10, 15
"""Steps that are watched: behind the first batches, on which more is proved, and before the line of the log."""
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
INDEXED = torch.ops.aten.index.Tensor
"""Which looks for the true elements of a mask, whose number is a size on the host."""
MADE = torch.ops.aten.lift_fresh.default
"""Of `torch.tensor(3, device=...)`: made on the host, and copied to a device while the host waits."""
ON_THE_HOST = (
    "optim/optimizer.py",
    "data/dataloader.py",
    "transformers/masking_utils.py",
    "loss/weighting.py",
)
"""Who else reads: AdamW its count of steps, and the data loader its order, which lie on the host everywhere; the
loss whether its labels are classes, where they lie there; and transformers, but for
`attn_implementation="eager"`, whether a mask has any padding, wherever that lies."""


class Reads(TorchDispatchMode):
    """Notes who reads a number, while it is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found, self.steps = False, list[str](), list[int]()

    def note(self, *, ours: bool = False) -> None:
        """Note the callers; with `ours`, only where the last of them is no installed package."""
        if not self.on:
            return
        frames = traceback.extract_stack()[:-1]
        places = [f"{Path(each.filename).parent.name}/{Path(each.filename).name}" for each in frames]
        callers = [
            each for each in frames if "/torch/" not in each.filename and each.name != "__torch_dispatch__"
        ]
        installed = "site-packages" in callers[-1].filename
        if not set(ON_THE_HOST) & set(places) and not (ours and installed):
            self.found.append(" > ".join(places[-8:]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS or (function is INDEXED and any(is_mask(each) for each in args[1])):
            self.note()
        elif function is MADE:  # also of `x[0] = 3`, as models have it, which a device fills by itself
            self.note(ours=True)
        return function(*args, **(kwargs or {}))


def is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@pytest.fixture
def watched(monkeypatch) -> Iterator[Reads]:
    """Has every step of a recipe watched from `FIRST` to `LAST`, and what lies between two of them."""
    reads = Reads()
    steps, tolist, read = Run.steps, torch.Tensor.tolist, SentCount.read

    def watched_steps(*arguments: Any) -> Iterator[Any]:
        for step in steps(*arguments):
            reads.on = FIRST <= step.number <= LAST
            reads.steps += [step.number] * reads.on
            yield step
        reads.on = False

    def noted_tolist(tensor: torch.Tensor) -> Any:  # reads past the dispatcher on a CPU
        reads.note()
        return tolist(tensor)

    def sent(count: SentCount) -> int:  # which the host has been sent
        was, reads.on = reads.on, False
        try:
            return read(count)
        finally:
            reads.on = was

    monkeypatch.setattr(Run, "steps", watched_steps)
    monkeypatch.setattr(torch.Tensor, "tolist", noted_tolist)
    monkeypatch.setattr(SentCount, "read", sent)
    with reads:
        yield reads


def settings(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(inputs / "run.yaml"),
        f"train.output_dir={output}",
        f"train.max_steps={LAST + 1}",
        "train.logging_steps=100",
        "eval.eval_steps=100",
        "averaging.start=0.1",
        "noise.kind=r3f",
        "noise.preset=relative",
        "noise.sigma=0.5",
        *more,
    ]


def check(reads: Reads, recipe: ModuleType, words: list[str]) -> None:
    assert recipe.main(words) == 0
    assert reads.steps == [*range(FIRST, LAST + 1)]
    assert not reads.found, "\n".join(sorted(set(reads.found)))


def test_a_step_of_a_classifier_reads_no_number_from_the_device(watched, classification, inputs, tmp_path):
    check(watched, classification, settings(inputs, tmp_path / "run"))


def test_a_step_of_a_generating_model_reads_no_number_but_the_rows_sent_ahead(
    watched, seq2seq, text_inputs, tmp_path
):
    check(watched, seq2seq, settings(text_inputs, tmp_path / "run"))


@pytest.mark.parametrize(
    "read",
    [
        lambda loss: loss.item(),
        lambda loss: loss.tolist(),
        float,
        lambda loss: bool(loss > 0),
        lambda loss: loss.view(1).nonzero(),
        lambda loss: loss.view(1)[loss.view(1) > 0],
        lambda loss: loss.masked_select(loss > 0),
        lambda loss: torch.tensor(3, device=loss.device),
    ],
    ids=["item", "tolist", "float", "bool", "nonzero", "mask", "select", "tensor"],
)
def test_a_read_in_the_loop_would_be_found(read: Callable[[torch.Tensor], Any], watched):
    watched.on = True
    read(torch.ones(()))
    assert len(watched.found) == 1


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(3, 5)},
        {"labels": torch.ones(3)},
        {"labels": torch.tensor([1, -100, 2])},
    ],
    ids=["answers", "scores", "classes"],
)
def test_rows_are_counted_without_a_copy_to_the_device(batch, watched):
    watched.on = True
    count = count_rows(batch)
    watched.on = False
    assert not watched.found
    assert (count.dtype, count.dim()) == (torch.int64, 0)
    assert int(count) == (2 if "labels" in batch and not batch["labels"].is_floating_point() else 3)


def test_plain_numbers_are_logged_without_a_copy_to_the_device(watched):
    meter, values, count = (
        Meter(Accelerator(cpu=True)),
        {"loss": torch.zeros(()), "share": 0.1},
        torch.ones(()),
    )
    watched.on = True
    meter.add(values, count=count, tokens=count)
    watched.on = False
    assert not watched.found
    assert meter.sums.tolist() == [0.0, 0.1, 1.0, 1.0]
