"""Representational collapse: how useful an encoder fine-tuned on one task still is for others.

Aghajanyan et al. 2021, section 4, with the available tasks. Representations are judged by the score of a linear
probe on frozen, mean-pooled features, never by distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study import model as encoder
from benchmarks.study.fitting import Regime, device, fit
from benchmarks.study.loop import Trained
from benchmarks.study.outcomes import outcomes
from benchmarks.study.reading import in_place, recommended_readouts
from benchmarks.study.readouts import RECOMMENDED
from benchmarks.study.rows import Rows
from benchmarks.study.store import Row
from benchmarks.study.tasks import TASKS, Splits, Task, load
from benchmarks.study.trainings import BASELINE, Training

PROBED = ("trec", "cr", "subj", "mpqa", "mrpc")
"""Tasks probed in the first experiment, after training on another. Probes of cola learn nothing, not even on the
pretrained encoder."""
PRETRAINED = "pretrained"
"""Takes the place of a readout: the encoder before training, measured with the baseline."""
CHAIN = ("trec", "mrpc", "subj")
"""Tasks that follow the first one in a chain; one cycle."""
CYCLES = 3
PROBE_ROWS = 500
PENALTIES = (1e-2, 1e-1, 1.0, 10.0)
"""Weights of ``||W||²/2`` next to the mean cross entropy; one is chosen on the validation rows."""


def probe_others(
    model: nn.Module, trained: Trained, training: Training, splits: Splits, task: Task
) -> dict[str, Row]:
    """The first experiment: probes on other tasks after training on one, for the last weights and the average.

    With the baseline, the encoder before training is probed as well.
    """
    found = {}

    def probe_all(name: str, model: nn.Module) -> None:
        for other in PROBED:
            found[f"{name}:{other}"] = {"probe": other, "outcomes": probe(model, other)}

    if training.name == BASELINE:
        probe_all(PRETRAINED, encoder.pretrained(splits.num_labels, trained.seed, device()))
    for readout in recommended_readouts(training):
        with in_place(model, trained.averager, readout):
            probe_all(readout.name, model)
    return found


def cycle(first: str, training: Training, *, regime: Regime, rate: float, seed: int) -> dict[str, Row]:
    """The second and third experiments: one task after another, ``CYCLES`` times, each from where the last ended.

    All stages train at the same rate, and every cycle on the same rows. Before each stage the next task is probed,
    after it the first task of the chain. A stage passes on the weights of the recommended average, or the last ones
    of a decayed training; heads are new.
    """
    found: dict[str, Row] = {}
    tasks = [first, *(task for task in CHAIN if task != first)] * CYCLES
    carried: dict[str, Tensor] | None = None
    for stage, task in enumerate(tasks):
        own = seed + 1000 * (stage % (len(tasks) // CYCLES))
        splits = load(task, rows=regime.rows, seed=own)
        budget = regime.times(TASKS[task].length)
        model = encoder.pretrained(splits.num_labels, own, device())
        if carried is not None:
            model.base_model.load_state_dict(carried, strict=False)
        found[f"{stage:02}:next"] = {"probe": task, "stage": stage, "outcomes": probe(model, task)}
        trained = fit(model, splits, training, regime=budget, rate=rate, seed=seed, averaged=(RECOMMENDED,))
        with in_place(model, trained.averager, recommended_readouts(training)[-1]):
            carried = {name: weight.detach().clone() for name, weight in model.base_model.named_parameters()}
            found[f"{stage:02}:first"] = {
                "probe": first,
                "stage": stage,
                "outcomes": probe(model, first),
            }
        if trained.averager is not None:
            trained.averager.close()
    return found


def probe(model: nn.Module, task: str) -> dict[str, float]:
    """Test outcomes of a linear probe on an encoder's features, trained on the same ``PROBE_ROWS`` rows every time.

    Args:
        model: with the weights to be judged; its head is not used.
        task: the task to probe.
    """
    splits = load(task, rows=PROBE_ROWS, seed=0)
    train, validation, test = (
        features(model, part) for part in (splits.train, splits.validation, splits.test)
    )
    centre, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    train, validation, test = ((part - centre) / spread for part in (train, validation, test))
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        weight = logistic_regression(train, splits.train.labels, splits.num_labels, penalty)
        loss = float(F.cross_entropy(_with_ones(validation) @ weight, splits.validation.labels))
        if best is None or loss < best[0]:
            best = (loss, weight)
    assert best is not None
    return outcomes(_with_ones(test) @ best[1], splits.test.labels, TASKS[task].score)


def features(model: nn.Module, rows: Rows) -> Tensor:
    """Mean-pooled last hidden states (N, d), float64, without dropout."""

    def pooled(batch: dict[str, Tensor]) -> Tensor:
        hidden = model.base_model(**batch).last_hidden_state  # type: ignore[operator]
        mask = batch["attention_mask"][..., None]
        return ((hidden * mask).sum(1) / mask.sum(1)).double()

    return encoder.each_row(model, rows, pooled)


def logistic_regression(inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> Tensor:
    """Weights (d + 1, C), the last row the bias, that minimise the mean cross entropy + penalty ||W||²/2.

    Args:
        inputs: (N, d), float64.
        labels: (N,).
        classes: C.
        penalty: on all but the bias.
    """
    weight = torch.zeros(inputs.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
    joined = _with_ones(inputs)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(joined @ weight, labels) + penalty * weight[:-1].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def _with_ones(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
