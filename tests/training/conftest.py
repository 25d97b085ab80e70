"""Fixtures of the training tests."""

import pytest


@pytest.fixture(scope="session")
def flags(golden) -> list[str]:
    """The flags behind the goldens."""
    paths = {
        "--train_data": "qa.jsonl",
        "--reader_model_type": "assets/reader",
        "--retriever_model_path": "assets/retriever",
        "--model_path": "checkpoint_initial",
        "--passages": "passages.jsonl",
    }
    numbers = (
        "--per_gpu_batch_size 4 --n_context 5 --retriever_n_context 5 --text_maxlength 160 --target_maxlength 16 "
        "--dropout 0 --temperature_gold 0.1 --temperature_score 0.1 --total_steps 6 --warmup_steps 3 --lr 1e-3 "
        "--lr_retriever 3e-4 --weight_decay 0.01 --log_freq 1"
    )
    given = [text for flag, name in paths.items() for text in (flag, str(golden / name))]
    return ["--task", "qa", "--train_retriever", *given, *numbers.split()]
