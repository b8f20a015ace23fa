from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from soup_folders import bits, folder_of, folders, golden, loaded, random_tensors, same_bits

import swaft.soup.mean as mean_module
from swaft.errors import ConfigError, StateError
from swaft.soup import average
from swaft.soup.checkpoint import SavedWeights, Spec
from swaft.soup.mean import round_once

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("slice_numel", [1 << 22, 7])
def test_the_mean_is_the_float64_mean_rounded_once(tmp_path, monkeypatch, count, slice_numel):
    monkeypatch.setattr(mean_module, "SLICE", slice_numel)
    average(folders(tmp_path, count), tmp_path / "out")
    sources = [random_tensors(seed) for seed in range(count)]
    expected = golden(sources)
    torch_mean = torch.stack([source["embed.weight"] for source in sources]).double().mean(0).float()
    assert torch.equal(expected["embed.weight"], torch_mean)
    assert same_bits(loaded(tmp_path / "out"), expected)


@pytest.mark.parametrize("weights", [[0.2, 0.8], [2, 8], [1, 0]])
def test_weights_are_of_any_scale(tmp_path, weights):
    soup = average(folders(tmp_path, 2), tmp_path / "out", weights=weights)
    expected = golden([random_tensors(0), random_tensors(1)], weights)
    assert same_bits(loaded(tmp_path / "out"), expected)
    assert [share for _, share in soup.shares] == pytest.approx([w / sum(weights) for w in weights])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_precision_are_averaged(tmp_path, dtype):
    sources = [random_tensors(seed, dtype) for seed in range(3)]
    paths = [folder_of(tmp_path / f"in{i}", source) for i, source in enumerate(sources)]
    average(paths, tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), golden(sources))


def test_equal_checkpoints_average_to_the_same_bits(tmp_path):
    tensors = random_tensors(0) | {"zeros": torch.tensor([0.0, -0.0]), "tiny": torch.tensor([1e-45, -3e-39])}
    paths = [folder_of(tmp_path / str(i), tensors) for i in range(3)]
    average(paths, tmp_path / "out", weights=[0.3, 0.3, 0.1])
    assert same_bits(loaded(tmp_path / "out"), tensors)


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number of a 16-bit type, found among all there are; of two, the one with an even last bit."""
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = words.view(dtype)
    every, order = every[every.isfinite()].double().sort(stable=True)
    words = words.view(dtype)[words.view(dtype).isfinite()].view(torch.int16)[order]
    above = torch.searchsorted(every, values).clamp(1, len(every) - 1)
    below = above - 1
    up, down = every[above] - values, values - every[below]
    even_above = words[above] % 2 == 0
    chosen = torch.where((up < down) | ((up == down) & even_above), above, below)
    return every[chosen]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_rounded_once_to_the_nearest(dtype):
    torch.manual_seed(0)
    words = torch.randint(-(1 << 15), 1 << 15, (20_000,)).to(torch.int16).view(dtype)
    words = words[words.isfinite() & (words.abs() < torch.finfo(dtype).max / 4)].double()
    neighbour = torch.nextafter(words.float(), torch.tensor(math.inf)).double()
    ulp = (words.to(dtype).view(torch.int16) + 1).view(dtype).double() - words
    ties = words + ulp / 2
    # next to a tie by less than fp32 sees: rounding by way of fp32 makes a tie of it
    near = torch.cat([ties * (1 + 1e-12), ties * (1 - 1e-12)])
    values = torch.cat([words, neighbour, ties, near, torch.randn(20_000, dtype=torch.float64)])
    values = values[values.isfinite() & (values.abs() < float(torch.finfo(dtype).max) / 2)]
    found = round_once(values.clone(), dtype).double()
    assert torch.equal(found, nearest(values, dtype))
    assert not torch.equal(values.float().to(dtype).double(), found), "the values do not tell the two apart"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_of_rounding_is_reported(tmp_path, dtype):
    soup = average(folders(tmp_path, 3), tmp_path / "out", dtype=dtype)
    found, exact = loaded(tmp_path / "out"), golden([random_tensors(seed) for seed in range(3)])
    names = [name for name in exact if exact[name].is_floating_point()]
    assert all(found[name].dtype == getattr(torch, dtype) for name in names)
    assert found["position_ids"].dtype == torch.int64
    lost = math.sqrt(sum(float((found[n].double() - exact[n].double()).square().sum()) for n in names))
    whole = math.sqrt(sum(float(exact[n].double().square().sum()) for n in names))
    assert soup.rounding == pytest.approx(lost / whole, rel=1e-4)
    assert soup.worst_rounding[0] in names
    assert soup.worst_rounding[1] >= soup.rounding


def test_rounding_to_fp32_is_next_to_nothing(tmp_path):
    assert average(folders(tmp_path, 3), tmp_path / "out").rounding < 1e-7


def test_a_mean_that_the_type_cannot_hold_is_refused_by_name(tmp_path):
    paths = [
        folder_of(tmp_path / str(i), {"fine": torch.ones(2), "large": torch.full([3], 1e6)}) for i in range(2)
    ]
    with pytest.raises(
        StateError, match=r"'large' has 1e\+06, more than torch.float16 holds; use --dtype float32"
    ):
        average(paths, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_checkpoint_that_is_not_finite_is_named(tmp_path, bad):
    paths = folders(tmp_path, 3)
    tensors = random_tensors(1)
    tensors["layer.weight"][2, 3] = bad
    paths[1] = folder_of(tmp_path / "diverged", tensors)
    with pytest.raises(StateError, match=rf"diverged: element 19 of 'layer.weight' is {bad}.*Leave that"):
        average(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_that_is_infinite_in_all_stays(tmp_path):
    mask = {"mask": torch.tensor([0.0, -math.inf])}
    average([folder_of(tmp_path / str(i), mask) for i in range(3)], tmp_path / "out")
    assert bits(loaded(tmp_path / "out")["mask"]) == bits(mask["mask"])


def test_an_element_that_is_infinite_in_all_stays_whatever_the_others_are(tmp_path):
    values = [torch.tensor([float(i), -math.inf, math.inf, 4.0]) for i in range(3)]
    paths = [folder_of(tmp_path / str(i), {"mask": each}) for i, each in enumerate(values)]
    average(paths, tmp_path / "out", dtype="bfloat16")
    expected = torch.tensor([1.0, -math.inf, math.inf, 4.0], dtype=torch.bfloat16)
    assert torch.equal(loaded(tmp_path / "out")["mask"], expected)


def test_an_element_that_is_infinite_in_some_is_refused_beside_a_mask(tmp_path):
    values = [torch.tensor([-math.inf, 1.0]), torch.tensor([-math.inf, math.inf])]
    paths = [folder_of(tmp_path / str(i), {"w": each}) for i, each in enumerate(values)]
    with pytest.raises(StateError, match="1: element 1 of 'w' is inf"):
        average(paths, tmp_path / "out")


def test_beside_a_mask_too_the_type_must_hold_the_mean(tmp_path):
    path = folder_of(tmp_path / "a", {"w": torch.tensor([-math.inf, 1e6])})
    with pytest.raises(StateError, match=r"'w' has 1e\+06, more than torch.float16 holds"):
        average([path, path], tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_single_checkpoint_that_is_not_finite_is_refused(tmp_path, bad):
    path = folder_of(tmp_path / "diverged", {"w": torch.tensor([1.0, bad])})
    other = folder_of(tmp_path / "other", {"w": torch.ones(2)})
    for paths, weights in [([path], None), ([path, other], [1, 0])]:
        with pytest.raises(StateError, match=f"diverged: element 1 of 'w' is {bad}"):
            average(paths, tmp_path / "out", weights=weights)


@pytest.mark.parametrize("weights", [[1, 0], [0, 1]])
def test_a_checkpoint_of_weight_0_is_not_read_and_a_mask_stays(tmp_path, weights):
    tensors = {"w": torch.ones(2), "mask": torch.tensor([0.0, -math.inf])}
    paths = [folder_of(tmp_path / "a", tensors), folder_of(tmp_path / "b", tensors)]
    spoilt = weights.index(0)
    save_file(tensors | {"w": torch.full([2], math.nan)}, paths[spoilt] / "model.safetensors")
    average(paths, tmp_path / "out", weights=weights)
    assert same_bits(loaded(tmp_path / "out"), tensors)


def test_a_checkpoint_of_weight_0_must_be_of_the_same_model(tmp_path):
    paths = [folder_of(tmp_path / str(i), {"w": torch.ones(i + 1)}) for i in range(2)]
    with pytest.raises(StateError, match="another model"):
        average(paths, tmp_path / "out", weights=[1, 0])


@pytest.mark.parametrize("scale", [1e307, 1e308, 1e-323])
def test_weights_of_any_size_make_the_same_mean(tmp_path, scale):
    tensors = {"w": torch.full([4], 100.0)}
    paths = [folder_of(tmp_path / str(i), tensors) for i in range(2)]
    soup = average(paths, tmp_path / "out", weights=[scale, scale])
    assert same_bits(loaded(tmp_path / "out"), tensors)
    assert [share for _, share in soup.shares] == [0.5, 0.5]


def test_a_sum_that_float64_cannot_hold_is_refused(tmp_path):
    path = folder_of(tmp_path / "a", {"w": torch.full([2], 1e308, dtype=torch.float64)})
    with pytest.raises(StateError, match="'w': the sum over 2 checkpoints is more than float64 holds"):
        average([path, path], tmp_path / "out")


def test_what_the_base_alone_holds_may_be_infinite(tmp_path):
    extra = {"bounds": torch.tensor([1.0, math.inf])}
    state = in_memory(tmp_path, {"w": torch.ones(2)})
    mean = mean_module.Mean([(1.0, state)], torch.float32, in_memory(tmp_path, {"w": torch.ones(2)} | extra))
    assert torch.equal(next(mean.slices("bounds")), extra["bounds"])


def in_memory(path, tensors):
    """A checkpoint in memory."""
    return SavedWeights(
        path=path,
        specs={name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()},
        read=lambda name, start, end: tensors[name].flatten()[start:end].clone(),
        label=str(path),
    )


def test_nan_in_all_is_refused(tmp_path):
    paths = [folder_of(tmp_path / str(i), {"w": torch.tensor([1.0, math.nan])}) for i in range(2)]
    with pytest.raises(StateError, match="element 1 of 'w' is nan"):
        average(paths, tmp_path / "out")


@pytest.mark.parametrize("name", ["position_ids", "mask"])
def test_integers_that_differ_are_refused_by_name(tmp_path, name):
    paths = folders(tmp_path, 2)
    tensors = random_tensors(3)
    tensors[name][1] = 7  # True, in the mask
    paths.append(folder_of(tmp_path / "other", tensors))
    with pytest.raises(
        StateError, match=f"'{name}' is torch.*which cannot be averaged, and differs between .*in0"
    ):
        average(paths, tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2"),
        ([1, -1], "numbers from 0"),
        ([0, 0], "not all 0"),
        ([1, math.nan], "numbers from 0"),
    ],
)
def test_weights_that_make_no_mean_are_refused(tmp_path, weights, message):
    with pytest.raises(ConfigError, match=message):
        average(folders(tmp_path, 2), tmp_path / "out", weights=weights)


def test_no_checkpoint_and_an_unknown_type_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint was named"):
        average([], tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype is 'int8', expected one of float32"):
        average(folders(tmp_path, 1), tmp_path / "out", dtype="int8")
