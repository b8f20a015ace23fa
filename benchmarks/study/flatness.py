"""Flatness around a readout: loss under weight noise and on the line through the average, and curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.loop import Trained
from benchmarks.study.model import changed, logits_of
from benchmarks.study.reading import in_place
from benchmarks.study.readouts import BLENDED, RECOMMENDED, Readout
from benchmarks.study.rows import Rows, evaluation_batches
from benchmarks.study.store import Row
from benchmarks.study.tasks import Splits, Task
from benchmarks.study.trainings import Training

RADII = (0.01, 0.02, 0.05, 0.1)
"""Noise of each weight tensor, as a share of its root mean square."""
DRAWS = 3
LINE = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
"""Positions on the line: 0 is the last weights, 1 the average."""
CURVATURE_ROWS = 128
ITERATIONS = 8
"""Steps of the power iteration."""
PROBES = 4
"""Random directions for the estimate of the trace."""
REACH, REACH_OF_TRACE = 1e-2, 0.5
"""Length of the steps whose central difference stands for the Hessian's product with a unit vector. Along random
signs the curvature is small, and only a longer step separates it from rounding."""

Vector = dict[str, Tensor]


def measure(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, task: Task
) -> dict[str, Row]:
    """One row for the last weights, one for the average, on training and test rows, and one for the line."""
    train = splits.train.take(torch.arange(min(len(splits.train), len(splits.test))).numpy())
    average = BLENDED if training.schedule == "decayed" else RECOMMENDED
    found: dict[str, Row] = {}
    for readout in (Readout("last"), Readout(average, average)):
        with in_place(model, trained.averager, readout):
            found[readout.name] = {
                "noise_radii": RADII,
                "train_nll": [_under_noise(model, train, radius) for radius in (0.0, *RADII)],
                "test_nll": [_under_noise(model, splits.test, radius) for radius in (0.0, *RADII)],
                **curvature(
                    model,
                    train.take(torch.arange(min(len(train), CURVATURE_ROWS)).numpy()),
                    seed=trained.seed,
                ),
            }
    line = []
    for place in LINE:
        with in_place(model, trained.averager, Readout("line", average, place)):
            line.append([_nll(model, train), _nll(model, splits.test)])
    found["line"] = {"places": LINE, "train_and_test_nll": line}
    return found


def curvature(model: nn.Module, rows: Rows, *, seed: int) -> dict[str, float]:
    """Top eigenvalue and trace of the Hessian of the mean loss on some rows, without dropout.

    Args:
        model: with the weights to measure.
        rows: rows of the loss.
        seed: of the random directions, so that the spread over seeds includes the error of the estimates.
    """
    generator = torch.Generator().manual_seed(seed)

    def product(direction: Vector, reach: float = REACH) -> Vector:
        ahead, behind = (
            _gradient(model, rows, lambda name, w, sign=sign: w + sign * reach * direction[name])
            for sign in (1, -1)
        )
        return {name: (ahead[name] - behind[name]) / (2 * reach) for name in ahead}

    return {
        "top_eigenvalue": top_eigenvalue(product, _random(model, generator, signs=False)),
        "trace": sum(_trace_term(product, _random(model, generator, signs=True)) for _ in range(PROBES))
        / PROBES,
    }


def top_eigenvalue(product: Callable[[Vector], Vector], direction: Vector) -> float:
    """The eigenvalue of largest magnitude, by power iteration from a direction; an underestimate, if anything."""
    value = 0.0
    for _ in range(ITERATIONS):
        length = _norm(direction)
        direction = {name: part / length for name, part in direction.items()}
        image = product(direction)
        value, direction = _dot(direction, image), image
    return value


def _trace_term(product: Callable[[Vector, float], Vector], signs: Vector) -> float:
    """One term of Hutchinson's estimate."""
    length = _norm(signs)
    image = product({name: part / length for name, part in signs.items()}, REACH_OF_TRACE)
    return length * _dot(signs, image)


def _gradient(model: nn.Module, rows: Rows, moved: Callable[[str, Tensor], Tensor]) -> Vector:
    """Gradient of the mean loss at other weights; the weights are restored afterwards."""
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    model.zero_grad()
    with changed(model, moved):
        for places in evaluation_batches(rows):
            batch = {name: tensor.to(where) for name, tensor in rows.batch(places).items()}
            labels = batch.pop("labels")
            (F.cross_entropy(model(**batch).logits, labels, reduction="sum") / len(rows)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train(was_training)
    return found


def _under_noise(model: nn.Module, rows: Rows, radius: float) -> float:
    """Mean loss over ``DRAWS`` draws of Gaussian noise on every weight tensor, relative to its root mean square."""
    if radius == 0:
        return _nll(model, rows)
    losses = []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)

        def noised(_: str, weight: Tensor, generator: torch.Generator = generator) -> Tensor:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            return weight + radius * weight.square().mean().sqrt() * noise

        with changed(model, noised):
            losses.append(_nll(model, rows))
    return sum(losses) / DRAWS


def _nll(model: nn.Module, rows: Rows) -> float:
    return float(F.cross_entropy(logits_of(model, rows).double(), rows.labels))


def _random(model: nn.Module, generator: torch.Generator, *, signs: bool) -> Vector:
    found = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        found[name] = (drawn.sign() if signs else drawn).to(parameter)
    return found


def _dot(a: Vector, b: Vector) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in b))


def _norm(a: Vector) -> float:
    return _dot(a, a) ** 0.5
