from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from soup_folders import bert, folder_of, loaded, random_tensors, same_bits
from torch import nn

from swaft.errors import ConfigError, StateError
from swaft.soup import average
from swaft.soup.agreement import OFF_IN_ADAPTERS

pytestmark = pytest.mark.unit

TARGETS = ["query", "dense", "word_embeddings"]


def adapter(path, seed, **options):
    """Save an adapter of `bert(0)` with random factors."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    model = get_peft_model(bert(0), LoraConfig(**(settings | options)))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def updates(path):
    """Dense updates by peft's own account, in float64, and what else is trained."""
    model = PeftModel.from_pretrained(bert(0), path).double()
    found = {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    rest = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    return {name: value.detach() for name, value in (found | rest).items()}


def distance(found, expected):
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def mean_of(paths, weights):
    each = [updates(path) for path in paths]
    return {n: sum(w * e[n] for w, e in zip(weights, each, strict=True)) / sum(weights) for n in each[0]}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_at_full_rank_the_mean_of_the_updates_is_exact(tmp_path, options):
    paths = [adapter(tmp_path / str(seed), seed, **options) for seed in range(3)]
    soup = average(paths, tmp_path / "out", weights=[1, 2, 3], lora_rank=6)
    expected = mean_of(paths, [1, 2, 3])
    assert len(expected) > 4
    assert distance(updates(tmp_path / "out"), expected) < 1e-6
    assert soup.truncation < 1e-6


def test_at_their_own_rank_the_new_factors_are_the_best_and_the_loss_is_told(tmp_path):
    paths = [adapter(tmp_path / str(seed), seed) for seed in range(3)]
    soup = average(paths, tmp_path / "out")
    expected, found = mean_of(paths, [1, 1, 1]), updates(tmp_path / "out")
    lost = whole = 0.0
    for name, exact in expected.items():
        if "modules_to_save" in name:
            assert torch.allclose(found[name], exact, atol=1e-6)
            continue
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert float((found[name] - exact).norm()) <= float((best - exact).norm()) * (1 + 1e-5)
        lost, whole = lost + float((found[name] - exact).square().sum()), whole + float(exact.square().sum())
    assert soup.truncation == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert soup.truncation > 0.1


def test_one_factor_that_is_the_same_in_all_stays_and_the_mean_is_exact(tmp_path):
    paths = [adapter(tmp_path / str(seed), seed) for seed in range(3)]
    first = loaded(paths[0])
    for path in paths[1:]:
        factors = {n: first[n] if "_A" in n else t for n, t in loaded(path).items()}
        save_file(factors, path / "adapter_model.safetensors")
    soup = average(paths, tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], first[name]) for name in first if "_A" in name)
    assert soup.truncation == 0.0
    assert distance(updates(tmp_path / "out"), mean_of(paths, [1, 1, 1])) < 1e-6


def test_one_adapter_averages_to_itself(tmp_path):
    path = adapter(tmp_path / "a", 0)
    average([path], tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), loaded(path))


def test_an_adapter_is_one_file_that_peft_opens_whatever_its_size(tmp_path):
    paths = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
    average(paths, tmp_path / "whole", lora_rank=4)
    average(paths, tmp_path / "out", lora_rank=4, max_shard_bytes=100)
    assert [path.name for path in (tmp_path / "out").glob("*safetensors*")] == ["adapter_model.safetensors"]
    assert distance(updates(tmp_path / "out"), updates(tmp_path / "whole")) == 0.0


DIFFERENT = {
    "alpha": ({"lora_alpha": 7}, "lora_alpha is 7, expected 6"),
    "targets": ({"target_modules": ["query"]}, "another .* than|target_modules"),
    "rank": ({"r": 3}, "only in the first|has shape|r is 3, expected 2"),
    "rslora": ({"use_rslora": True}, "use_rslora is True, expected False"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_adapters_configured_differently_are_refused(tmp_path, name):
    options, message = DIFFERENT[name]
    paths = [adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, **options)]
    with pytest.raises(StateError, match=message):
        average(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def configured(path, **settings):
    config = json.loads((path / "adapter_config.json").read_text()) | settings
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


BASES = {
    "another name": ({"base_model_name_or_path": "other/model"}, "base_model_name_or_path is 'other/model'"),
    "another revision": (
        {"base_model_name_or_path": "some/model", "revision": "v2"},
        "revision is 'v2', expected 'main'",
    ),
}


@pytest.mark.parametrize("name", BASES)
def test_adapters_of_different_base_models_are_refused(tmp_path, name):
    settings, message = BASES[name]
    paths = [
        configured(adapter(tmp_path / "a", 0), base_model_name_or_path="some/model", revision=None),
        configured(adapter(tmp_path / "b", 1), **settings),
    ]
    with pytest.raises(
        StateError, match=f"b is an adapter of another base model .*{message}.*make it equal in"
    ):
        average(paths, tmp_path / "out")
    configured(paths[1], base_model_name_or_path="some/model", revision="main")
    average(paths, tmp_path / "out")


def test_an_adapter_that_names_no_base_model_may_have_any(tmp_path):
    names = {"a": "some/model", "b": None}
    paths = [configured(adapter(tmp_path / n, 0), base_model_name_or_path=name) for n, name in names.items()]
    average(paths, tmp_path / "out")


def test_settings_of_training_that_differ_between_adapters_are_noted(tmp_path):
    paths = [adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, lora_dropout=0.25)]
    soup = average(paths, tmp_path / "out")
    assert soup.notes == [
        f"adapter_config.json of {paths[1]} differs from the first: lora_dropout is 0.25, there 0.0"
    ]


def test_options_that_are_off_and_that_an_older_peft_left_out_are_no_difference(tmp_path):
    paths = [adapter(tmp_path / str(i), i) for i in range(2)]
    file = paths[1] / "adapter_config.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if k not in OFF_IN_ADAPTERS}
    file.write_text(json.dumps(older))
    assert average(paths, tmp_path / "out").notes == []


def test_blocks_of_lora_are_refused(tmp_path):
    paths = [adapter(tmp_path / str(i), i) for i in range(2)]
    for path in paths:
        configured(path, use_bdlora={"nblocks": 2})
    with pytest.raises(StateError, match="use_bdlora is set, so its updates are not plain B A"):
        average(paths, tmp_path / "out")


def test_another_variant_than_plain_lora_is_refused(tmp_path):
    paths = [adapter(tmp_path / str(i), i, use_dora=True, target_modules=["query"]) for i in range(2)]
    with pytest.raises(StateError, match="use_dora is set, so its updates are not plain B A"):
        average(paths, tmp_path / "out")
    for path in paths:
        configured(path, use_dora=False)
    with pytest.raises(StateError, match="lora_magnitude_vector' is of a variant of LoRA"):
        average(paths, tmp_path / "out")


def test_another_method_than_lora_is_refused(tmp_path):
    paths = [adapter(tmp_path / str(i), i) for i in range(2)]
    for path in paths:
        configured(path, peft_type="IA3")
    with pytest.raises(StateError, match="peft_type is 'IA3'; expected LORA"):
        average(paths, tmp_path / "out")
    with pytest.raises(StateError, match="peft_type is 'IA3'; expected LORA"):
        average(paths[:1], tmp_path / "out", lora_rank=4)


def test_a_rank_is_refused_where_layers_have_ranks_of_their_own(tmp_path):
    paths = [adapter(tmp_path / str(i), i, rank_pattern={"query": 3}) for i in range(2)]
    with pytest.raises(StateError, match="--lora-rank: these adapters have ranks or alphas of their own"):
        average(paths, tmp_path / "out", lora_rank=4)
    average(paths, tmp_path / "out")


def test_adapters_whose_start_has_changed_their_base_keep_their_rank(tmp_path):
    paths = [configured(adapter(tmp_path / str(i), i), init_lora_weights="pissa") for i in range(2)]
    with pytest.raises(StateError, match=r"have init_lora_weights='pissa'.*leave --lora-rank out"):
        average(paths, tmp_path / "out", lora_rank=4)
    average(paths, tmp_path / "out")


def test_adapters_need_no_base_model(tmp_path):
    bert(0).save_pretrained(tmp_path / "base")
    paths = [adapter(tmp_path / str(seed), seed) for seed in range(2)]
    with pytest.raises(
        StateError, match=r"0 is an adapter, and --base .* a whole model; .* leave --base out"
    ):
        average(paths, tmp_path / "out", base=tmp_path / "base")


def test_an_adapter_and_a_model_have_no_average(tmp_path):
    path, other = adapter(tmp_path / "a", 0), folder_of(tmp_path / "b", random_tensors(0))
    with pytest.raises(StateError, match=r"a is an adapter and .*b a whole model"):
        average([other, path], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"lora_rank is set, and .*b is no LoRA adapter"):
        average([other], tmp_path / "out", lora_rank=4)
