"""Every Python example of every page is run, page by page, in the order in which a reader would."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from launching import forget_accelerate
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import swaft

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
STEPS = 241  # no fraction of it is a boundary of blocks by chance
BLOCK = re.compile(r"^ *```python\n(.*?)^ *```", re.S | re.M)


def pages() -> list[Path]:
    """All pages that have an example."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
    return sorted(page for page in found if BLOCK.search(page.read_text()))


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (number, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


class Reader:
    """What stands around the examples: a model, a loader, an accelerator; and `...` trains on."""

    def __init__(self, page: Path, folder: Path):
        self.adapters = page.name == "lora.md"
        self.accelerator = Accelerator(cpu=True)
        logits = torch.randn(3, 5, requires_grad=True)
        self.names: dict[str, Any] = {
            "swaft": swaft,
            "torch": torch,
            "Accelerator": lambda **given: Accelerator(cpu=True),
            "Trainer": lambda *_, **given: self.trainer(folder, **given),
            "accelerator": self.accelerator,
            "train_on": self.train,
            "evaluate": lambda model: {},
            "accuracy": lambda model, validation: 0.5,
            "objective": swaft.R3F(preset="relative"),
            "rule": swaft.SWA(start=0.5),
            "n": STEPS,
            "total_steps": STEPS,
            "args": None,
            "train": None,
            "validation": None,
            "batches": rows_as_batches(2),
            "tensors": [torch.ones(2), torch.zeros(2)],
            "logits": logits,
            "noised_logits": logits.detach() + 0.1,
            "labels": torch.tensor([0, 1, 4]),
            "hidden": torch.randn(3, 4, requires_grad=True),
            "noised_hidden": torch.randn(3, 4, requires_grad=True),
            "weight": torch.randn(5, 4, requires_grad=True),
            "bias": torch.randn(5),
        }
        self.renew()

    def renew(self) -> None:
        """A model and an optimizer that no averager is attached to."""
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(
            BertConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
        )
        if self.adapters:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(rows(2 * STEPS), batch_size=2)
        model, optimizer, loader = self.accelerator.prepare(model, optimizer, loader)
        self.names |= {"model": model, "optimizer": optimizer, "loader": loader, "train_loader": loader}

    def train(self, steps: int = STEPS) -> None:
        """Train until the averager has seen these steps."""
        averager = self.names.get("averager")
        while averager is not None and averager.applied_steps < steps:
            for batch in self.names["loader"]:
                self.accelerator.backward(self.names["model"](**batch).loss)
                self.names["optimizer"].step()
                self.names["optimizer"].zero_grad()
                averager.step()

    def trainer(self, folder: Path, callbacks: list[Any] | None = None, **_: Any) -> Trainer:
        settings = {
            "max_steps": 4,
            "use_cpu": True,
            "report_to": "none",
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
        self.names["trainer"] = Trainer(
            model=self.names["model"],
            args=TrainingArguments(str(folder / "out"), **settings),
            train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows(16)]),
            eval_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows(4)]),
            callbacks=callbacks,
        )
        return self.names["trainer"]

    def follow(self, example: str) -> None:
        """Run an example; a line of three dots is training."""
        before, made, _ = example.partition("swaft.WeightAverager(")
        if made and "averager." not in before:
            self.renew()
        code = re.sub(r"^( *)\.\.\.$", r"\1train_on()", textwrap.dedent(example), flags=re.M)
        if example.startswith("averager.") and not self.names.get("averager"):
            self.names["averager"] = self.attached()
            self.train()
        exec(code, self.names)
        self.train()

    def attached(self) -> Any:
        return swaft.WeightAverager(
            self.names["model"], self.names["optimizer"], rule=swaft.SWA(start=0.5), total_steps=STEPS
        )


def rows_as_batches(number: int) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.stack([row[name] for row in rows(4)]) for name in rows(1)[0]} for _ in range(number)]


@pytest.fixture(autouse=True)
def one_process():
    yield
    forget_accelerate()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = Reader(page, tmp_path)
    for number, example in enumerate(BLOCK.findall(page.read_text()), start=1):
        try:
            reader.follow(example)
        except Exception as error:
            raise AssertionError(f"example {number} of {page.name} failed:\n{example}") from error
        for folder in tmp_path.iterdir():  # the next example may write to the same names
            folder.rename(folder.with_name(f"example-{number}-{folder.name}"))


def test_of_several_micro_batches_only_the_last_takes_the_step(tmp_path, monkeypatch):
    page = ROOT / "docs/methods.md"
    (example,) = [each for each in BLOCK.findall(page.read_text()) if "for batch in batches" in each]
    reader, steps = Reader(page, tmp_path), []
    monkeypatch.setattr(
        reader.accelerator, "backward", lambda _: steps.append(reader.accelerator.sync_gradients)
    )
    reader.follow(example)
    assert steps == [False, True]  # under DeepSpeed, backward steps wherever this is true


def test_links_lead_to_files_and_headings_that_exist():
    lost = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            file, _, heading = link.partition("#")
            there = page.parent / file if file else page
            if not there.exists() or (heading and heading not in anchors(there)):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert not lost


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
