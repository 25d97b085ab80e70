"""`atlas evaluate` from the command line to its files, against the reference and against itself."""

import gzip
import json

import numpy as np
import pytest

from atlas_jax.commands.main import main


def read_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def run(golden, folder, *flags, task="qa", data="qa.jsonl", reader="assets/reader", model="checkpoint_initial"):
    """A run's lines and scores."""
    argv = ["evaluate", "--task", task, "--eval_data", str(golden / data), "--target_maxlength", "16"]
    argv += ["--generation_max_length", "16", "--name", "run", "--checkpoint_dir", str(folder), "--write_results"]
    argv += ["--model_path", str(golden / model) if model in ("checkpoint_initial", "checkpoint_linear") else model]
    if reader:
        argv += ["--reader_model_type", str(golden / reader)]
    argv += ["--retriever_model_path", str(golden / "assets/retriever"), *flags]
    assert main(argv) == 0
    stem = folder / "run" / (data.removesuffix(".jsonl") + "-step-1")
    scores = json.loads(stem.with_suffix(".metrics.json").read_text())
    return read_lines(stem.with_suffix(".jsonl").read_text(encoding="utf-8")), scores


def test_mmlu_with_our_own_retrieval_equals_the_reference(golden, tmp_path):
    """Where both retrieve the same passages, for most questions, the logits equal the reference's.

    The reference's index is float16, so near ties are ordered differently.
    """
    passages = ("--passages", str(golden / "passages.jsonl"))
    flags = ("--n_context", "5", "--text_maxlength", "192", "--multiple_choice_eval_permutations", "cyclic")
    lines, _ = run(golden, tmp_path, *passages, *flags, task="multiple_choice", data="mmlu_eval.jsonl")
    expected_lines = read_lines(gzip.decompress((golden / "exp/mmlu/mmlu_eval-step-1.jsonl.gz").read_bytes()).decode())
    retrieved = read_lines((golden / "exp/mmlu/retrieved.jsonl").read_text(encoding="utf-8"))
    pairs = [
        (found, expected)
        for line, expected_line in zip(lines, expected_lines, strict=True)
        for found, expected in zip(line["permutations"], expected_line["permutations"], strict=True)
    ]
    same_passages = [
        [p["id"] for p in found["passages"]] == ids["ids"] for (found, _), ids in zip(pairs, retrieved, strict=True)
    ]
    assert sum(same_passages) > 300
    for (found, expected), agrees in zip(pairs, same_passages, strict=True):
        if agrees:
            logits, expected_logits = (list(order["choice_logits"].values()) for order in (found, expected))
            np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=2e-4)
            assert found["generation"] == expected["generation"]


@pytest.mark.usefixtures("quick_compiler")
def test_a_converted_model_evaluates_the_same(golden, tmp_path):
    """T5 1.0 from its folder and from its converted checkpoint alone: the same lines.

    tests/commands/test_convert.py shows that the other conversions restore parameters and tokenizers bit for bit.
    """
    index = ("--passages", str(golden / "passages.jsonl"), "--n_context", "3", "--text_maxlength", "96")
    lines, scores = run(golden, tmp_path / "a", *index, reader="t5_1_0", model="none")
    argv = ["convert", "--reader_model_type", str(golden / "t5_1_0")]
    argv += ["--retriever_model_path", str(golden / "assets/retriever"), "--output", str(tmp_path / "ours")]
    assert main(argv) == 0
    again, others = run(golden, tmp_path / "b", *index, reader=None, model=str(tmp_path / "ours"))
    assert again == lines
    assert others["eval_loss"] == scores["eval_loss"]


@pytest.mark.usefixtures("quick_compiler")
def test_flags_of_evaluation_have_their_effect(golden, tmp_path):
    """bfloat16, reranking, a decoder prompt, faiss, closed book and --retrieve_only each have their effect."""
    index = ("--passages", str(golden / "passages.jsonl"), "--n_context", "3", "--text_maxlength", "96")
    plain, scores = run(golden, tmp_path / "plain", *index)
    assert all(len(line["passages"]) == 3 for line in plain)
    _, half = run(golden, tmp_path / "half", *index, "--precision", "bf16")
    assert half["eval_loss"] == pytest.approx(scores["eval_loss"], rel=0.05)
    assert half["eval_loss"] != scores["eval_loss"]
    faiss, _ = run(golden, tmp_path / "faiss", *index, "--index_mode", "faiss", "--faiss_index_type", "ivfflat")
    same = [line["passages"] == plain_line["passages"] for line, plain_line in zip(faiss, plain, strict=True)]
    assert np.mean(same) > 0.9  # exact, since every list is scanned; equal scores may be in another order
    rerank = ("--retrieve_with_rerank", "--n_to_rerank_with_retrieve_with_rerank", "20")
    reranked, _ = run(golden, tmp_path / "rerank", *index, *rerank)
    assert np.mean([a["passages"][0] == b["passages"][0] for a, b in zip(reranked, plain, strict=True)]) > 0.9
    prompted, _ = run(golden, tmp_path / "prompt", *index, "--decoder_prompt_format", "so", "--dont_write_passages")
    assert "passages" not in prompted[0]
    assert [line["generation"] for line in prompted] != [line["generation"] for line in plain]
    closed, _ = run(golden, tmp_path / "closed", "--closed_book", "--text_maxlength", "96")
    assert closed[0]["passages"] == [{"title": "", "text": ""}]
    found, only = run(golden, tmp_path / "only", *index, "--retrieve_only")
    assert [line["passages"] for line in found] == [line["passages"] for line in plain]
    assert "generation" not in found[0]
    assert "eval_loss" not in only
