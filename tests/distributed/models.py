"""Tiny models that every engine trains: each has something that a sharded layout gets wrong easily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from swaft.noise.spectral import SpectralNorm

MICRO_BATCH = 2
VOCABULARY, LENGTH, CLASSES = 53, 7, 3
Batch = dict[str, Tensor]


def batch(step: int, rank: int) -> Batch:
    """The same batch for the same step and rank, whatever the engine."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "input_ids": torch.randint(0, VOCABULARY, (MICRO_BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(MICRO_BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, CLASSES, (MICRO_BATCH,), generator=generator),
    }


def language_batch(step: int, rank: int) -> Batch:
    """As `batch`, with the text itself as labels."""
    classified = batch(step, rank)
    return classified | {"labels": classified["input_ids"]}


def translation_batch(step: int, rank: int) -> Batch:
    """Text in, text out; labels of different lengths."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(2, VOCABULARY, (MICRO_BATCH, 5), generator=generator)
    labels[0, 3 + rank :] = -100
    return batch(step, rank) | {"labels": labels}


def tiny_bert(seed: int = 0, *, dropout: float = 0.1) -> BertForSequenceClassification:
    """A BERT of odd sizes, with one frozen table and parameters smaller than two ranks share evenly."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=17,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=CLASSES,
        )
    )
    model.bert.embeddings.token_type_embeddings.weight.requires_grad_(False)
    return model


def tiny_gpt2(seed: int = 0, *, dropout: float = 0.1) -> GPT2LMHeadModel:
    """A GPT-2 whose input table is its output layer, too."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            vocab_size=VOCABULARY,
            n_embd=12,
            n_layer=2,
            n_head=3,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def tiny_t5(seed: int = 0, *, dropout: float = 0.1) -> T5ForConditionalGeneration:
    """A T5 whose one table serves the encoder, the decoder and the head."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=12,
            d_kv=4,
            d_ff=17,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=3,
            dropout_rate=dropout,
            decoder_start_token_id=0,
        )
    )


def tiny_bart(seed: int = 0, *, dropout: float = 0.1) -> BartForConditionalGeneration:
    """A BART whose logits get a bias that is no parameter."""
    torch.manual_seed(seed)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=12,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=17,
            decoder_ffn_dim=17,
            max_position_embeddings=16,
            dropout=dropout,
        )
    )
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    return model


def lora_bert(seed: int = 0) -> nn.Module:
    """Adapters and a new head on a frozen BERT: most parameters are in no optimizer group."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.1)
    return get_peft_model(tiny_bert(seed), config)  # type: ignore[arg-type]


def prompted_bert(seed: int = 0) -> nn.Module:
    """A prompt in front of a frozen BERT: what is saved of it is what its encoder gives."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return get_peft_model(tiny_bert(seed), config)  # type: ignore[arg-type]


class Gain(nn.Module):
    """One element."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value * hidden


class UnevenBlock(nn.Module):
    """Seven rows, and a gain of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(3, 7)
        self.narrow = nn.Linear(7, 3, bias=False)
        self.gain = Gain()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.gain(self.narrow(torch.tanh(self.wide(hidden))))


class Uneven(nn.Module):
    """Parameters that no number of ranks divides: one element, three elements, five rows, seven."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(UnevenBlock() for _ in range(2))
        self.fixed = nn.Linear(3, 3).requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(3, CLASSES)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        hidden = self.table(input_ids % 5)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.dropout(self.fixed(hidden.mean(1)))) * self.scale
        return SequenceClassifierOutput(
            loss=nn.functional.cross_entropy(logits.float(), labels), logits=logits
        )


class Normalised(Uneven):
    """Vectors derived from a weight, and running statistics of what a layer was shown.

    Args:
        narrow: DeepSpeed in 16 bits leaves the statistics in fp32, and no BatchNorm runs on a CPU: there is none.
    """

    def __init__(self, *, narrow: bool) -> None:
        super().__init__()
        norm = nn.Identity() if narrow else nn.BatchNorm1d(3)
        self.fixed = nn.Sequential(nn.Linear(3, 3), norm)  # type: ignore[assignment]
        register_parametrization(self.head, "weight", SpectralNorm(self.head.weight.detach()))


def uneven(seed: int = 0) -> Uneven:
    torch.manual_seed(seed)
    return Uneven()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two parameter groups, as every recipe has them, and one that nothing has fallen into."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": []}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
    )


def _from_adapters(folder: Path) -> dict[str, Tensor]:
    from peft import PeftModel

    return dict(PeftModel.from_pretrained(tiny_bert(), str(folder)).named_parameters())


@dataclass(frozen=True)
class ModelCase:
    """A model, what it trains on, and how others open the folder that it is exported to."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    load: Callable[[Path], dict[str, Tensor]]
    """The weights in a folder, by the names they have in the model."""
    all_in_folder: bool = True
    """Whether the folder holds what is frozen, too."""


MODELS = {
    "bert": ModelCase(
        tiny_bert, batch, lambda path: AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    ),
    "tied": ModelCase(
        tiny_gpt2, language_batch, lambda path: AutoModelForCausalLM.from_pretrained(path).state_dict()
    ),
    "lora": ModelCase(lora_bert, batch, _from_adapters, all_in_folder=False),
    "prompt": ModelCase(prompted_bert, batch, _from_adapters, all_in_folder=False),
    "uneven": ModelCase(uneven, batch, lambda path: load_file(path / "model.safetensors")),
}
