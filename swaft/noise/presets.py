"""The published variants of the noise-stability objective as a table, and how settings are read from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from swaft.errors import ConfigError
from swaft.noise.generator import Noise
from swaft.noise.loss import Detach

Masks = Literal["shared", "independent"]
Reduction = Literal["mean", "batchmean"]
Passes = Literal["two", "doubled"]
Preset = Literal["paper", "relative", "fairseq", "rdrop", "rdrop_paper"]


@dataclass(frozen=True)
class NoiseSettings:
    """What distinguishes noise-stability objectives: the options of `R3F`, and what only presets set."""

    noise: Noise = "uniform"
    sigma: float = 1e-5
    masks: Masks = "shared"
    reduction: Reduction = "mean"
    detach: Detach = "none"
    passes: Passes = "two"
    fused: bool = True
    label_smoothing: float = 0.0
    relative: bool = False
    """Whether sigma is a share of the root mean square of the embedding output, over non-padding tokens."""
    before_scale: bool = False
    """Whether sigma applies before a factor that the embedding itself applies (mBART: the square root of d)."""
    scale: float = 1.0
    """Factor on the reduced divergence, before the weight."""
    detach_embedding: bool = False
    """Whether the noised pass passes no gradient to the token embeddings."""
    ce_on_noised: bool = False
    """Whether the task loss is averaged over both passes instead of taken from the clean one."""
    task_scale: float = 1.0
    """Factor on the task loss; 2 turns the average over both passes into their sum."""

    @property
    def one_sided(self) -> bool:
        """Whether nothing needs gradients of the noised pass."""
        return self.detach == "noised" and not self.ce_on_noised


_PAPER = NoiseSettings()
_RELATIVE = NoiseSettings(sigma=1.0, relative=True)  # large enough to have an effect: docs/methods.md
_FAIRSEQ = NoiseSettings(masks="independent", reduction="batchmean", before_scale=True)
_RDROP = NoiseSettings(sigma=0.0, masks="independent", scale=0.5, ce_on_noised=True)
_RDROP_PAPER = replace(_RDROP, task_scale=2.0)

PRESETS: dict[Preset, tuple[NoiseSettings, NoiseSettings]] = {
    "paper": (_PAPER, _PAPER),
    "relative": (_RELATIVE, _RELATIVE),
    "fairseq": (replace(_FAIRSEQ, detach_embedding=True), replace(_FAIRSEQ, noise="normal")),
    "rdrop": (_RDROP, _RDROP),
    "rdrop_paper": (_RDROP_PAPER, _RDROP_PAPER),
}
"""Settings of each preset for models that classify, and for those that generate.

paper: Aghajanyan et al. 2021, eqs. 3-4. relative: the same, with noise relative to the size of the embeddings.
fairseq: the settings of the authors' released code (examples/rxf); there the noise never reached RoBERTa, here it
does. rdrop: Liang et al. 2021 as in the example of their README, with dropout and no noise, and the cross entropies
of both passes averaged; rdrop_paper: their equation 4 and their fairseq code, with the cross entropies summed.
"""


def resolve_settings(preset: Preset, *, generates: bool, **options: Any) -> NoiseSettings:
    """Read a preset's settings from the table and override them with explicit values.

    Args:
        preset: its name.
        generates: whether the model generates text rather than classifying it.
        options: fields of NoiseSettings; None keeps the preset's value.

    Raises:
        ConfigError: the values contradict each other.
    """
    given = {name: value for name, value in options.items() if value is not None}
    classifying, generating = PRESETS[preset]
    settings = replace(generating if generates else classifying, **given)
    if settings.passes == "doubled" and settings.one_sided:
        raise ConfigError(
            "passes='doubled' with detach='noised': a noised pass without gradients must be a separate pass; "
            "expected passes='two', or another detach."
        )
    if settings.sigma == 0 and settings.masks == "shared":
        raise ConfigError(
            "sigma=0 with masks='shared': nothing differs between the two passes, so the divergence is 0 at twice "
            "the cost. Set sigma, set masks='independent', or use swaft.TaskLoss (noise.kind=none)."
        )
    return settings
