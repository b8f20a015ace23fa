from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lora_models import bert
from peft import LoraConfig, MultitaskPromptTuningConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_runs import moved
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from swaft.averaging import attach_engine, export, save_pretrained
from swaft.averaging.shards import Scratch, gather_trained, scatter_trained
from swaft.errors import AveragingError, ConfigError, StateError

pytestmark = pytest.mark.unit


def engine_of(model):
    return attach_engine(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_whoever_may_read_other_new_files_may_read_the_weights(mask, tmp_path):
    before = os.umask(mask)
    try:
        save_pretrained(engine_of(nn.Linear(3, 2)), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(["model.safetensors", "README.md"], 0o666 & ~mask)


@pytest.mark.parametrize("parametrize", [spectral_norm, weight_norm])
def test_a_parametrized_weight_is_written_as_what_evaluation_uses(parametrize, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), parametrize(nn.Linear(3, 2))).train()
    model(torch.randn(2, 4))
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(saved["1.weight"], model.eval()[1].weight)


def test_a_parametrization_is_evaluated_for_the_folder_without_the_hooks_of_an_engine(tmp_path):
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2)))
    passes = []
    for (
        part
    ) in model.modules():  # ZeRO-3 hangs such hooks on every part, and waits for all ranks to make its pass
        part.register_forward_pre_hook(lambda module, args: passes.append(module))
        part.register_forward_hook(lambda module, args, output: passes.append(module))
    save_pretrained(engine_of(model), tmp_path / "out")
    assert passes == []
    model(torch.randn(2, 3))
    assert passes  # the model's own hooks are as they were


def test_a_head_of_two_nameless_labels_is_read_back_where_its_type_begins_with_three(tmp_path):
    sizes = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
    }
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    model = BartForSequenceClassification(BartConfig(vocab_size=8, num_labels=2, **sizes, **heads))
    save_pretrained(engine_of(model), tmp_path / "out")
    read = BartForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(read.classification_head.out_proj.weight, model.classification_head.out_proj.weight)


def test_a_parametrization_that_transformers_makes_with_every_model_of_the_class_stays_one(tmp_path):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "classifier_proj_size"), 8)
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,)}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(num_hidden_layers=1, num_attention_heads=2, **sizes, **convolutions, **position)
    model = Wav2Vec2ForSequenceClassification(config)
    spectral_norm(model.classifier)  # one of the user's, which is folded
    save_pretrained(engine_of(model), tmp_path / "out")
    read, info = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rows = torch.randn(2, 400)
    assert torch.allclose(read.eval()(rows).logits, model.eval()(rows).logits, atol=1e-6)


def test_a_plain_module_leaves_its_weights_tied_ones_under_both_names(tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(saved["0.weight"], model[0].weight)
    assert torch.equal(saved["1.weight"], model[0].weight)


def test_a_module_that_saves_itself_in_its_own_way_leaves_its_weights(tmp_path):
    class Own(nn.Linear):
        def save_pretrained(self, folder, **kwargs):
            raise AssertionError("which would write the live weights")

    model = Own(2, 3)
    save_pretrained(engine_of(model), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], model.weight)


def test_buffers_travel_and_those_that_are_not_persistent_do_not(tmp_path):
    model = nn.BatchNorm1d(3)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    model(torch.randn(5, 3))
    save_pretrained(engine_of(model), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert torch.equal(saved["running_mean"], model.running_mean)


@pytest.mark.parametrize("make", ["file", "folder with a file"])
def test_nothing_is_overwritten(make, tmp_path):
    target = tmp_path / "out"
    held = target if make == "file" else target / "held"
    held.parent.mkdir(exist_ok=True)
    held.write_text("mine")
    with pytest.raises(AveragingError, match="name another path"):
        save_pretrained(engine_of(nn.Linear(2, 2)), target)
    assert held.read_text() == "mine"


def test_a_place_where_a_disk_is_mounted_is_refused_before_anything_is_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(AveragingError, match=r"where a disk is mounted.*name one inside it"):
        save_pretrained(engine_of(nn.Linear(2, 2)), tmp_path)


def test_frozen_weights_that_there_is_no_room_for_are_an_error_of_every_rank(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    model[1].requires_grad_(False)
    engine, empty = engine_of(model), Scratch.empty

    def full(room, shape, *dtype):
        if 3 in shape:
            raise OSError(28, "No space left on device")
        return empty(room, shape, *dtype)

    monkeypatch.setattr(Scratch, "empty", full)
    with pytest.raises(StateError, match=r"no room for the whole weights on rank 0: .*No space left"):
        save_pretrained(engine, tmp_path / "out")


def test_a_write_that_fails_leaves_no_folder_and_says_why(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(AveragingError, match=r"could not be written: SafetensorError: No space left"):
        save_pretrained(engine_of(nn.Linear(2, 2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_parts_wrapper_is_in_no_name(tmp_path):
    wrapped = checkpoint_wrapper(nn.Sequential(spectral_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2)))
    save_pretrained(engine_of(nn.Sequential(wrapped)), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert saved.keys() == plain.state_dict().keys()


def test_a_shard_cut_from_whole_weights_is_the_shard_they_came_from():
    engine = engine_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    shard = torch.randn(engine.numel)
    assert torch.equal(scatter_trained(engine, gather_trained(engine, shard)), shard)


def test_whole_weights_that_are_too_large_for_memory_lie_in_one_file_that_nobody_sees(tmp_path, monkeypatch):
    monkeypatch.setattr("swaft.averaging.shards.IN_MEMORY_BYTES", 16)
    before = len(os.listdir("/proc/self/fd"))
    room = Scratch(tmp_path, 1 + 2 * 3 + 4 * 15 * 200)
    odd, halves = room.empty((1,), torch.uint8), room.empty((3,), torch.bfloat16).fill_(2.0)
    held = [room.empty((3, 5)).fill_(i) for i in range(200)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert halves.sum() == 6
    assert [int(each.sum()) for each in held] == [15 * i for i in range(200)]
    assert len({each.untyped_storage().data_ptr() for each in (odd, halves, *held)}) == 202
    assert list(tmp_path.iterdir()) == []
    maps = Path("/proc/self/maps").read_text()
    assert sum(str(tmp_path) in line and "deleted" in line for line in maps.splitlines()) == 1


def test_an_adapter_is_sized_without_the_base_that_stays_where_it_is(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(export, "Scratch", lambda folder, num_bytes: sizes.append(num_bytes))
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 6)):
        save_pretrained(engine_of(model), tmp_path / str(dtype), dtype=dtype)
        written = load_file(tmp_path / str(dtype) / "adapter_model.safetensors").values()
        assert sizes.pop() == size * sum(each.numel() for each in written)


@pytest.mark.parametrize("limit", [1, 1 << 30], ids=["file", "memory"])
def test_a_model_in_several_files_is_the_model_in_one(tmp_path, monkeypatch, limit):
    monkeypatch.setattr("swaft.averaging.shards.IN_MEMORY_BYTES", limit)
    model = bert()
    save_pretrained(engine_of(model), tmp_path / "out", max_shard_size=2000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_rounding_to_16_bits_is_measured_and_named(dtype, tmp_path, caplog):
    model = bert()
    with caplog.at_level("INFO", logger="swaft.averaging.export"):
        save_pretrained(engine_of(model), tmp_path / "out", dtype=dtype)
    assert "rounding to bfloat16 takes away 0.00" in caplog.text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name in saved}
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert "bfloat16" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.int8, "bf16", None])
def test_a_type_that_no_weights_are_written_in_is_refused(dtype, tmp_path):
    with pytest.raises(ConfigError, match="expected one of float32, bfloat16, float16"):
        save_pretrained(engine_of(bert()), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_place_that_no_folder_can_be_made_in_is_an_error_of_every_rank(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AveragingError, match=r"out could not be written: \w+Error"):
        save_pretrained(engine_of(bert()), tmp_path / "file" / "out")


def test_what_is_not_read_back_as_it_was_written_gets_no_name(tmp_path, monkeypatch):
    write = export.write_model

    def damaged(module, folder, state_dict, **options):
        write(module, folder, state_dict, **options)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 0x10
        file.write_bytes(content)

    monkeypatch.setattr(export, "write_model", damaged)
    with pytest.raises(AveragingError, match="was not read back as it was written"):
        save_pretrained(engine_of(bert()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_holds_every_tensor_under_its_name_or_in_another_form_with_the_same_numbers(tmp_path):
    first, second = torch.ones(3), torch.randn(4)
    folders = {
        "same": {"first": first, "second": second},
        "another form": {"first": first, "a": second[:2], "b": second[2:]},
        "one less": {"first": first},
        "other numbers": {"first": first, "a": second[:2], "b": second[2:] * 2},
        "one more": {"first": first, "second": second, "third": first},
    }
    refused = []
    for name, tensors in folders.items():
        (tmp_path / name).mkdir()
        save_file({key: each.clone() for key, each in tensors.items()}, tmp_path / name / "model.safetensors")
        try:
            export.check_written(tmp_path / name, {"first": first, "second": second})
        except AveragingError as error:
            refused.append(name)
            assert "under other names with a sum of squares of" in str(error)
    assert refused == ["one less", "other numbers", "one more"]


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def randomised(model):
    """The model with every trainable parameter at random, as after training."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def same(model, other):
    return model.keys() == other.keys() and all(torch.equal(model[name], other[name]) for name in model)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (
            bert,
            {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "lora_only"},
        ),
        (bert, {"target_modules": ["query"], "use_dora": True, "task_type": "SEQ_CLS"}),
        (bert, {"target_modules": ["word_embeddings", "query"]}),
        (bert, {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [2, 5]}}),
        (
            llama,
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
    ],
    ids=["head and biases", "dora", "embedding", "tokens", "tied"],
)
def test_a_peft_model_leaves_an_adapter_that_peft_loads_bit_for_bit(base, options, tmp_path):
    model = randomised(get_peft_model(base(), LoraConfig(r=2, **options)))
    averager = moved(model)
    averager.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not (tmp_path / "out" / "model.safetensors").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft\n" in card
    assert "in float32, written by swaft" in card
    assert "Model ID" not in card
    with averager.swapped_in():
        expected = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    again = PeftModel.from_pretrained(base(), tmp_path / "out")
    assert same(dict(again.named_parameters(remove_duplicate=False)), expected)


def test_of_a_frozen_base_nothing_is_gathered_that_is_not_saved(tmp_path, monkeypatch):
    model = randomised(get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"])))
    engine = attach_engine(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    gathered = []
    monkeypatch.setattr(engine, "gather_working", gathered.append)
    save_pretrained(engine, tmp_path / "out")
    assert not gathered


def test_every_adapter_is_saved_a_frozen_one_as_it_is(tmp_path):
    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["value"], init_lora_weights=False))
    averager = moved(randomised(model))
    averager.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(bert(), tmp_path / "out" / "second", adapter_name="second")
    again.load_adapter(str(tmp_path / "out"), adapter_name="default")
    with averager.swapped_in():
        assert same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_a_parametrized_head_is_saved_with_an_adapter_as_the_plain_weight_it_evaluates_to(tmp_path):
    base = bert()
    base.classifier = spectral_norm(base.classifier)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    averager = moved(randomised(model))
    averager.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(bert(), tmp_path / "out").eval()
    ids = torch.arange(10).view(2, 5)
    with averager.swapped_in(), torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6)


def test_an_adapter_of_wrapped_parts_loads_into_a_model_without_wrappers(tmp_path):
    model = randomised(get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"])))
    layers = model.base_model.model.bert.encoder.layer
    layers[0] = checkpoint_wrapper(layers[0])
    averager = moved(model)
    averager.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(bert(), tmp_path / "out")
    with averager.swapped_in():
        parameters = {
            name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()
        }
        assert same(dict(again.named_parameters()), parameters)


def test_an_adapter_of_a_16_bit_base_is_saved_and_loaded_in_fp32(tmp_path):
    model = randomised(get_peft_model(bert().bfloat16(), LoraConfig(r=2, target_modules=["query"])))
    averager = moved(model)
    averager.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(bert().bfloat16(), tmp_path / "out")
    with averager.swapped_in():
        assert same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_a_model_with_an_adapter_of_transformers_own_leaves_one_too(tmp_path):
    model = bert()
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    averager = moved(randomised(model))
    averager.save_pretrained(tmp_path / "out")
    again = bert()
    again.load_adapter(str(tmp_path / "out"))
    with averager.swapped_in():
        assert same(dict(again.named_parameters()), dict(model.named_parameters()))


def test_weights_that_peft_takes_from_the_live_model_are_refused(tmp_path):
    config = MultitaskPromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, num_tasks=2)
    averager = moved(get_peft_model(bert(), config))
    with pytest.raises(AveragingError, match=r"prefix_task_cols.*MultitaskPrompt.*from the live model"):
        averager.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapters_configuration_is_one_for_use_not_for_training(tmp_path):
    model = randomised(get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"])))
    moved(model).save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["inference_mode"], written["peft_type"]) == (2, True, "LORA")
    assert model.peft_config["default"].inference_mode is False
