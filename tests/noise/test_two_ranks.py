from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import (
    bert,
    causal_batch,
    classification_batch,
    generation_batch,
    gpt2,
    gradients_of,
    roberta,
    t5,
)
from torch.nn.parallel import DistributedDataParallel

from swaft.noise import R3F, R4F

pytestmark = pytest.mark.distributed

CASES = {
    "r3f": (lambda: R3F(sigma=0.1), bert, classification_batch),
    "one-sided": (lambda: R3F(sigma=0.1, detach="noised"), bert, classification_batch),
    "fairseq": (lambda: R3F(preset="fairseq", sigma=0.1), bert, classification_batch),
    "fairseq, unused": (lambda: R3F(preset="fairseq", sigma=0.1), bert, classification_batch),
    "rdrop": (lambda: R3F(preset="rdrop", sigma=0.1), bert, classification_batch),
    "fused": (lambda: R3F(sigma=0.1), t5, generation_batch),
    "fused, unused": (lambda: R3F(sigma=0.1), t5, generation_batch),
    "causal": (lambda: R3F(sigma=0.1), gpt2, causal_batch),
}
LOOKING_FOR_UNUSED = {"fused, unused", "r3f", "fairseq, unused"}
"""Cases under find_unused_parameters=True; in fairseq's, the second pass does not use the embeddings."""


def batches_of(rank: int, batch) -> list[dict[str, torch.Tensor]]:
    return [batch(seed=seed) for seed in (rank, rank + 2)]


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batches = batches_of(rank, classification_batch)
    found: dict[str, object] = {}

    for name, (build_objective, build, batch) in CASES.items():
        unused = name in LOOKING_FOR_UNUSED
        model = DistributedDataParallel(build(dropout=0.0), find_unused_parameters=unused)
        objective = build_objective()
        for index, inputs in enumerate(batches_of(rank, batch)):
            # The ranks talk at the second micro-step only.
            with model.no_sync() if index == 0 else nullcontext():
                objective(model, inputs).loss.backward()
        found[name] = gradients_of(model.module)
        if rank == 0:  # alone, as the proof was made with the wrapped model
            with torch.no_grad():
                objective(model.module.eval(), inputs)

    model = roberta(dropout=0.0)
    objective = R4F(sigma=0.1)
    objective.prepare_model(model)
    model = DistributedDataParallel(model)
    for batch in batches:
        out = objective(model, batch)
        out.loss.backward()
    found["r4f"] = [buffer.clone() for buffer in model.module.buffers()]

    class Silent(R3F):
        def _draw(self, embedding, **how):
            return embedding if rank == 0 else super()._draw(embedding, **how)

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


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_and_two_micro_steps_give_the_mean_of_their_gradients(ranks, name, monkeypatch):
    build_objective, build, batch = CASES[name]
    expected: dict[str, torch.Tensor] = {}
    for rank in range(2):
        monkeypatch.setattr("swaft.noise.objectives.current_rank", lambda rank=rank: rank)
        model, objective = build(dropout=0.0), build_objective()
        for inputs in batches_of(rank, batch):
            objective(model, inputs).loss.backward()
        for key, gradient in gradients_of(model).items():
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
