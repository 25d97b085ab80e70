"""The published experiments as flags, without paths: `atlas train --preset NAME` and `atlas evaluate --preset NAME`.

Each says on how many GPUs it was published; its batch is that number times --per_gpu_batch_size. On other numbers of
devices keep the product: 64 GPUs with one question each are `--per_gpu_batch_size 8` on 8 devices. The loss stays a
mean over groups of one question (--loss_group).
"""

from collections.abc import Callable
from typing import Any

Flags = dict[str, Any]

MULTIPLE_CHOICE: Flags = {
    "task": "multiple_choice",
    "multiple_choice_train_permutations": "all",
    "multiple_choice_eval_permutations": "cyclic",
    "precision": "bf16",
    "text_maxlength": 512,
    "target_maxlength": 16,
    "n_context": 30,
    "retriever_n_context": 30,
    "per_gpu_batch_size": 1,
    "write_results": True,
}
NATURAL_QUESTIONS: Flags = {
    "task": "qa",
    "precision": "fp32",
    "text_maxlength": 512,
    "target_maxlength": 16,
    "n_context": 40,
    "retriever_n_context": 40,
    "per_gpu_batch_size": 1,
    "write_results": True,
}
JOINT_TRAINING: Flags = {
    "shuffle": True,
    "train_retriever": True,
    "gold_score_mode": "ppmean",
    "use_gradient_checkpoint_reader": True,
    "use_gradient_checkpoint_retriever": True,
    "shard_optim": True,
    "loss_group": 1,
    "dropout": 0.1,
    "weight_decay": 0.01,
    "scheduler": "linear",
    "log_freq": 4,
}
QUERY_SIDE: Flags = {"query_side_retriever_training": True, "refresh_index": "-1"}
MMLU_TRAINING: Flags = {
    **MULTIPLE_CHOICE,
    **JOINT_TRAINING,
    **QUERY_SIDE,
    "temperature_gold": 0.1,
    "temperature_score": 0.1,
    "lr": 5e-5,
    "lr_retriever": 1e-5,
}
QA_TRAINING: Flags = {
    **NATURAL_QUESTIONS,
    **JOINT_TRAINING,
    "temperature_gold": 0.01,
    "temperature_score": 0.01,
    "lr": 4e-5,
    "lr_retriever": 4e-5,
}


def mmlu_zeroshot() -> Flags:
    """MMLU without training, on 64 GPUs.

    atlas evaluate --preset mmlu-zeroshot --name zeroshot --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas/xxl --load_index_path indices/atlas/wiki/xxl
        --eval_data 5-shot-multitask/combined_test.jsonl
    Expected with XXL: 47.09 % debiased accuracy on the test questions, 36.87 % before debiasing.
    Source: example_scripts/mmlu/README_MMLU.md of the PyTorch code.
    """
    return MULTIPLE_CHOICE


def mmlu_5_shot() -> Flags:
    """MMLU with 5 questions of one domain, on 64 GPUs: a run for each of the 57 domains, scored together.

    atlas train --preset mmlu-5-shot --name anatomy --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas/xxl --load_index_path indices/atlas/wiki/xxl
        --train_data 5-shot/individual_train/anatomy.5-shot-train.jsonl
        --eval_data 5-shot/individual_valid/anatomy.val.jsonl 5-shot/individual_test/anatomy.test.jsonl
    Step 16 is scored. Expected with XXL: 47.9 % (arXiv 2208.03299, whose index also holds Common Crawl).
    Source: example_scripts/mmlu/mmlu-5-shot.sh of the PyTorch code; its time limit is 8 hours.
    """
    return MMLU_TRAINING | {"total_steps": 16, "warmup_steps": 4, "eval_freq": 4}


def mmlu_5_shot_multitask() -> Flags:
    """MMLU with 5 questions of each domain for one model, on 64 GPUs.

    atlas train --preset mmlu-5-shot-multitask --name multitask --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas/xxl --load_index_path indices/atlas/wiki/xxl
        --train_data 5-shot-multitask/train.jsonl
        --eval_data 5-shot-multitask/combined_valid.jsonl 5-shot-multitask/combined_test.jsonl
    The step is chosen on the validation questions; the published score is that of step 96.
    Source: example_scripts/mmlu/mmlu-5-shot-multi.sh and README_MMLU.md of the PyTorch code; its time limit is 8 hours.
    """
    return MMLU_TRAINING | {"total_steps": 250, "warmup_steps": 25, "eval_freq": 16}


def mmlu_full() -> Flags:
    """MMLU with its auxiliary questions and 5 of each domain for one model, on 64 GPUs.

    atlas train --preset mmlu-full --name full --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas/xxl --load_index_path indices/atlas/wiki/xxl
        --train_data full/train.jsonl
        --eval_data full/combined_valid.jsonl full/combined_test.jsonl
    The step is chosen on the validation questions; the published score is that of step 1800.
    Source: example_scripts/mmlu/mmlu-full.sh and README_MMLU.md of the PyTorch code; its time limit is 8 hours.
    """
    return MMLU_TRAINING | {"total_steps": 2000, "warmup_steps": 50, "eval_freq": 150}


def nq_64_shot() -> Flags:
    """NaturalQuestions with 64 questions, on 32 GPUs.

    atlas train --preset nq-64-shot --name nq64 --reader_model_type google/t5-large-lm-adapt
        --model_path models/atlas/large --load_index_path indices/atlas/wiki/large
        --train_data nq_data/train.64-shot.jsonl --eval_data nq_data/dev.jsonl nq_data/test.jsonl
    Expected exact match with large: 38.4 on dev, 38.8 on test.
    Source: README.md of the PyTorch code; its train_fewshot.sh has two questions a GPU, and a time limit of 8 hours.
    """
    return QA_TRAINING | QUERY_SIDE | {"total_steps": 30, "warmup_steps": 5, "eval_freq": 30, "save_freq": 30}


def nq() -> Flags:
    """NaturalQuestions with all questions, on 64 GPUs; the index is refreshed. XL and XXL: --total_steps 5000.

    atlas train --preset nq --name nq --reader_model_type google/t5-xxl-lm-adapt --total_steps 5000
        --model_path models/atlas/xxl --load_index_path indices/atlas/wiki/xxl
        --train_data nq_data/train.jsonl --eval_data nq_data/dev.jsonl nq_data/test.jsonl
    Expected exact match with XXL: 64 (README.md of the PyTorch code).
    Source: example_scripts/nq/train.sh of the PyTorch code; its time limit is 72 hours.
    """
    schedule = {"scheduler": "cosine", "refresh_index": "0-1000:500,1000-10000:2000", "warmup_steps": 100}
    return QA_TRAINING | schedule | {"total_steps": 10000, "eval_freq": 500, "log_freq": 50, "save_freq": 5000}


def nq_evaluate() -> Flags:
    """NaturalQuestions with weights that were trained on it.

    atlas evaluate --preset nq-evaluate --name nq --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas_nq/xxl --load_index_path indices/atlas_nq/wiki/xxl
        --eval_data nq_data/dev.jsonl nq_data/test.jsonl
    Source: example_scripts/nq/evaluate.sh of the PyTorch code; its time limit is one hour on 32 GPUs.
    """
    return NATURAL_QUESTIONS | {"generation_max_length": 32}


def nq_retrieve_only() -> Flags:
    """The passages that a retriever finds for NaturalQuestions, without reading them.

    atlas evaluate --preset nq-retrieve-only --name nq --reader_model_type google/t5-xxl-lm-adapt
        --model_path models/atlas_nq/xxl --load_index_path indices/atlas_nq/wiki/xxl
        --eval_data nq_data/dev.jsonl nq_data/test.jsonl
    Source: example_scripts/nq/retrieve_only.sh of the PyTorch code.
    """
    return NATURAL_QUESTIONS | {"retrieve_only": True}


def templama() -> Flags:
    """TempLAMA's questions of one year, with that year's Wikipedia, on 64 GPUs.

    atlas train --preset templama --name templama-2017 --reader_model_type google/t5-xl-lm-adapt
        --model_path models/atlas/xl --train_data templama_data/temp_lama.train.2017.jsonl
        --eval_data templama_data/temp_lama.valid.2017.jsonl templama_data/temp_lama.test.2017.jsonl
        --passages corpora/wiki/enwiki-dec2017/text-list-100-sec.jsonl corpora/wiki/enwiki-dec2017/infobox.jsonl
    Source: example_scripts/templama/train.sh of the PyTorch code; its time limit is 8 hours.
    """
    templates = {"qa_prompt_format": "{question}", "n_context": 20, "retriever_n_context": 20}
    steps = {"total_steps": 100, "warmup_steps": 20, "eval_freq": 20, "save_freq": 100}
    return QA_TRAINING | QUERY_SIDE | templates | steps


def templama_evaluate() -> Flags:
    """TempLAMA's questions of one year, with weights that were trained on those of another.

    atlas evaluate --preset templama-evaluate --name templama-2020 --reader_model_type google/t5-xl-lm-adapt
        --model_path runs/templama-2017/checkpoint/latest
        --eval_data templama_data/temp_lama.valid.2020.jsonl templama_data/temp_lama.test.2020.jsonl
        --passages corpora/wiki/enwiki-dec2020/text-list-100-sec.jsonl corpora/wiki/enwiki-dec2020/infobox.jsonl
    Source: example_scripts/templama/evaluate.sh of the PyTorch code, where a missing backslash drops the prompt format.
    """
    templates = {"qa_prompt_format": "{question}", "n_context": 20, "retriever_n_context": 20}
    return NATURAL_QUESTIONS | templates | {"text_maxlength": 384, "generation_max_length": 32}


PRESETS: dict[str, dict[str, Callable[[], Flags]]] = {  # by command and name
    "train": {
        "mmlu-5-shot": mmlu_5_shot,
        "mmlu-5-shot-multitask": mmlu_5_shot_multitask,
        "mmlu-full": mmlu_full,
        "nq-64-shot": nq_64_shot,
        "nq": nq,
        "templama": templama,
    },
    "evaluate": {
        "mmlu-zeroshot": mmlu_zeroshot,
        "nq-evaluate": nq_evaluate,
        "nq-retrieve-only": nq_retrieve_only,
        "templama-evaluate": templama_evaluate,
    },
}
PRESETS["plan"] = PRESETS["train"] | PRESETS["evaluate"]
