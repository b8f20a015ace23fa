from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import (
    bart,
    bert,
    blenderbot,
    causal_batch,
    classification_batch,
    gemma2,
    gemma3,
    generation_batch,
    gpt2,
    llama,
    m2m100,
    marian,
    mbart,
    pegasus,
    roberta,
    t5,
)
from torch import nn

from swaft.errors import NoiseError
from swaft.noise import R3F
from swaft.noise.embedding import Embedded, embedding_hook, find_site

pytestmark = pytest.mark.unit


def constant(size: float):
    return lambda clean: clean.float() + size


def flipped(clean):
    """What no normalisation behind the embedding undoes, as it does with a constant."""
    return -clean.float()


@pytest.fixture
def caught():
    """The outputs of modules watched through a forward hook."""
    outputs: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _m, _a, output: outputs.update({name: output})))

    outputs_and_watch = (outputs, watch)
    yield outputs_and_watch
    for handle in handles:
        handle.remove()


def test_an_encoder_is_noised_at_its_word_embeddings():
    model = bert()
    assert find_site(model).embedding is model.bert.embeddings.word_embeddings
    model = roberta()
    assert find_site(model).embedding is model.roberta.embeddings.word_embeddings


def test_an_encoder_decoder_is_noised_at_its_encoders_own_embedding():
    for model, encoder in ((m := bart(), m.model.encoder), (m := t5(), m.encoder)):
        site = find_site(model)
        assert site.embedding is encoder.embed_tokens
        assert site.embedding is not model.get_input_embeddings()


def test_wrappers_are_looked_through():
    model = bert()
    expected = model.bert.embeddings.word_embeddings

    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    assert find_site(Engine(model)).embedding is expected
    assert find_site(torch.compile(model)).embedding is expected  # type: ignore[arg-type]
    assert find_site(Engine(torch.compile(Engine(model)))).embedding is expected  # type: ignore[arg-type]


def test_a_peft_adapter_is_looked_through():
    peft = pytest.importorskip("peft")
    model = bert()
    expected = model.bert.embeddings.word_embeddings
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert find_site(adapted).embedding is expected


def test_a_model_without_a_token_embedding_is_refused():
    with pytest.raises(NoiseError, match="Linear names no token embedding"):
        find_site(nn.Linear(2, 2))


@pytest.mark.parametrize("build", [t5, bart])
def test_noise_reaches_the_encoder_and_leaves_the_decoders_input_clean(build, caught):
    model, batch = build(dropout=0.0), generation_batch()
    outputs, watch = caught
    encoder, decoder = model.get_encoder(), model.get_decoder()
    site = find_site(model)
    with embedding_hook(site, constant(0.5)) as record:
        watch("encoder", encoder.embed_tokens)
        watch("decoder", decoder.embed_tokens)
        noised = model(**batch)
    first = {name: output.clone() for name, output in outputs.items()}
    clean = model(**batch)

    assert torch.equal(first["encoder"], outputs["encoder"] + 0.5)
    assert torch.equal(first["decoder"], outputs["decoder"])
    assert not torch.equal(noised.logits, clean.logits)
    assert float(record.changed()) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_t5_is_handed_fp32_and_a_sixteen_bit_bert_its_own_type(dtype):
    for model, batch, handed_on in (
        (t5(), generation_batch(), torch.float32),
        (bart(), generation_batch(), dtype),
        (bert(), classification_batch(), dtype),
    ):
        with embedding_hook(find_site(model.to(dtype)), constant(1e-5)) as record:
            assert torch.isfinite(model(**batch).logits).all()
        assert record.handed_on.dtype == handed_on
        assert record.clean.dtype == dtype


@pytest.mark.parametrize("name", ["MT5", "UMT5", "LongT5"])
def test_the_rest_of_the_t5_family_takes_fp32_too(name):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).bfloat16()
    with embedding_hook(find_site(model), constant(1e-5)) as record:
        model(**generation_batch())
    assert record.handed_on.dtype == torch.float32
    assert float(record.changed()) > 0.99


def test_realised_noise_is_what_was_handed_on_not_what_was_drawn():
    model, batch = bert().bfloat16(), classification_batch()
    with embedding_hook(find_site(model), constant(1e-5)) as record:
        model(**batch)
    realised = record

    changed = record.handed_on != record.clean
    assert float(realised.changed()) == pytest.approx(changed.float().mean().item())
    assert 0 < float(realised.changed()) < 0.5  # rounding to bf16 undoes most of it
    expected = (record.handed_on.double() - record.clean.double()).norm() / record.clean.double().norm()
    assert float(realised.noise_to_signal()) == pytest.approx(expected.item(), rel=1e-5)


def test_realised_noise_is_that_of_real_tokens_relative_to_the_clean_ones():
    clean = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]])
    record = Embedded(1, clean, clean + torch.tensor([[[0.0, 12.0], [0.0, 0.0]], [[5.0, 5.0], [5.0, 5.0]]]))
    real = torch.tensor([[True, True], [False, False]])
    assert float(record.noise_to_signal(real)) == pytest.approx(12 / 5)
    assert float(record.changed(real)) == 1 / 4
    nothing = torch.zeros_like(real)
    assert record.noise_to_signal(nothing) == record.changed(nothing) == 0


@pytest.mark.parametrize("build", [t5, bart])
def test_an_embedding_that_the_decoder_shares_is_noised_in_the_encoder_only(build, caught):
    model, batch = build(dropout=0.0), generation_batch()
    model.resize_token_embeddings(64, mean_resizing=False)  # makes the two modules one
    assert model.get_encoder().embed_tokens is model.get_decoder().embed_tokens
    outputs, watch = caught
    with embedding_hook(find_site(model), constant(0.5)) as record:
        watch("decoder", model.get_decoder().embed_tokens)
        model(**batch)
    noised = outputs["decoder"].clone()
    model(**batch)
    assert torch.equal(noised, outputs["decoder"])
    assert float(record.changed()) == 1.0


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_causal_model_is_noised_at_its_token_embedding(build):
    model = build(dropout=0.0)
    site = find_site(model)
    assert site.embedding is model.get_input_embeddings()
    with embedding_hook(site, constant(0.5)) as record:
        noised = model(**causal_batch())
    assert not torch.equal(noised.logits, model(**causal_batch()).logits)
    assert float(record.changed()) == 1.0


@pytest.mark.parametrize(
    ("build", "scales_itself"),
    [
        (bart, True),
        (mbart, True),
        (m2m100, True),
        (blenderbot, True),
        (gemma2, True),
        (gemma3, True),
        (pegasus, False),
        (marian, False),
        (t5, False),
        (llama, False),
    ],
)
def test_fairseqs_noise_goes_in_before_the_factor_of_a_scaled_embedding(build, scales_itself):
    scaled = {"scale_embedding": True} if build in (bart, mbart, m2m100, blenderbot, pegasus, marian) else {}
    model, batch = build(dropout=0.0, **scaled), causal_batch(rows=200)
    rows = find_site(model).embedding.weight[batch["input_ids"]].double()
    share = 1e-3 / rows.square().mean().sqrt()  # of noise of this size on the table's own rows
    options = {"noise": "normal", "sigma": 1e-3, "fused": False}
    released = R3F(preset="fairseq", **options)(model, batch).noise_to_signal
    literal = R3F(preset="paper", **options)(model, batch).noise_to_signal

    assert float(released) == pytest.approx(float(share), rel=0.02)
    assert float(released / literal) == pytest.approx(16**0.5 if scales_itself else 1, rel=0.02)


@pytest.mark.parametrize(
    ("build", "adapter"),
    [
        (mbart, {"target_modules": ["embed_tokens"]}),
        (gemma2, {"target_modules": ["embed_tokens"]}),
        (gemma2, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ],
)
def test_the_factor_of_a_scaled_embedding_is_found_inside_an_adapter(build, adapter):
    from peft import LoraConfig, get_peft_model

    model = build(dropout=0.0, **({"scale_embedding": True} if build is mbart else {}))
    batch = causal_batch()
    objective = R3F(preset="fairseq", noise="normal", sigma=1e-3, fused=False)
    with torch.no_grad():  # the noise of the first step both times
        plain = objective(model.eval(), batch).noise_to_signal
        adapted = get_peft_model(model, LoraConfig(r=2, **adapter))
        torch.testing.assert_close(objective(adapted.eval(), batch).noise_to_signal, plain)


def test_the_second_half_of_a_doubled_batch_is_noised_and_recorded():
    model, batch = bert(dropout=0.0), classification_batch()
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    with embedding_hook(find_site(model), flipped, half=True) as record:
        both = model(**twice).logits
    with embedding_hook(find_site(model), flipped) as alone:
        noised = model(**batch).logits
    clean = model(**batch).logits
    assert (noised - clean).abs().max() > 0.01
    torch.testing.assert_close(both, torch.cat([clean, noised]))
    assert torch.equal(record.handed_on, alone.handed_on)
    assert torch.equal(record.clean, alone.clean)


@pytest.mark.parametrize("length", [8, 29, 31, 32])
@pytest.mark.parametrize("name", ["LED", "BigBirdPegasus"])
def test_an_encoder_that_pads_its_input_by_itself_is_noised_over_its_text_alone(name, length, caught):
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0}
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    blocks = {"attention_window": [8]} if name == "LED" else {"block_size": 4, "num_random_blocks": 1}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=60, pad_token_id=1, **sizes, **layers, **heads, **blocks
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    ids = torch.randint(4, 60, (2, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :5].clone()}
    outputs, watch = caught
    with embedding_hook(find_site(model), constant(0.5)) as record:
        watch("last", model.get_encoder().embed_tokens)
        noised = model(**batch).logits
    assert record.clean.shape[:2] == ids.shape
    assert float(record.changed()) == 1.0
    assert not torch.equal(noised, model(**batch).logits)
    table = model.get_encoder().embed_tokens
    if outputs["last"].shape[1] != length:
        padding = torch.full((2, 8 if name == "LED" else 4), 1)[:, : outputs["last"].shape[1]]
        assert torch.equal(outputs["last"], table(padding))
    assert (outputs["last"].shape[1] == length) == (length in (8, 32))


def test_a_quantised_embedding_is_refused_by_name():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.IBertForSequenceClassification(transformers.IBertConfig(vocab_size=60, **sizes))
    with pytest.raises(NoiseError, match=r"names a QuantEmbedding.*swaft\.RDrop"):
        find_site(model)


def test_an_embedding_that_does_not_run_is_an_error():
    model, batch = bert(), classification_batch()
    embeds = torch.zeros(*batch.pop("input_ids").shape, 16)
    with pytest.raises(NoiseError, match="ran 0 times"), embedding_hook(find_site(model)):
        model(inputs_embeds=embeds, **batch)


def test_an_embedding_that_runs_twice_in_a_pass_is_an_error():
    model, batch = bert(), classification_batch()
    table = model.bert.embeddings.word_embeddings
    model.bert.encoder.register_forward_pre_hook(lambda *_: (table(batch["input_ids"]), None)[1])
    with pytest.raises(NoiseError, match="ran 2 times"), embedding_hook(find_site(model)):
        model(**batch)


def test_the_hook_goes_when_the_pass_fails():
    model = bert()
    with pytest.raises(RuntimeError, match="boom"), embedding_hook(find_site(model)):
        raise RuntimeError("boom")
    assert not model.bert.embeddings.word_embeddings._forward_hooks


def test_a_detached_embedding_gets_no_gradient():
    model, batch = bert(), classification_batch()
    with embedding_hook(find_site(model), constant(0.1), detach=True):
        model(**batch).loss.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad is None
    assert model.classifier.weight.grad is not None
