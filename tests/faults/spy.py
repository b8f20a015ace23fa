"""Writes down, inside a rank, what every optimizer step takes and leaves, so that runs can be compared by steps.

A line of FOLDER/rank-N.jsonl is a step. It took

    rates    learning rates that the optimizer stepped with
    rows     numbers of the rows, by micro-batch
    noise    digest of what was drawn for each micro-batch
    streams  likewise, of the first elements alone, which one stream would give to batches of any shape
    masks    digest of what dropout left of everything it was given

and left `weights` and `average`, digests of this rank's part; `count`, the members in the average; and `random`,
a digest of all generators. FOLDER/rank-N-began.json has the step that a process began after, and what there was of
these `before` its checkpoint was loaded (nothing where there is none) and when training `began`. FOLDER/average is
the state of the averages that training began with, where there were any, and FOLDER/torch.float32 and so on are
models made of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from swaft.noise import generator, objectives
from swaft.training.run import run as the_run
from swaft.training.run import state as run_state

EXPORTED = (torch.float32, torch.bfloat16)
FIRST = 256
"""Elements by which a stream of noise is known."""


def look_on(order: dict[str, Any], rank: int) -> None:
    """Have this process write, from its first training step on.

    Args:
        order: `spy`, the folder; and where ranks are to end themselves as soon as a step is written down `at_step`,
            `victims` and `signal` (default SIGKILL).
        rank: of this process.
    """
    ends = order.get("signal", signal.SIGKILL) if rank in order.get("victims", ()) else None
    Spy(Path(order["spy"]), rank, at_step=order.get("at_step"), ends=ends).install()


def read_steps(folder: Path) -> list[dict[int, dict[str, Any]]]:
    """What was written into a folder: by rank, and by number of the step."""
    files = sorted(folder.glob("rank-*.jsonl"))
    return [{line["step"]: line for line in map(json.loads, file.read_text().splitlines())} for file in files]


def read_beginnings(folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote about its beginning."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*-began.json"))]


def read_average(state: Path) -> dict[tuple[str, str], Tensor]:
    """The averages in a folder, every vector put together from the files of all ranks: by vector and parameter."""
    shapes = json.loads((state / "manifest.json").read_text())["content"]["parameters"]
    found: dict[tuple[str, str], Tensor] = {}
    for path in state.glob("rank-*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                vector, position = file.get_tensor(key), 0
                for name, start, end in json.loads(file.metadata()["fragments"]):
                    empty = torch.full(shapes[name], float("nan"), dtype=vector.dtype)
                    flat = found.setdefault((key, name), empty).view(-1)
                    flat[start:end] = vector[position : position + end - start]
                    position += end - start
    return found


class Spy:
    """Writes into a folder what one rank does."""

    def __init__(self, folder: Path, rank: int, *, at_step: int | None, ends: int | None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rank = folder, rank
        self.at_step, self.ends = at_step, ends
        self.before: dict[str, Any] = {}
        self.step: dict[str, Any] = {}
        self.seeing = False

    def install(self) -> None:
        """Put itself around what is to be seen; to be called once, in a process that has nothing else to do."""
        the_run.Run.steps = self.watched(the_run.Run.steps)
        run_state.RunState.load_engine = after(self.before_weights, run_state.RunState.load_engine)
        run_state.RunState.restore = after(self.before_average, run_state.RunState.restore)
        run_state.RunState.restore_random = after(self.before_random, run_state.RunState.restore_random)
        the_run.step_batches = self.noted_rows(the_run.step_batches)
        objectives.prove = self.unseen(objectives.prove)
        generator.standard_noise = self.noted_noise(generator.standard_noise)
        torch.nn.functional.dropout = self.noted_mask(torch.nn.functional.dropout)
        register_optimizer_step_pre_hook(self.note_rates)

    def watched(self, steps: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def watching(run: Any, *given: Any) -> Iterator[Any]:
            model, averager, position = run.model, run.averager, run.position
            check = run._interruption.check

            def write_and_check(*failure: Any) -> None:
                if not failure:  # between the batches of an evaluation
                    return check()
                line = {"step": position.step, **self.step, **left(model, averager)}
                line["masks"] = line["masks"].hexdigest()
                with (self.folder / f"rank-{self.rank}.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                if position.step == self.at_step:
                    meet()
                    if self.ends is not None:
                        os.kill(os.getpid(), self.ends)
                return check(*failure)

            began = {"step": position.step, "before": self.before, "began": left(model, averager)}
            (self.folder / f"rank-{self.rank}-began.json").write_text(json.dumps(began))
            if averager is not None and averager.num_averaged:
                averager.save_state(self.folder / "average")
                for dtype in EXPORTED:
                    averager.save_pretrained(self.folder / str(dtype), dtype=dtype)
            self.seeing = True
            run._interruption.check = write_and_check
            yield from steps(run, *given)

        return watching

    def before_weights(self, state: Any, *_: Any) -> None:
        self.before["weights"] = digest(local_parts(state.run.model))

    def before_average(self, state: Any, parts: Any) -> None:
        self.before |= left_of_average(parts["average"]) if state.run.folder.checkpoint else {}

    def before_random(self, state: Any) -> None:
        if state.run.folder.checkpoint:
            self.before["random"] = generators()

    def noted_rows(self, step_batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def noting(*given: Any, **options: Any) -> Iterator[Any]:
            for epoch, read, batches in step_batches(*given, **options):
                rows = [batch.inputs["idx"].tolist() if batch.count else [] for batch in batches]
                self.step = {"rates": [], "rows": rows, "noise": [], "streams": [], "masks": sha256()}
                yield epoch, read, batches

        return noting

    def unseen(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def hiding(*given: Any, **options: Any) -> Any:
            drew, self.seeing = self.seeing, False
            try:
                return call(*given, **options)
            finally:
                self.seeing = drew

        return hiding

    def noted_noise(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(*given: Any, **options: Any) -> Tensor:
            drawn = draw(*given, **options)
            if self.seeing:
                self.step["noise"].append(digest([drawn]))
                self.step["streams"].append(digest([drawn.flatten()[:FIRST]]))
            return drawn

        return noting

    def noted_mask(self, dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            out = dropout(input, p, training, inplace)
            if self.seeing and training:
                self.step["masks"].update((out == 0).numpy().tobytes())
            return out

        return noting

    def note_rates(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.seeing:  # torch takes a step for nothing where it loads an optimizer's state
            rates = {group["lr"] for group in optimizer.param_groups}
            self.step["rates"] = sorted(rates.union(self.step["rates"]))


def meet() -> None:
    """Wait until every rank has written its line, whichever of them has gone since."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.barrier()


def after(notice: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*given: Any, **options: Any) -> Any:
        notice(*given, **options)
        return call(*given, **options)

    return called


def left(model: Any, averager: Any) -> dict[str, Any]:
    """What a run has after a step."""
    weights = digest(local_parts(model))
    return {"weights": weights, **left_of_average(averager), "random": generators()}


def left_of_average(averager: Any) -> dict[str, Any]:
    if averager is None:
        return {}
    count = averager.num_averaged
    return {"count": count, "average": digest([averager.shard()]) if count else None}


def local_parts(model: Any) -> Iterator[Tensor]:
    """What this rank holds of each parameter, under any engine."""
    for parameter in model.parameters():
        mine = getattr(parameter, "ds_tensor", parameter).detach()
        yield mine.to_local() if hasattr(mine, "to_local") else mine


def generators() -> str:
    numpys = np.random.get_state()
    rest = repr((random.getstate(), numpys[0], numpys[2:])).encode() + numpys[1].tobytes()
    return sha256(rest + torch.get_rng_state().numpy().tobytes()).hexdigest()


def digest(tensors: Iterable[Tensor]) -> str:
    found = sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
