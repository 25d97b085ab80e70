"""Writes files of an older commit of this project, for the tests that read them: run by hand, with that commit.

    git clone . /tmp/old && cd /tmp/old && git checkout COMMIT && make setup
    .venv/bin/python NEW_CHECKOUT/tests/compatibility/make.py NEW_CHECKOUT/tests/compatibility/COMMIT.tar.xz

The archive holds a run that was stopped after two of six steps (`runs/`), its metrics when it was not stopped
(`uninterrupted.jsonl`), a converted checkpoint (`converted/`), a flat and a faiss index (`flat/`, `ivfsq/`), the rows
and passages they were made from, and the scores of an evaluation with each index and
the passages that it found (`scores.json`).
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

GOLDEN = Path("tests/golden").resolve()
T5 = {
    **{"model_type": "t5", "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 1},
    **{"num_decoder_layers": 1, "vocab_size": 2048, "feed_forward_proj": "relu", "tie_word_embeddings": True},
}
BERT = {
    **{"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16},
    **{"num_hidden_layers": 1, "vocab_size": 1500, "max_position_embeddings": 64},
}
TRAIN = (
    "--task qa --train_data rows.jsonl --passages passages.jsonl --train_retriever --refresh_index 1 "
    "--accumulation_steps 2 --shuffle --dropout 0 --per_gpu_batch_size 2 --n_context 2 --retriever_n_context 3 "
    "--text_maxlength 48 --target_maxlength 8 --lr 1e-2 --lr_retriever 1e-3 --warmup_steps 0 --scheduler fixed "
    "--log_freq 1 --save_freq 2 --checkpoint_dir runs --compile_cache none"
)
EVALUATE = (
    "--task qa --eval_data rows.jsonl --n_context 2 --text_maxlength 48 --target_maxlength 8 "
    "--generation_max_length 8 --per_gpu_batch_size 4 --write_results --checkpoint_dir scored --compile_cache none"
)
MODELS = ("--reader_model_type", "t5", "--retriever_model_path", "bert")


def atlas(folder: Path, *arguments: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [str(Path(sys.executable).with_name("atlas")), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def model(folder: Path, tokenizer: Path, config: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())


def head(source: Path, target: Path, count: int) -> None:
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))


def main(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model(folder / "t5", GOLDEN / "assets/reader", T5)
        model(folder / "bert", GOLDEN / "assets/retriever", BERT)
        head(GOLDEN / "qa.jsonl", folder / "rows.jsonl", 6)
        head(GOLDEN / "passages.jsonl", folder / "passages.jsonl", 24)
        atlas(folder, "train", "--name", "whole", "--total_steps", "6", *TRAIN.split(), *MODELS)
        (folder / "runs/whole/metrics.jsonl").rename(folder / "uninterrupted.jsonl")
        # A run of two steps saves its last step with the optimizers, and may go on to more steps
        atlas(folder, "train", "--name", "stopped", "--total_steps", "2", "--save_optimizer", *TRAIN.split(), *MODELS)
        atlas(folder, "convert", *MODELS, "--output", "converted")
        scores = {}
        for kind in ("flat", "ivfsq"):
            mode = () if kind == "flat" else ("--index_mode", "faiss", "--faiss_index_type", kind)
            build = ("--model_path", "converted", "--passages", "passages.jsonl", "--text_maxlength", "48", *mode)
            atlas(folder, "index", "build", *build, "--output", kind)
            flags = ("--model_path", "converted", "--load_index_path", kind, *mode, *EVALUATE.split())
            atlas(folder, "evaluate", "--name", kind, *flags)
            found = json.loads((folder / "scored" / kind / "rows-step-1.metrics.json").read_text())
            scores[kind] = {metric: found[metric] for metric in ("exact_match", "f1", "eval_loss")}
            lines = (folder / "scored" / kind / "rows-step-1.jsonl").read_text().splitlines()
            passages = [[passage["id"] for passage in json.loads(line)["passages"]] for line in lines]
            scores[kind] |= {"passages": passages}
        (folder / "scores.json").write_text(json.dumps(scores, indent=1))
        contents = ("rows.jsonl", "passages.jsonl", "uninterrupted.jsonl", "runs/stopped", "converted", "flat", "ivfsq")
        with tarfile.open(archive, "w:xz") as file:
            for path in (*contents, "scores.json"):
                file.add(folder / path, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
