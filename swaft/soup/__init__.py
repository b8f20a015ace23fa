"""Finished checkpoints averaged into one Hugging Face folder, tensor by tensor, in bounded memory."""

from swaft.soup.kinds import last_checkpoints, open_checkpoint
from swaft.soup.soup import (
    GreedyChoice,
    Soup,
    average,
    average_greedily,
    choose_greedily,
    score_by_command,
)

__all__ = [
    "GreedyChoice",
    "Soup",
    "average",
    "average_greedily",
    "choose_greedily",
    "last_checkpoints",
    "open_checkpoint",
    "score_by_command",
]
