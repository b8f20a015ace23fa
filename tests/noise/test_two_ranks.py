from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import bert, classification_batch, roberta
from torch.nn.parallel import DistributedDataParallel

from swaft.noise import R3F, R4F, RDrop

pytestmark = pytest.mark.distributed

OBJECTIVES = {
    "r3f": lambda: R3F(sigma=0.1),
    "one-sided": lambda: R3F(sigma=0.1, detach="noised"),
    "fairseq": lambda: R3F(preset="fairseq", sigma=0.1),
    "rdrop": RDrop,
}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batches = [classification_batch(seed=seed) for seed in (rank, rank + 2)]
    found: dict[str, object] = {}

    for name, build in OBJECTIVES.items():
        model, objective = DistributedDataParallel(bert(dropout=0.0)), build()
        for index, batch in enumerate(batches):  # accumulation: the ranks talk at the second micro-step only
            with model.no_sync() if index == 0 else nullcontext():
                objective(model, batch).loss.backward()
        found[name] = gradients(model.module)

    model = roberta(dropout=0.0)
    objective = R4F(sigma=0.1)
    objective.prepare_model(model)
    model = DistributedDataParallel(model)
    for batch in batches:
        out = objective(model, batch)
        out.loss.backward()
    found["r4f"] = [buffer.clone() for buffer in model.module.buffers()]

    class Silent(R3F):
        def _disturb(self, embedding, settings):
            return embedding if rank == 0 else super()._disturb(embedding, settings)

    out = Silent(sigma=0.1)(DistributedDataParallel(bert()), batches[0])  # rank 0 alone must not raise
    found["silent"] = float(out.changed)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_and_two_micro_steps_give_the_mean_of_their_gradients(ranks, name, monkeypatch):
    expected: dict[str, torch.Tensor] = {}
    for rank in range(2):
        monkeypatch.setattr("swaft.noise.objectives.current_rank", lambda rank=rank: rank)
        model, objective = bert(dropout=0.0), OBJECTIVES[name]()
        for seed in (rank, rank + 2):
            objective(model, classification_batch(seed=seed)).loss.backward()
        for key, gradient in gradients(model).items():
            expected[key] = expected.get(key, 0) + gradient / 2
    for found in ranks:
        assert found[name].keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[name][key], gradient, rtol=1e-4, atol=1e-7)
    for key in expected:
        assert torch.equal(ranks[0][name][key], ranks[1][name][key])


def test_ranks_agree_on_the_vectors_of_the_spectral_norm(ranks):
    assert len(ranks[0]["r4f"]) > 0
    for a, b in zip(ranks[0]["r4f"], ranks[1]["r4f"], strict=True):
        assert torch.equal(a, b)


def test_ranks_decide_together_whether_the_noise_arrives(ranks):
    assert ranks[0]["silent"] == 0
    assert ranks[1]["silent"] > 0.99
