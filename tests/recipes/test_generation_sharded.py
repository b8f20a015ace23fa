from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch
from tiny_texts import save_encoder_decoder

pytestmark = pytest.mark.recipe


def test_weights_that_zero3_has_cut_generate_the_tokens_of_whole_ones_though_ranks_end_apart(tmp_path):
    folder = save_encoder_decoder(tmp_path / "model")
    finished = launch("zero3_cpu.yaml", str(Path(__file__).with_name("zero3_generation_worker.py")), folder)
    assert finished.code == 0, finished.err
    for rank in (0, 1):
        for beams in (1, 4):
            for length in (5, 9):
                assert f"rank {rank}, {beams} beams, {length} tokens: the same" in finished.out
