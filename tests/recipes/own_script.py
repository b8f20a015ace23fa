"""A script of a user's own, without swaft: accelerate alone under a launch file of the project."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
names = sorted(model.state_dict())
rows = [{"input_ids": torch.arange(5), "labels": torch.tensor(i % 2)} for i in range(16)]
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters(), lr=1e-3), DataLoader(rows, batch_size=2)
)
for batch in loader:
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
state = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    found = {"ranks": accelerator.num_processes, "whole": sorted(state) == names}
    Path(sys.argv[1]).write_text(json.dumps(found))
