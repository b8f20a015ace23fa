"""Which metrics there are for which kind of task, and what is said of one that does not fit."""

from __future__ import annotations

from difflib import get_close_matches

from swaft.errors import ConfigError

NAMES = {
    "classification": ("accuracy", "f1", "f1_macro", "accuracy_f1", "matthews_correlation"),
    "regression": ("pearson_spearman", "mse"),
    "generation": ("rouge", "rougeL_coco", "bleu", "chrf", "bleu_chrf", "bleu_rouge"),
    "question answering": ("squad", "squad_v2"),
}
"""What the setting `eval.metric` may say, by kind of task; `auto` besides."""


def refuse_unfit(name: str, task: str) -> None:
    """Refuse a metric that there is not, or that is for another kind of task.

    Args:
        name: what `eval.metric` says; `auto` has been resolved.
        task: one of the kinds in `NAMES`.

    Raises:
        ConfigError: as said above.
    """
    fitting = NAMES[task]
    if name in fitting:
        return
    if any(name in names for names in NAMES.values()):
        raise ConfigError(f"eval.metric: {name} does not fit a {task} task; use auto, {' or '.join(fitting)}")
    near = get_close_matches(name, fitting, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"eval.metric: '{name}' is not one of auto, {', '.join(fitting)}.{hint}")
