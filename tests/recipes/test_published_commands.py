"""The commands of the published README, from the downloads to the score tables, on small files in its layout."""

import json
from collections.abc import Iterator

import pytest

from tests.recipes.published import DOMAINS, Reader, check_table, downloaded_files

pytestmark = pytest.mark.usefixtures("quick_compiler_in_subprocesses")

CUT = "--text_maxlength 96 --n_context 2 --retriever_n_context 2 --generation_max_length 4"  # shorter, for this test
CUT_STEPS = f"{CUT} --total_steps 4 --eval_freq 2 --warmup_steps 1"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    """A reader who has downloaded model, index and MMLU as the README says."""
    with downloaded_files(tmp_path_factory.mktemp("published"), questions=3) as reader:
        yield reader


def test_zeroshot(reader):
    """Scores the published weights, without training."""
    reader.atlas("zeroshot", CUT)
    path = "zeroshot/combined_test-step-1.jsonl"
    check_table(reader, [reader.save / path], path, "5-shot-multitask/combined_test.jsonl")


def test_5_shot(tmp_path):
    """A run for each of two domains; the first converts and tokenizes the index, the second does neither.

    The scores of both are one table.
    """
    with downloaded_files(tmp_path, questions=3) as reader:
        train_5_shot(reader)


def train_5_shot(reader: Reader) -> None:
    """Trains both domains and prints their table."""
    reader.variables["SAVE_DIR"] = str(reader.save / "5-shot")
    made = []
    for domain in DOMAINS:
        reader.atlas("5-shot", CUT_STEPS, DOMAIN=domain)
        made.append([line for line in ("taken over", "tokenizing for the reader") if line in reader.log])
    assert made == [["taken over", "tokenizing for the reader"], []]
    reader.variables["SAVE_DIR"] = str(reader.save)
    predictions = [reader.save / f"5-shot/{domain}/{domain}.test-step-4.jsonl" for domain in DOMAINS]
    check_table(reader, predictions, "5-shot", "5-shot-multitask/combined_test.jsonl", "--step 4 --split test")


@pytest.mark.parametrize(("experiment", "name"), [("5-shot-multitask", "multitask"), ("full", "full")])
def test_one_model_for_all_domains(reader, experiment, name):
    """Trains one model, and scores the test predictions of the step that was best on the validation questions."""
    reader.atlas(experiment, CUT_STEPS)
    best = json.loads((reader.save / name / "best.json").read_text())["step"]
    path = f"{name}/combined_test-step-{best}.jsonl"
    check_table(reader, [reader.save / path], path, f"{experiment}/combined_test.jsonl")
