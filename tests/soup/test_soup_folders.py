from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from soup_folders import CONFIG, bert, folder_of, folders, golden, loaded, random_tensors, same_bits
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from swaft.errors import StateError
from swaft.sizes import parse_size
from swaft.soup import average, average_greedily, last_checkpoints, open_checkpoint
from swaft.soup.mean import Mean
from swaft.soup.output import plan_shards
from swaft.storage import hash_file

pytestmark = pytest.mark.unit


def test_the_folder_opens_in_transformers(tmp_path):
    models = [bert(seed) for seed in range(3)]
    for seed, model in enumerate(models):
        model.to(torch.bfloat16).save_pretrained(tmp_path / str(seed))
    average([tmp_path / str(seed) for seed in range(3)], tmp_path / "out", max_shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    model, told = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert model.dtype == torch.float32
    for name, found in model.state_dict().items():
        sources = [each.state_dict()[name] for each in models]
        expected = torch.stack(sources).double().mean(0).float() if found.is_floating_point() else sources[0]
        assert torch.equal(found, expected), name


def test_tied_weights_stay_tied(tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / str(seed))
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert loaded(tmp_path / "out").keys() == loaded(tmp_path / "0").keys()
    model, told = T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert model.shared.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()


def with_head(tensors: dict, head) -> dict:
    return tensors | {"lm_head.weight": head.clone()}


@pytest.mark.parametrize("holder", [0, 1])
def test_a_tied_head_that_one_checkpoint_stores_twice_is_no_other_model(tmp_path, holder):
    sources = [random_tensors(seed) for seed in range(2)]
    paths = [
        folder_of(tmp_path / str(i), with_head(each, each["embed.weight"]) if i == holder else each)
        for i, each in enumerate(sources)
    ]
    average(paths, tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), golden(sources))


def test_a_tied_head_that_the_base_alone_stores_is_not_written_beside_its_average(tmp_path):
    sources, base = [random_tensors(seed) for seed in range(2)], random_tensors(7)
    paths = [folder_of(tmp_path / str(i), each) for i, each in enumerate(sources)]
    held = folder_of(tmp_path / "base", with_head(base, base["embed.weight"]) | {"frozen": torch.randn(3)})
    average(paths, tmp_path / "out", base=held)
    assert loaded(tmp_path / "out").keys() == {*sources[0], "frozen"}


@pytest.mark.parametrize("fault", ["other bits", "constant", "configuration"])
def test_a_head_that_is_not_tied_is_in_one_model_alone(tmp_path, fault):
    sources = [random_tensors(seed) for seed in range(2)]
    if fault == "constant":
        for each in sources:
            each["embed.weight"].zero_()
    head = sources[0]["embed.weight"] + (1e-6 if fault == "other bits" else 0)
    config = CONFIG | ({"tie_word_embeddings": False} if fault == "configuration" else {})
    paths = [
        folder_of(tmp_path / "0", with_head(sources[0], head), config=config),
        folder_of(tmp_path / "1", sources[1], config=config),
    ]
    with pytest.raises(StateError, match=r"'lm_head\.weight' is only in the first"):
        average(paths, tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 3])
def test_sharded_and_whole_inputs_average_alike(tmp_path, shards):
    whole, cut = folders(tmp_path / "a", 2), folders(tmp_path / "b", 2, shards=shards)
    average([whole[0], cut[1]], tmp_path / "out", max_shard_bytes=500)
    assert same_bits(loaded(tmp_path / "out"), golden([random_tensors(0), random_tensors(1)]))


def test_the_hash_is_of_the_weights_wherever_they_lie(tmp_path):
    one = average(folders(tmp_path / "a", 2), tmp_path / "out")
    other = average(folders(tmp_path / "b", 2), tmp_path / "elsewhere")
    reverse = average(folders(tmp_path / "c", 2)[:1], tmp_path / "another")
    assert one.sha256 == other.sha256 != reverse.sha256
    assert one.files == {"model.safetensors": hash_file(tmp_path / "out" / "model.safetensors")}


def test_shards_are_as_full_as_they_may_be_and_listed(tmp_path):
    soup = average(folders(tmp_path, 2), tmp_path / "out", max_shard_bytes=700)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    assert set(index["weight_map"].values()) == set(soup.files)
    assert sorted(soup.files)[0] == f"model-00001-of-{len(soup.files):05d}.safetensors"
    expected = golden([random_tensors(0), random_tensors(1)])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    specs = {name: open_checkpoint(tmp_path / "out").specs[name] for name in expected}
    for shard in plan_shards(specs, 700):
        size = sum(spec.numel * spec.dtype.itemsize for spec in shard.values())
        assert size <= 700 or len(shard) == 1


def test_other_files_are_copied_and_the_type_is_set(tmp_path):
    paths = folders(tmp_path, 2)
    for name in (
        *("optimizer.pt", "training_args.bin", "trainer_state.json", ".hidden", "pytorch_model.bin"),
        *("noise.json", "manifest.json", "COMPLETE", "latest", "average.json", "zero_to_fp32.py"),
        *("all_results.json", "eval_results.json", "random_states_0.pkl", "rust_model.ot"),
    ):
        (paths[0] / name).write_bytes(b"x")
    (paths[0] / "README.md").write_text("The last weights of a training run.")
    (paths[0] / "folder").mkdir()
    (paths[0] / "events.out.tfevents.1").write_bytes(b"x")
    os.mkfifo(paths[0] / "pipe")
    (paths[0] / "generation_config.json").write_text("{}")
    average(paths, tmp_path / "out", dtype=torch.bfloat16)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == [
        "README.md",
        "average.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "architectures": ["Net"],
        "model_type": "net",
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
    }
    told = json.loads((tmp_path / "out" / "average.json").read_text())
    assert told["shares"] == [[str(path), 0.5] for path in paths]


def test_folders_inside_are_copied_but_for_those_with_weights_of_their_own(tmp_path):
    paths = folders(tmp_path, 2)
    templates = paths[0] / "additional_chat_templates" / "deep"
    templates.mkdir(parents=True)
    (templates / "tool_use.jinja").write_text("a template")
    (templates / "README.md").write_text("how to use it")
    (templates / ".hidden").write_text("x")
    (paths[0] / "1_Pooling").mkdir()
    shutil.move(templates / "tool_use.jinja", tmp_path / "blob")
    (templates / "tool_use.jinja").symlink_to(tmp_path / "blob")  # as in the hub's cache
    (paths[0] / "1_Pooling" / "config.json").write_text("{}")
    (paths[0] / "elsewhere").symlink_to(tmp_path / "in1")
    (paths[0] / "2_Dense" / "deep").mkdir(parents=True)
    (paths[0] / "2_Dense" / "deep" / "pytorch_model.bin").write_bytes(b"x")
    soup = average(paths, tmp_path / "out")
    found = [str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(name for name in found if "/" in name) == [
        "1_Pooling/config.json",
        "additional_chat_templates/deep/README.md",
        "additional_chat_templates/deep/tool_use.jinja",
    ]
    copied = tmp_path / "out" / "additional_chat_templates" / "deep" / "tool_use.jinja"
    assert copied.read_text() == "a template"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not (tmp_path / "out" / "elsewhere").exists()
    (note,) = soup.notes
    assert note.endswith("2_Dense is not copied: it holds weights of its own (deep/pytorch_model.bin)")


def test_a_module_of_sentence_transformers_with_weights_of_its_own_is_refused_before_anything_is_averaged(
    tmp_path, monkeypatch
):
    paths = folders(tmp_path, 2)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
    (paths[0] / "modules.json").write_text(json.dumps(modules))
    for module, file in [("1_Pooling", "config.json"), ("2_Dense", "model.safetensors")]:
        (paths[0] / module).mkdir()
        (paths[0] / module / file).write_text("{}")
    monkeypatch.setattr(Mean, "slices", lambda *arguments: pytest.fail("weights were averaged"))
    message = r"2_Dense holds weights of its own .*open them with SentenceTransformer"
    with pytest.raises(StateError, match=message):
        average(paths, tmp_path / "out")
    with pytest.raises(StateError, match=message):
        average_greedily(paths, tmp_path / "out", score=pytest.fail, higher_is_better=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in0", "in1"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    paths, synced, real = folders(tmp_path, 1), [], os.fsync
    (paths[0] / "inside").mkdir()
    (paths[0] / "inside" / "file").write_text("x")

    def noted(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").partition("/out")[2])
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    average(paths, tmp_path / "out")
    names = {f"/{path.relative_to(tmp_path / 'out')}" for path in (tmp_path / "out").rglob("*")}
    assert "/inside/file" in names
    assert names <= {name.removesuffix(".tmp") for name in synced}
    assert "" in synced  # the folder itself


def test_the_model_card_says_what_was_averaged(tmp_path):
    paths = folders(tmp_path, 2)
    (paths[0] / "README.md").write_text("This folder holds the last weights of a training run.")
    soup = average(paths, tmp_path / "out", weights=[1, 3], dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card
    assert "the weighted mean of these checkpoints, in bfloat16" in card
    assert f"* 0.25 of `{paths[0]}`\n* 0.75 of `{paths[1]}`\n" in card
    assert soup.sha256 in card
    assert "library_name: transformers" in card
    assert "last weights" not in card


def test_links_as_in_the_cache_of_the_hub_are_followed(tmp_path):
    paths = folders(tmp_path, 2)
    shutil.move(paths[0] / "model.safetensors", tmp_path / "blob")
    (paths[0] / "model.safetensors").symlink_to(tmp_path / "blob")
    average(paths, tmp_path / "out")
    assert same_bits(loaded(tmp_path / "out"), golden([random_tensors(0), random_tensors(1)]))


DIFFERENT = {
    "a tensor too few": (lambda t: t.pop("layer.bias"), "'layer.bias' is only in the first"),
    "a tensor too many": (lambda t: t.update(more=torch.ones(1)), "'more' is only in the second"),
    "another shape": (lambda t: t.update(scale=torch.ones(1)), r"'scale' has shape \[\] and \[1\]"),
    "another type": (lambda t: t.update(scale=torch.tensor(1)), "'scale' is torch.float32 and torch.int64"),
    "a quantised tensor": (
        lambda t: t.update(scale=torch.tensor(1.0).to(torch.float8_e4m3fn)),
        "'scale' is torch.float32 and torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_model_is_refused_and_the_tensor_named(tmp_path, name):
    change, message = DIFFERENT[name]
    tensors = random_tensors(5)
    change(tensors)
    paths = [*folders(tmp_path, 2), folder_of(tmp_path / "other", tensors)]
    with pytest.raises(StateError, match=f"other .*is another model than .*in0 .*{message}"):
        average(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_another_architecture_is_refused_and_named(tmp_path, key):
    paths = folders(tmp_path, 2)
    paths.append(folder_of(tmp_path / "other", random_tensors(2), config=CONFIG | {key: ["Other"]}))
    with pytest.raises(
        StateError, match=f"other is another model than .*in0: config.json: {key} is \\['Other'\\]"
    ):
        average(paths, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "one", "two"), [("hidden_act", "gelu", "relu"), ("num_attention_heads", 2, 4)]
)
def test_weights_of_which_another_function_is_computed_are_refused(tmp_path, key, one, two):
    paths = [
        folder_of(tmp_path / name, random_tensors(2), config=CONFIG | {key: value})
        for name, value in (("a", one), ("b", two))
    ]
    with pytest.raises(StateError, match=f"b is another model than .*a: config.json: {key} is '?{two}"):
        average(paths, tmp_path / "out")


def test_other_settings_that_differ_are_noted(tmp_path):
    paths = folders(tmp_path, 1)
    # Two versions of transformers may not write the same settings, also of those that change what is computed.
    more = {"dropout": 0.1, "use_cache": False, "hidden_act": "gelu"}
    paths.append(folder_of(tmp_path / "b", random_tensors(2), config=CONFIG | more))
    soup = average(paths, tmp_path / "out")
    assert soup.notes == [
        f"config.json of {paths[1]} differs from the first: {what}, there not set"
        for what in ("dropout is 0.1", "hidden_act is 'gelu'")
    ]


def test_heads_with_their_classes_in_another_order_are_refused(tmp_path):
    paths = [
        folder_of(tmp_path / name, random_tensors(2), config=CONFIG | {"id2label": {"0": name, "1": other}})
        for name, other in (("no", "yes"), ("yes", "no"))
    ]
    with pytest.raises(
        StateError, match=r"yes has the classes of .*no in another order: config\.json: id2label"
    ):
        average(paths, tmp_path / "out")


BAD_INDEXES = {
    "no map": ({}, "weight_map: found None"),
    "a path": (
        {"weight_map": {"a": "../model.safetensors"}},
        "'a': found '../model.safetensors', expected a file name",
    ),
    "a number": ({"weight_map": {"a": 3}}, "'a': found 3, expected a file name"),
    "a file that is missing": (
        {"weight_map": {"a": "gone.safetensors"}},
        "gone.safetensors could not be opened",
    ),
    "a tensor that is missing": (
        {"weight_map": {"gone": "x.safetensors"}},
        "'gone' is in x.safetensors, which lacks",
    ),
    "a tensor twice": ({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}, "'a' is both in"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_that_is_wrong_is_refused(tmp_path, name):
    index, message = BAD_INDEXES[name]
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StateError, match=message):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(StateError, match=r"not a checkpoint that can be averaged.*save_pretrained"):
        open_checkpoint(tmp_path)
    with pytest.raises(StateError, match="is not a folder"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_the_last_checkpoints_are_those_of_the_highest_steps(tmp_path):
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "final").mkdir()
    (tmp_path / "checkpoint-30").write_bytes(b"a file")
    os.utime(tmp_path / "checkpoint-9")
    names = [path.name for path in last_checkpoints(tmp_path, 3)]
    assert names == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    with pytest.raises(StateError, match=r"holds 4 numbered checkpoints \(.*\); --last asks for 5"):
        last_checkpoints(tmp_path, 5)


def test_a_checkpoint_that_was_never_finished_is_not_among_the_last(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "COMPLETE").write_bytes(b"")
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("names", [["checkpoint-1", "step-2"], ["checkpoint-1", "checkpoint-01"]])
def test_checkpoints_whose_order_is_not_clear_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(StateError, match="which checkpoints follow each other is not clear"):
        last_checkpoints(tmp_path, 1)


def test_sizes_are_read_as_the_hub_writes_them():
    sizes = {"5GB": 5 * 10**9, "500mb": 5 * 10**8, "2GiB": 2 << 30, "1.5KB": 1500, "1000": 1000}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "-1", "0", "nan", "inf", "5 parsecs"):
        with pytest.raises(ValueError):
            parse_size(text)


def test_tokenizers_that_number_their_tokens_in_another_order_are_refused(tmp_path):
    paths = folders(tmp_path, 2)
    for path, words in zip(paths, (["a", "b", "c"], ["a", "c", "b"]), strict=True):
        vocabulary = {word: number for number, word in enumerate(words)}
        (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    with pytest.raises(StateError, match=r"tokenizer.json: 1 is 'c', expected 'b'; an average would mix"):
        average(paths, tmp_path / "out")
    for path, token in zip(paths, ("<pad>", "<end>"), strict=True):
        added = {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": token}]}
        (path / "tokenizer.json").write_text(json.dumps(added))
    with pytest.raises(StateError, match=r"tokenizer.json: 1 is '<end>', expected '<pad>'"):
        average(paths, tmp_path / "out")
    (paths[0] / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}))
    longer = {"a": 0, "b": 1, "c": 2, "d": 3}  # one more token at the end is no other order
    (paths[1] / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": longer}}))
    average(paths, tmp_path / "out")
