"""A script without swaft, in the form of transformers' summarisation example: the tests add lines to it."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model is fine-tuned."""

    model_name_or_path: str = field(metadata={"help": "a folder or a name on the hub"})
    cache_dir: str | None = field(default=None, metadata={"help": "where prepared rows are kept"})


@dataclass
class DataTrainingArguments:
    """Where the rows are, and how long their texts may be."""

    train_file: str = field(metadata={"help": "JSON lines with a text and a summary"})
    validation_file: str = field(metadata={"help": "the same, to evaluate and predict"})
    max_source_length: int = field(default=1024, metadata={"help": "longer texts are cut"})
    max_target_length: int = field(default=128, metadata={"help": "longer summaries are cut"})
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "padding is not learnt"})
    source_prefix: str = field(default="", metadata={"help": "put before every text, for T5"})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
        if last_checkpoint is not None and training_args.resume_from_checkpoint is None:
            logger.warning("Training continues from %s.", last_checkpoint)
    set_seed(training_args.seed)

    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    raw_datasets = load_dataset("json", data_files=files, cache_dir=model_args.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path)
    if model.config.decoder_start_token_id is None:
        raise ValueError("The model needs a decoder_start_token_id.")

    def preprocess_function(examples):
        inputs = [data_args.source_prefix + text for text in examples["text"]]
        model_inputs = tokenizer(inputs, max_length=data_args.max_source_length, truncation=True)
        labels = tokenizer(
            text_target=examples["summary"], max_length=data_args.max_target_length, truncation=True
        )
        model_inputs["labels"] = labels["input_ids"]
        return model_inputs

    def preprocessed(rows, kind):
        with training_args.main_process_first(desc=f"{kind} dataset map pre-processing"):
            return rows.map(preprocess_function, batched=True, remove_columns=rows.column_names)

    train_dataset = preprocessed(raw_datasets["train"], "train")
    eval_dataset = preprocessed(raw_datasets["validation"], "validation")

    label_pad_token_id = -100 if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    data_collator = DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=label_pad_token_id)
    scorer = RougeScorer(["rouge1", "rougeL"])

    def compute_metrics(eval_preds):
        preds, labels = (
            np.where(ids != -100, ids, tokenizer.pad_token_id)
            for ids in (eval_preds.predictions, eval_preds.label_ids)
        )
        decoded_preds = tokenizer.batch_decode(preds, skip_special_tokens=True)
        decoded_labels = tokenizer.batch_decode(labels, skip_special_tokens=True)
        scores = [scorer.score(*pair) for pair in zip(decoded_labels, decoded_preds, strict=True)]
        result = {name: 100 * np.mean([each[name].fmeasure for each in scores]) for name in scores[0]}
        result["gen_len"] = np.mean((preds != tokenizer.pad_token_id).sum(axis=1))
        return {name: round(float(value), 4) for name, value in result.items()}

    trainer = Seq2SeqTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )

    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()

    max_length = training_args.generation_max_length or data_args.max_target_length
    if training_args.do_eval:
        metrics = trainer.evaluate(max_length=max_length, num_beams=2, metric_key_prefix="eval")
        metrics["eval_samples"] = len(eval_dataset)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        results = trainer.predict(eval_dataset, metric_key_prefix="predict", max_length=max_length)
        trainer.log_metrics("predict", results.metrics)
        if trainer.is_world_process_zero() and training_args.predict_with_generate:
            ids = np.where(results.predictions != -100, results.predictions, tokenizer.pad_token_id)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            with open(os.path.join(training_args.output_dir, "predictions.txt"), "w") as writer:
                writer.write("\n".join(text.strip() for text in texts))


if __name__ == "__main__":
    main()
