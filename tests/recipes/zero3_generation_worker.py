"""Runs on every rank: generating with weights that ZeRO-3 has cut, against the whole model, token by token."""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from swaft.training.config import TrackConfig, TrainConfig
from swaft.training.evaluation.generation import generate_tokens
from swaft.training.launch.accelerator import build_accelerator, resolve_engine, whole_model_loading
from swaft.training.launch.failure import leave, run_and_report


class Config:
    """The sections that decide how training is started."""

    track = TrackConfig()

    def __init__(self, folder: str):
        self.train = TrainConfig(output_dir=folder, per_device_train_batch_size=2)


def main(folder: str) -> None:
    config = Config(folder)
    engine = resolve_engine(config.train, os.environ, hidden_size=16)
    accelerator: Accelerator = build_accelerator(config, engine)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with whole_model_loading(accelerator):
        whole, cut = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for _ in range(2))
    torch.manual_seed(0)
    for weight in whole.parameters():
        weight.data += 3.0 * torch.randn_like(weight)  # else it writes one word over and over
    cut.load_state_dict(whole.state_dict())
    optimizer, loader = torch.optim.AdamW(cut.parameters()), DataLoader([0], batch_size=2)
    cut, _, _ = accelerator.prepare(cut, optimizer, loader)
    cut.eval()
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for beams in (1, 4):
        for length in (5, 9):
            batch = {
                "input_ids": torch.randint(3, len(tokenizer), (3, length), generator=generator),
                "attention_mask": torch.ones(3, length, dtype=torch.int64),
            }
            # One rank is done long before the other, and has to go on for its sake.
            settings = {"num_beams": beams, "max_new_tokens": 4 + 8 * accelerator.process_index}
            with torch.no_grad():
                found = generate_tokens(cut, batch, accelerator, settings)
                expected = whole.generate(**batch, do_sample=False, **settings)
            expected = expected[
                :, -found.shape[1] :
            ]  # with or without the token that the decoder starts from
            assert torch.equal(found, expected), (accelerator.process_index, beams, found, expected)
            assert len(torch.unique(expected)) > 2, expected
            print(f"rank {accelerator.process_index}, {beams} beams, {length} tokens: the same", flush=True)


if __name__ == "__main__":
    leave(run_and_report(lambda: main(sys.argv[1])))
