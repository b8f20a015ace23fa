"""Finished checkpoints averaged to one Hugging Face folder, tensor by tensor, in bounded memory."""

from swaft.soup.greedy import GreedyChoice, choose_greedily, score_by_command
from swaft.soup.kinds import last_checkpoints, open_checkpoint
from swaft.soup.soup import Soup, average, average_greedily

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
