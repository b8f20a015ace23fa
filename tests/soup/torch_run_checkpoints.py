"""Checkpoints as runs under torch alone write them, of a model with everything that is stored in its own way."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from swaft.distributed import Ranks
from swaft.storage import hash_file
from swaft.training.run.checkpoints import save_checkpoint
from swaft.training.run.engine_state import save_engine


class Net(nn.Module):
    """Tied and frozen weights, buffers, a scalar, and rows that do not go evenly into ranks."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(13, 5), nn.Linear(5, 13, bias=False)
        self.head.weight = self.embed.weight
        self.hidden, self.narrow = nn.Linear(5, 5), nn.Linear(5, 1)
        self.register_buffer("running", torch.zeros(5))
        self.register_buffer("places", torch.arange(4))
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.frozen(self.hidden(self.embed(ids).mean(1)))
        self.running += hidden.detach().mean(0)
        return self.head(hidden).square().mean() + self.narrow(hidden).square().mean()


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One optimizer step on rows of its own."""
    generator = torch.Generator().manual_seed(number)
    model(torch.randint(13, (4, 3), generator=generator)).backward()
    optimizer.step()
    optimizer.zero_grad()


def write_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer, *, ranks: Ranks | None = None
) -> Path:
    """Seal a checkpoint that holds the engine's state, and nothing else, as a run does (collective)."""
    ranks = ranks or Ranks()

    def write(folder):
        save_engine(model, model, optimizer, folder)
        if not ranks.is_main:
            return {}
        return {f"engine/{file.name}": hash_file(file) for file in (folder / "engine").iterdir()}

    save_checkpoint(ranks, run, step, write=write, content={})
    return run / f"checkpoint-{step}"


def stored(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights as a Hugging Face folder has them, tied ones once."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}
