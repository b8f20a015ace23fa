from __future__ import annotations

import pytest

from swaft.training.models.build import in_settings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("said", "in_words_of_settings"),
    [
        ("Use swaft.TaskLoss.", "Use noise.kind=none."),
        ("Use swaft.RDrop or swaft.R3F.", "Use noise.kind=rdrop or noise.kind=r3f."),
        ("Set fused=False, which", "Set noise.fused=false, which"),
        ("sigma=0 with masks='shared': nothing", "noise.sigma=0 with noise.masks=shared: nothing"),
        ("noise is 'gamma', expected", "noise.noise is 'gamma', expected"),
        ("The head's weight is a DTensor", "The head's weight is a DTensor"),
        ("with sigma=0.5 or more", "with noise.sigma=0.5 or more"),
        ("train.weight=1, my_sigma=2, averaging.noise=3", "train.weight=1, my_sigma=2, averaging.noise=3"),
    ],
)
def test_arguments_and_objectives_of_the_library_are_named_as_settings(said, in_words_of_settings):
    assert in_settings(said) == in_words_of_settings
