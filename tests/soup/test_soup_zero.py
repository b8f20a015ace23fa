"""DeepSpeed's checkpoints, made here from the description of their fields and read by DeepSpeed for comparison."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from soup_folders import Attack, bits, folder_of, golden, loaded, same_bits
from torch import Tensor

from swaft.distributed import Ranks
from swaft.errors import StateError
from swaft.soup import average, average_greedily, last_checkpoints, open_checkpoint
from swaft.storage import hash_file
from swaft.training.run.checkpoints import save_checkpoint

zero_to_fp32 = pytest.importorskip("deepspeed.utils.zero_to_fp32")

pytestmark = pytest.mark.unit

GROUPS = [["embed.weight", "layer.weight"], ["layer.bias", "norm.weight", "scale"]]
FROZEN = ["frozen.weight"]


def tensors_of(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = [(13, 5), (7, 3), (3,), (11,), (1,), (5, 3)]
    names = [*GROUPS[0], *GROUPS[1], *FROZEN]
    return {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)} | {
        "counter": torch.arange(4)
    }


def padded(values: Tensor, numel: int) -> Tensor:
    return torch.cat([values, torch.full([numel - len(values)], math.nan)])


def checkpoint(
    path, tensors, *, stage, world, tag="global_step7", groups=GROUPS, frozen_names=FROZEN, alignment=1
):
    """Write what `save_checkpoint` writes, as far as `zero_to_fp32` reads it."""
    folder = path / tag
    folder.mkdir(parents=True)
    (path / "latest").write_text(tag)
    common = {
        "buffer_names": [name for name in tensors if name == "counter"],
        "module": {name: tensors[name] for name in tensors if name == "counter"},
        "param_shapes": [{name: tensors[name].shape for name in group} for group in groups],
        "shared_params": {"tied.weight": "embed.weight"},
        "frozen_param_shapes": {name: tensors[name].shape for name in frozen_names},
        "ds_version": "0.0",
    }
    parts: list[list[Tensor]] = [[] for _ in range(world)]
    for group in groups:
        if stage == 3:
            pieces: list[list[Tensor]] = [[] for _ in range(world)]
            for name in group:
                share = math.ceil(tensors[name].numel() / world)
                whole = padded(tensors[name].flatten(), share * world)
                for rank, piece in enumerate(whole.split(share)):
                    pieces[rank].append(piece)
            for rank in range(world):
                parts[rank].append(torch.cat(pieces[rank]))
        else:
            aligned = [
                padded(tensors[n].flatten(), -(-tensors[n].numel() // alignment) * alignment) for n in group
            ]
            flat = torch.cat(aligned)
            share = math.ceil(len(flat) / world)
            for rank, piece in enumerate(padded(flat, share * world).split(share)):
                parts[rank].append(piece.clone())
    for rank in range(world):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        masters = [part.requires_grad_() for part in parts[rank]]  # as DeepSpeed's are, when they are pickled
        state = {"zero_stage": stage, "partition_count": world, key: masters}
        if alignment > 1:
            paddings = [[-tensors[name].numel() % alignment for name in group] for group in groups]
            state["param_alignment_paddings"] = paddings
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        frozen = {}
        for name in frozen_names:
            share = math.ceil(tensors[name].numel() / world)
            whole = padded(tensors[name].flatten(), share * world)
            frozen[name] = whole.split(share)[rank].clone() if stage == 3 else tensors[name]
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(
                common | {"frozen_param_fragments": frozen}, folder / f"{prefix}mp_rank_00_model_states.pt"
            )
    return path


@pytest.mark.parametrize(
    ("stage", "alignment"), [(1, 1), (2, 1), (3, 1), (2, 4)], ids=["1", "2", "3", "2, each weight aligned"]
)
@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_every_slice_is_what_deepspeed_puts_together(tmp_path, stage, world, alignment):
    tensors = tensors_of(0)
    path = checkpoint(tmp_path / "c", tensors, stage=stage, world=world, alignment=alignment)
    theirs = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(path))
    with open_checkpoint(path, trust_pickle=True) as found:
        assert found.aliases == {"tied.weight": "embed.weight"}
        assert found.specs.keys() | found.aliases.keys() == theirs.keys()
        for name, spec in found.specs.items():
            expected = theirs[name].contiguous()
            assert (spec.dtype, spec.shape) == (expected.dtype, tuple(expected.shape))
            assert bits(found.read(name, 0, spec.numel)) == bits(expected)
            assert torch.equal(expected, tensors[name])
            for start in range(spec.numel):
                end = min(start + 4, spec.numel)
                assert torch.equal(found.read(name, start, end), expected.flatten()[start:end])


def test_checkpoints_of_any_stage_and_number_of_ranks_average_with_a_base(tmp_path):
    stages = [(1, 2), (2, 3), (3, 1)]
    sources = [tensors_of(seed) for seed in range(3)]
    for source in sources[1:]:
        source["frozen.weight"] = sources[0]["frozen.weight"]
    paths = [
        checkpoint(tmp_path / str(i), sources[i], stage=stage, world=world)
        for i, (stage, world) in enumerate(stages)
    ]
    extra = {"pretrained.weight": torch.randn(3), "tied.weight": torch.randn(13, 5)}
    base = folder_of(tmp_path / "base", tensors_of(9) | extra)
    average(paths, tmp_path / "out", base=base, trust_pickle=True)
    expected = {
        name: torch.stack([source[name] for source in sources]).double().mean(0).float()
        for name in tensors_of(0)
        if name != "counter"
    }
    expected |= {"counter": torch.arange(4), "pretrained.weight": extra["pretrained.weight"]}
    assert same_bits(loaded(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_checkpoint_averages_to_its_masters(tmp_path, stage):
    tensors = tensors_of(0)
    path = checkpoint(tmp_path / "c", tensors, stage=stage, world=2)
    average([path], tmp_path / "out", base=folder_of(tmp_path / "base", tensors_of(1)), trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), tensors)


def test_a_checkpoint_that_names_no_stage_is_of_an_optimizer_that_partitions_as_stage_1_does(tmp_path):
    tensors = tensors_of(0)
    path = checkpoint(tmp_path / "c", tensors, stage=1, world=2)
    for file in (path / "global_step7").glob(
        "*_optim_states.pt"
    ):  # as DeepSpeed's for bf16 with fp32 gradients
        state = torch.load(file, weights_only=False)
        del state["optimizer_state_dict"]["zero_stage"]
        torch.save(state, file)
    average([path], tmp_path / "out", base=folder_of(tmp_path / "base", tensors_of(1)), trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), tensors)


def trainer_checkpoint(path, tensors, dtype=torch.bfloat16):
    """Write what transformers' Trainer leaves under DeepSpeed: the working weights, and DeepSpeed's files."""
    copy = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    return checkpoint(folder_of(path, copy), tensors, stage=2, world=2)


def test_the_masters_are_averaged_and_not_the_16_bit_copy_next_to_them(tmp_path):
    sources = [tensors_of(0), tensors_of(1)]
    paths = [trainer_checkpoint(tmp_path / f"checkpoint-{i}", source) for i, source in enumerate(sources)]
    with pytest.raises(StateError, match=r"only a 16-bit copy of the fp32 weights .* pass --trust-pickle$"):
        average(paths, tmp_path / "out")
    average(last_checkpoints(tmp_path, 2), tmp_path / "out", trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), golden(sources))


def test_a_fp32_folder_is_read_as_it_is_although_deepspeeds_files_are_next_to_it(tmp_path):
    path = trainer_checkpoint(tmp_path / "checkpoint-1", tensors_of(0), torch.float32)
    average([path], tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), tensors_of(0))


def test_a_greedy_soup_scores_the_masters_alone_too(tmp_path):
    sources = [tensors_of(0), tensors_of(1)]
    paths = [trainer_checkpoint(tmp_path / f"checkpoint-{i}", source) for i, source in enumerate(sources)]
    scored = []

    def score(folder):
        scored.append(loaded(folder))
        return -len(scored)

    average_greedily(paths, tmp_path / "out", score=score, higher_is_better=True, trust_pickle=True)
    assert all(same_bits(*pair) for pair in zip(scored, [*sources, golden(sources)], strict=True))


def test_the_masters_of_an_adapter_take_the_names_in_its_own_folder(tmp_path):
    torch.manual_seed(0)
    names = {f"layer.lora_{x}.default.weight": f"layer.lora_{x}.weight" for x in "AB"}
    masters = dict(zip(names, (torch.randn(2, 3), torch.randn(5, 2)), strict=True))
    path = tmp_path / "checkpoint-1"
    checkpoint(path, masters, stage=2, world=2, groups=[[*names]], frozen_names=[])
    save_file({names[n]: t.bfloat16() for n, t in masters.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    average([path], tmp_path / "out", trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), {names[n]: t for n, t in masters.items()})


def run_checkpoint(run, step, tensors):
    """Write what a run of a recipe leaves under DeepSpeed: its files in `engine`, sealed, and no `latest`."""

    def write(folder):
        checkpoint(folder, tensors, stage=2, world=2, tag="engine")
        (folder / "latest").unlink()
        return {f"engine/{file.name}": hash_file(file) for file in (folder / "engine").iterdir()}

    save_checkpoint(Ranks(), run, step, write=write, content={})
    return run / f"checkpoint-{step}"


def test_checkpoints_of_a_run_under_deepspeed_are_averaged(tmp_path):
    sources = [tensors_of(seed) for seed in range(3)]
    for source in sources[1:]:
        source["frozen.weight"] = sources[0]["frozen.weight"]
    paths = [run_checkpoint(tmp_path / "run", step, source) for step, source in enumerate(sources)]
    base = folder_of(tmp_path / "base", tensors_of(9))
    average(last_checkpoints(tmp_path / "run", 2), tmp_path / "out", base=base, trust_pickle=True)
    assert same_bits(loaded(tmp_path / "out"), golden(sources[1:]))
    average(paths[:1], tmp_path / "first", base=base, trust_pickle=True)
    assert same_bits(loaded(tmp_path / "first"), sources[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_adapter_is_taken_from_a_checkpoint_that_also_holds_the_frozen_weights(tmp_path, stage):
    tensors = {
        "base_model.model.q.lora_A.default.weight": torch.randn(2, 4),
        "base_model.model.q.lora_B.default.weight": torch.randn(4, 2),
        "base_model.model.head.modules_to_save.default.weight": torch.randn(3, 4),
        "base_model.model.q.base_layer.weight": torch.randn(4, 4),
        "base_model.model.head.original_module.weight": torch.randn(3, 4),
        "counter": torch.arange(4),
    }
    trained, frozen = list(tensors)[:3], list(tensors)[3:5]
    path = checkpoint(
        tmp_path / "c", tensors, stage=stage, world=2, groups=[trained[:2], trained[2:]], frozen_names=frozen
    )
    plain = [name.replace(".modules_to_save", "").replace(".default", "") for name in trained]
    base = {name: torch.zeros_like(tensors[own]) for name, own in zip(plain, trained, strict=True)}
    for folder, held in [
        ("last", base),
        ("less", dict(list(base.items())[:2])),
        ("more", base | {"x": torch.ones(1)}),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        save_file(held, tmp_path / folder / "adapter_model.safetensors")
    average([path], tmp_path / "out", base=tmp_path / "last", trust_pickle=True)
    expected = {name: tensors[own] for name, own in zip(plain, trained, strict=True)}
    assert same_bits(loaded(tmp_path / "out"), expected)
    with pytest.raises(StateError, match=r"head.weight' of shape \[3, 4\] is missing there"):
        average([path], tmp_path / "no", base=tmp_path / "less", trust_pickle=True)
    with pytest.raises(
        StateError, match=r"more holds 'x', which .*c lacks, .*adapter folder of the same run"
    ):
        average([path], tmp_path / "no", base=tmp_path / "more", trust_pickle=True)


def test_a_checkpoint_of_a_run_is_not_unpickled_without_consent(tmp_path):
    path = run_checkpoint(tmp_path / "run", 1, tensors_of(0))
    for file in (path / "engine").iterdir():
        size = file.stat().st_size
        file.write_bytes(pickle.dumps(Attack()).ljust(size, b"."))
    with pytest.raises(StateError, match=r"engine is a DeepSpeed checkpoint.*pass --trust-pickle"):
        open_checkpoint(path)
    with pytest.raises(StateError, match=r"states.pt is damaged"):
        open_checkpoint(path, trust_pickle=True)


def test_a_file_that_the_run_did_not_write_is_not_opened(tmp_path):
    path = run_checkpoint(tmp_path / "run", 1, tensors_of(0))
    (path / "engine" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(StateError, match=r"rank_2.*is not among the files that .* was written with"):
        open_checkpoint(path, trust_pickle=True)


def test_a_base_is_asked_for_and_must_be_the_same_model(tmp_path):
    path = checkpoint(tmp_path / "c", tensors_of(0), stage=2, world=2)
    with pytest.raises(StateError, match=r"holds weights alone; name a Hugging Face folder .* as --base"):
        average([path], tmp_path / "out", trust_pickle=True)
    other = folder_of(tmp_path / "base", {"embed.weight": torch.ones(2)})
    with pytest.raises(
        StateError, match=r"base is another model .*: 'counter' of shape \[4\] is missing there"
    ):
        average([path], tmp_path / "out", base=other, trust_pickle=True)


def test_nothing_is_unpickled_without_consent(tmp_path):
    path = checkpoint(tmp_path / "c", tensors_of(0), stage=2, world=1)
    for file in (path / "global_step7").iterdir():
        file.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(StateError, match=r"runs whatever code it holds.*pass --trust-pickle"):
        open_checkpoint(path)


def damage_count(folder):
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def damage_cut(folder):
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-500])


def damage_models(folder):
    (folder / "mp_rank_00_model_states.pt").unlink()


def damage_fields(folder):
    torch.save({"buffer_names": []}, folder / "mp_rank_00_model_states.pt")


def damage_parallel(folder):
    state = (folder / "mp_rank_00_model_states.pt").read_bytes()
    (folder / "mp_rank_01_model_states.pt").write_bytes(state)


def damage_sizes(folder):
    file = folder / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    state["param_shapes"][0]["layer.weight"] = torch.Size([700, 3])
    torch.save(state, file)


@pytest.mark.parametrize(
    "damage", [damage_count, damage_cut, damage_models, damage_fields, damage_parallel, damage_sizes]
)
def test_a_checkpoint_that_is_damaged_is_an_error_that_names_it(tmp_path, damage):
    path = checkpoint(tmp_path / "c", tensors_of(0), stage=2, world=2)
    damage(path / "global_step7")
    with pytest.raises(StateError, match="global_step7 could not be read"):
        open_checkpoint(path, trust_pickle=True)


@pytest.mark.parametrize("tag", ["../c/global_step7", "/etc", "", "nothing"])
def test_a_tag_that_is_no_folder_beside_it_is_not_followed(tmp_path, tag):
    path = checkpoint(tmp_path / "c", tensors_of(0), stage=2, world=1)
    (path / "latest").write_text(tag)
    with pytest.raises(StateError, match="not a checkpoint that can be averaged"):
        open_checkpoint(path, trust_pickle=True)
