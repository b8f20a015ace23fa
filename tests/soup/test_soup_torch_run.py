"""Checkpoints of runs under torch alone: written by the code that writes a run's, and averaged to the bit."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_folders import Attack, bits, folder_of, golden, loaded, same_bits
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, save
from torch_run_checkpoints import Net, stored, take_step, write_checkpoint

from swaft.errors import StateError
from swaft.soup import agreement, average, last_checkpoints, open_checkpoint, torch_engine
from swaft.soup import mean as soup_mean

pytestmark = pytest.mark.unit


class Run:
    """Three checkpoints of a run in one process, the live weights of each, and those it began with as a base."""

    def __init__(self, folder: Path):
        self.folder, self.lives = folder / "run", list[dict[str, Tensor]]()
        net = Net(0)
        net.crossed = nn.Parameter(torch.randn(4, 6).t())  # stored as it lies, columns first
        net.unused = nn.Parameter(
            torch.randn(3).bfloat16()
        )  # the optimizer has nothing for it, and it is not tied
        self.base = folder_of(
            folder / "base", {name: each.contiguous() for name, each in stored(net).items()}
        )
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for step in range(1, 4):
            net.crossed.grad = torch.randn(6, 4)
            take_step(net, optimizer, step)
            write_checkpoint(self.folder, step, net, optimizer)
            self.lives.append(stored(net))

    @property
    def paths(self) -> list[Path]:
        return last_checkpoints(self.folder, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("torch-run"))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(run.paths[0], tmp_path / "checkpoint-1"))


def test_every_slice_is_that_of_the_live_weights(run):
    live = run.lives[2]
    trained = {name for name in live if not name.startswith("frozen")}
    with open_checkpoint(run.paths[2], trust_pickle=True) as found:
        assert found.specs.keys() == trained | {"head.weight"}
        for name in trained:
            tensor, spec = live[name], found.specs[name]
            assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
            for start in range(spec.numel):
                end = min(start + 4, spec.numel)
                assert bits(found.read(name, start, end)) == bits(tensor.flatten()[start:end])
            assert bits(found.read(name, 0, spec.numel)) == bits(tensor)
            assert found.read(name, 1, 1).shape == (0,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_many_files_keeps_few_of_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_engine, "MAPPED", 2)
    weights = {f"weight{i}": torch.full((3, i + 1), float(i)) for i in range(30)}
    writer = FileSystemWriter(tmp_path, single_file_per_rank=False)
    save({"model": weights}, storage_writer=writer, no_dist=True)
    assert len(list(tmp_path.glob("*.distcp"))) == 30
    before = len(os.listdir("/proc/self/fd"))
    found = torch_engine.open_torch_engine(tmp_path)
    assert all(found.read(name, 0, each.numel()).equal(each.flatten()) for name, each in weights.items())
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("slice_", [3, 1 << 20])
def test_the_average_is_the_mean_of_the_live_weights_rounded_once(run, tmp_path, monkeypatch, slice_):
    monkeypatch.setattr(soup_mean, "SLICE", slice_)
    monkeypatch.setattr(agreement, "SLICE", slice_)
    average(run.paths, tmp_path / "out", base=run.base, trust_pickle=True)
    expected = golden(run.lives)
    assert expected["frozen.weight"].equal(load_file(run.base / "model.safetensors")["frozen.weight"])
    assert same_bits(loaded(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_what_is_read_may_be_changed_and_the_files_stay_as_they_are(run):
    with open_checkpoint(run.paths[0], trust_pickle=True) as found:
        for name in ("hidden.bias", "crossed"):
            before = found.read(name, 0, 5).clone()
            found.read(name, 0, 5).fill_(7)
            assert torch.equal(found.read(name, 0, 5), before)


def test_what_a_base_has_under_both_names_is_written_under_both(run, tmp_path):
    both = stored(Net(0)) | {"head.weight": torch.randn(13, 5)}
    base = folder_of(tmp_path / "base", both | {"crossed": torch.zeros(6, 4), "unused": torch.zeros(3)})
    average(run.paths, tmp_path / "out", base=base, trust_pickle=True)
    found = loaded(tmp_path / "out")
    assert torch.equal(found["head.weight"], golden(run.lives)["embed.weight"])
    assert torch.equal(found["head.weight"], found["embed.weight"])


@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_weights_that_only_began_as_the_same_are_not_taken_for_tied(tmp_path, rate):
    net = Net(0)
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    base = folder_of(tmp_path / "base", stored(net))
    take_step(net, optimizer, 0)
    path = write_checkpoint(tmp_path / "run", 1, net, optimizer)
    with pytest.raises(StateError, match=r"base is another model .*: 'head.weight' .* is missing there"):
        average([path], tmp_path / "out", base=base, trust_pickle=True)


def test_all_that_is_lacking_is_named_at_once(run, tmp_path):
    with pytest.raises(StateError, match=r"engine is a distributed checkpoint.*--trust-pickle.*as --base"):
        average(run.paths, tmp_path / "out")
    with pytest.raises(StateError, match=r"holds weights alone; name .* as --base") as alone:
        average(run.paths, tmp_path / "out", trust_pickle=True)
    assert "--trust-pickle" not in str(alone.value)
    with pytest.raises(StateError, match=r"pass --trust-pickle") as alone:
        average(run.paths, tmp_path / "out", base=run.base)
    assert "--base" not in str(alone.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_file_is_named_and_not_opened(copy, name):
    file = copy / "engine" / name
    file.write_bytes(pickle.dumps(Attack()).ljust(file.stat().st_size, b"."))
    with pytest.raises(StateError, match=rf"{name} is damaged"):
        open_checkpoint(copy, trust_pickle=True)


def test_a_file_that_the_run_did_not_write_is_not_opened(copy):
    (copy / "engine" / "__1_0.distcp").write_bytes(b"")
    with pytest.raises(StateError, match=r"__1_0.distcp is not among the files that .* was written with"):
        open_checkpoint(copy, trust_pickle=True)


def test_a_file_that_is_gone_is_named(copy):
    (copy / "engine" / "__0_0.distcp").unlink()
    with pytest.raises(StateError, match=r"__0_0.distcp is missing"):
        open_checkpoint(copy, trust_pickle=True)


def test_a_distributed_checkpoint_that_no_run_has_sealed_is_refused(copy):
    with pytest.raises(StateError, match=r"engine is a distributed checkpoint of torch without the manifest"):
        open_checkpoint(copy / "engine", trust_pickle=True)
    (copy / "manifest.json").unlink()
    (copy / "COMPLETE").unlink()
    with pytest.raises(StateError, match=r"is not a checkpoint that can be averaged"):
        open_checkpoint(copy, trust_pickle=True)


class WithAdapter(nn.Module):
    """Names as peft gives them."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})

    def factors(self) -> dict[str, Tensor]:
        """A copy, under the names of an adapter folder."""
        return {f"layer.{name.replace('default.', '')}": p.clone() for name, p in self.state_dict().items()}


def test_adapters_take_their_folder_as_the_base_and_their_updates_are_averaged(run, tmp_path):
    net, paths, trained = nn.ModuleDict({"layer": WithAdapter()}), [], []
    for step in (1, 2):
        for parameter in net.parameters():
            nn.init.normal_(parameter)
        trained.append(net["layer"].factors())
        paths.append(write_checkpoint(tmp_path / "lora", step, net, torch.optim.AdamW(net.parameters())))
    with pytest.raises(StateError, match=r"weights of an adapter.*name the adapter folder .* as --base"):
        average(paths[:1], tmp_path / "out", base=run.base, trust_pickle=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    save_file({n: torch.zeros_like(t) for n, t in trained[0].items()}, adapter / "adapter_model.safetensors")
    average(paths[:1], tmp_path / "one", base=adapter, trust_pickle=True)
    assert same_bits(loaded(tmp_path / "one"), trained[0])
    average(paths, tmp_path / "out", base=adapter, trust_pickle=True, lora_rank=4)  # alpha / r stays 2
    found, *each = (
        t["layer.lora_B.weight"].double() @ t["layer.lora_A.weight"].double()
        for t in (loaded(tmp_path / "out"), *trained)
    )
    assert torch.allclose(found, sum(each) / 2, atol=1e-6)
