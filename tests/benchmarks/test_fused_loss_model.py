from __future__ import annotations

import pytest
import torch

from benchmarks.fused_loss_model import (
    BUDGET,
    CHOSEN,
    NUM_ROWS,
    SHAPES,
    SIMPLE,
    chunk_rows,
    share_of_the_floor,
)
from swaft.noise.loss import linear
from swaft.noise.loss.rows import rows as torch_rows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("width", "vocabulary"), SHAPES)
def test_the_model_has_the_chunks_that_the_loss_makes(width, vocabulary):
    arithmetic = linear._Arithmetic(torch.bfloat16, torch.float32, torch.bfloat16, True, torch_rows)
    memory = linear._Buffers(3, arithmetic, torch.empty(vocabulary, width, device="meta"), NUM_ROWS, None)
    few, many = chunk_rows(CHOSEN, vocabulary)
    assert (memory.product_rows, memory.rows) == (few, min(many, NUM_ROWS))
    assert linear._ACCELERATOR_CHUNK_BYTES == BUDGET


@pytest.mark.parametrize(("width", "vocabulary"), SHAPES)
def test_what_was_chosen_is_predicted_to_be_no_slower_than_the_simple_form(width, vocabulary):
    assert share_of_the_floor(CHOSEN, width, vocabulary) >= share_of_the_floor(SIMPLE, width, vocabulary)


def test_the_prediction_of_the_largest_head_is_that_of_the_docs():
    assert share_of_the_floor(SIMPLE, 4096, 128256) == pytest.approx(0.71, abs=0.005)
    assert share_of_the_floor(CHOSEN, 4096, 128256) == pytest.approx(0.82, abs=0.005)
