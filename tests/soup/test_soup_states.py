from __future__ import annotations

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from soup_folders import bert, folder_of, loaded, same_bits
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import swaft
from swaft.averaging import export
from swaft.errors import AveragingError, StateError
from swaft.noise.spectral import normalise_head
from swaft.soup import average, open_checkpoint
from swaft.storage import files

pytestmark = pytest.mark.unit


def averaged(model, seed=0, rule=None):
    """The averager of a model that is trained for four random steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    averager = swaft.WeightAverager(model, optimizer, rule=rule or swaft.SWA(start=0), total_steps=4)
    torch.manual_seed(seed)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        averager.step()
    return averager


def trained(seed=0, rule=None):
    return averaged(torch.nn.Linear(5, 3), seed, rule)


def test_saved_averages_are_averaged_and_the_rest_comes_from_the_base(tmp_path):
    paths, exported = [], []
    for seed in range(2):
        averager = trained(seed)
        averager.save_state(tmp_path / f"state{seed}")
        averager.save_pretrained(tmp_path / f"model{seed}")
        paths.append(tmp_path / f"state{seed}")
        exported.append(loaded(tmp_path / f"model{seed}"))
    base = folder_of(
        tmp_path / "base", {"weight": torch.ones(3, 5), "bias": torch.ones(3), "frozen": torch.ones(2)}
    )
    average(paths, tmp_path / "out", base=base)
    found = loaded(tmp_path / "out")
    for name in ("weight", "bias"):
        assert torch.equal(found[name], torch.stack([e[name] for e in exported]).double().mean(0).float())
    assert torch.equal(found["frozen"], torch.ones(2))


@pytest.mark.parametrize(
    "rule",
    [
        swaft.LAWA(last=2),
        swaft.Windows(start=0, blocks=2),
        swaft.BEMA(every=1),
        swaft.PowerEMA(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_an_average_of_several_vectors_is_what_the_run_exports(tmp_path, rule):
    averager = trained(rule=rule)
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "model")
    found = open_checkpoint(tmp_path / "state")
    assert torch.equal(found.read("weight", 0, 15), loaded(tmp_path / "model")["weight"].flatten())


def test_a_state_without_members_is_refused(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swaft.WeightAverager(model, optimizer, rule=swaft.SWA(start=2), total_steps=4).save_state(
        tmp_path / "state"
    )
    with pytest.raises(StateError, match="nothing is averaged yet"):
        open_checkpoint(tmp_path / "state")


def test_one_of_several_averages_is_chosen_by_name(tmp_path):
    rules = {"a": swaft.SWA(start=0), "b": swaft.EMA(decay=0.5)}
    averager = trained(rule=rules)
    averager.save_state(tmp_path / "state")
    with pytest.raises(StateError, match="holds the averages a, b; choose one with --rule"):
        open_checkpoint(tmp_path / "state")
    averager.save_pretrained(tmp_path / "b", "b")
    found = open_checkpoint(tmp_path / "state", rule="b")
    assert torch.equal(found.read("weight", 0, 15), loaded(tmp_path / "b")["weight"].flatten())


def test_a_damaged_state_is_refused(tmp_path):
    trained().save_state(tmp_path / "state")
    (file,) = (tmp_path / "state").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StateError, match=f"{file.name} is damaged"):
        open_checkpoint(tmp_path / "state")


def trained_bert(prepare, seed=0):
    """A small classifier, made ready by `prepare` and trained for four random steps."""
    torch.manual_seed(0)
    return averaged(prepare(bert(0)), seed)


def with_adapter(model):
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["query", "dense", "word_embeddings"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    return get_peft_model(model, config)


def with_spectral_norm(model):
    normalise_head(model)
    return model


def test_the_average_of_a_lora_run_is_the_adapter_folder_that_the_run_exports(tmp_path):
    averager = trained_bert(with_adapter)
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "own")
    export.save_pretrained(averager.engine, tmp_path / "last")
    average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "last")
    assert same_bits(loaded(tmp_path / "out"), loaded(tmp_path / "own"))
    assert not same_bits(loaded(tmp_path / "out"), loaded(tmp_path / "last"))
    found, own = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("out", "own"))
    assert found == own
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"adapter_model.safetensors"}
    opened = PeftModel.from_pretrained(bert(0), tmp_path / "out")
    trained = opened.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(trained, loaded(tmp_path / "own")["base_model.model.classifier.weight"])


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules=["query"]),
        IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]),
        OFTConfig(task_type="SEQ_CLS", oft_block_size=4, target_modules=["query"]),
        LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]),
    ],
    ids=["dora", "ia3", "oft", "loha"],
)
def test_an_adapter_of_any_method_is_exported_from_its_state_and_from_its_folder(tmp_path, config):
    averager = trained_bert(lambda model: get_peft_model(model, config))
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "own")
    export.save_pretrained(averager.engine, tmp_path / "last")
    average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "last")
    average([tmp_path / "own"], tmp_path / "again")
    for found in ("out", "again"):
        assert same_bits(loaded(tmp_path / found), loaded(tmp_path / "own"))
    assert not same_bits(loaded(tmp_path / "own"), loaded(tmp_path / "last"))


def test_a_prompt_is_refused_with_its_method_and_a_way_to_export_it(tmp_path):
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    averager = trained_bert(lambda model: get_peft_model(model, config))
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "own")
    message = r"state does not fit .*peft stores 'PROMPT_TUNING' in another form .*averager.load_state"
    with pytest.raises(StateError, match=message):
        average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "own")


def test_the_averages_of_a_lora_run_ask_for_its_adapter_folder(tmp_path):
    trained_bert(with_adapter).save_state(tmp_path / "state")
    bert(0).save_pretrained(tmp_path / "base")
    with pytest.raises(StateError, match=r"state holds the weights of an adapter.*adapter folder of the run"):
        average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "base")


@pytest.mark.parametrize("rank", [None, 4])
def test_the_averages_of_several_lora_runs_are_averaged_as_their_adapter_folders_are(tmp_path, rank):
    states, folders = ([tmp_path / f"{kind}{seed}" for seed in range(2)] for kind in ("state", "own"))
    for seed, (state, folder) in enumerate(zip(states, folders, strict=True)):
        averager = trained_bert(with_adapter, seed)
        averager.save_state(state)
        averager.save_pretrained(folder)
    soup = average(states, tmp_path / "out", base=folders[0], weights=[1, 2], lora_rank=rank)
    expected = average(folders, tmp_path / "expected", weights=[1, 2], lora_rank=rank)
    assert same_bits(loaded(tmp_path / "out"), loaded(tmp_path / "expected"))
    assert soup.truncation == expected.truncation
    assert (soup.truncation > 0.01) == (rank is None)
    configs = ((tmp_path / name / "adapter_config.json").read_text() for name in ("out", "expected"))
    assert next(configs) == next(configs)


def test_a_factor_that_was_frozen_comes_from_the_base(tmp_path):
    def with_frozen_down(model):
        model = with_adapter(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return model

    for seed in range(2):
        averager = trained_bert(with_frozen_down, seed)
        averager.save_state(tmp_path / f"state{seed}")
        averager.save_pretrained(tmp_path / f"own{seed}")
    average([tmp_path / "state0", tmp_path / "state1"], tmp_path / "out", base=tmp_path / "own0")
    found, *own = (loaded(tmp_path / name) for name in ("out", "own0", "own1"))
    name = next(name for name in found if name.endswith("query.lora_B.weight"))
    assert torch.equal(found[name], torch.stack([each[name] for each in own]).double().mean(0).float())
    assert torch.equal(found[name.replace("_B", "_A")], own[0][name.replace("_B", "_A")])


def test_a_parametrized_weight_is_refused_with_a_way_to_export_it(tmp_path):
    averager = trained_bert(with_spectral_norm)
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "own")
    message = r"'classifier.parametrizations.weight.original' is a weight before .*averager.load_state"
    with pytest.raises(StateError, match=message):
        average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "own")


def test_a_model_that_transformers_stores_under_other_names_is_refused_with_a_way_to_export_it(tmp_path):
    config = Qwen3MoeConfig(
        **{"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4},
        **{"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2},
    )
    averager = averaged(Qwen3MoeForCausalLM(config))
    averager.save_state(tmp_path / "state")
    averager.save_pretrained(tmp_path / "own")
    message = (
        r"state does not fit .*gate_up_proj.*stores the weights of qwen3_moe under .*averager.load_state"
    )
    with pytest.raises(StateError, match=message):
        average([tmp_path / "state"], tmp_path / "out", base=tmp_path / "own")


@pytest.mark.parametrize("name", ["model.unfinished", ".model"])
def test_an_export_touches_no_folder_beside_its_own(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious").write_bytes(b"x")
    trained().save_pretrained(tmp_path / "model")
    assert (tmp_path / name / "precious").read_bytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "model"])


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    averager = trained()
    monkeypatch.setattr(files, "sync_tree", full)
    with pytest.raises(AveragingError, match=r"model could not be written: .*No space left"):
        averager.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
