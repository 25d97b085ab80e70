"""A server with small files in the published layout, and the commands of the published README.

The model is the golden checkpoint (a T5 1.1 reader and a retriever of a few layers), the index its 150 passages in 128
shards, MMLU two domains in the layout of its archive. The reader's folder holds config.json and spiece.model alone, as
`google/t5-*-lm-adapt` do.
"""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.retrieval.formats.export import export_torch_shards
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from tests.preprocessing.download_server import run_server

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
DOMAINS = ("anatomy", "virology")
MODEL, INDEX = "models/atlas/base", "indices/atlas/wiki/base"

EVALUATION = """--target_maxlength 16 --reader_model_type $READER --text_maxlength 512 --per_gpu_batch_size 1
    --model_path $DATA_DIR/models/atlas/base --load_index_path $DATA_DIR/indices/atlas/wiki/base --index_mode flat
    --n_context 30 --retriever_n_context 30 --checkpoint_dir $SAVE_DIR --main_port 15432 --write_results
    --task multiple_choice --multiple_choice_train_permutations all --multiple_choice_eval_permutations cyclic"""
TRAINING = f"""{EVALUATION} --shuffle --train_retriever --gold_score_mode ppmean --use_gradient_checkpoint_reader
    --use_gradient_checkpoint_retriever --shard_optim --shard_grads --temperature_gold 0.1 --temperature_score 0.1
    --refresh_index -1 --dropout 0.1 --lr 5e-5 --lr_retriever 1e-5 --scheduler linear --weight_decay 0.01 --log_freq 4
    --save_freq 10000000000 --query_side_retriever_training"""
COMMANDS = {  # the flags of each experiment of README_MMLU.md; $PRECISION is bf16 there
    "zeroshot": f"""evaluate --precision $PRECISION {EVALUATION} --name zeroshot
        --eval_data $MMLU/5-shot-multitask/combined_valid.jsonl $MMLU/5-shot-multitask/combined_test.jsonl""",
    "5-shot": f"""train --precision $PRECISION {TRAINING} --name $DOMAIN --eval_freq 4 --total_steps 16 --warmup_steps 4
        --train_data $MMLU/5-shot/individual_train/$DOMAIN.5-shot-train.jsonl
        --eval_data $MMLU/5-shot/individual_valid/$DOMAIN.val.jsonl $MMLU/5-shot/individual_test/$DOMAIN.test.jsonl""",
    "5-shot-multitask": f"""train --precision $PRECISION {TRAINING} --name multitask
        --train_data $MMLU/5-shot-multitask/train.jsonl
        --eval_data $MMLU/5-shot-multitask/combined_valid.jsonl $MMLU/5-shot-multitask/combined_test.jsonl
        --eval_freq 16 --total_steps 250 --warmup_steps 25""",
    "full": f"""train --precision $PRECISION {TRAINING} --name full --train_data $MMLU/full/train.jsonl
        --eval_data $MMLU/full/combined_valid.jsonl $MMLU/full/combined_test.jsonl
        --eval_freq 150 --total_steps 2000 --warmup_steps 50""",
}


def published_files(folder: Path) -> dict[str, bytes]:
    """What the server of the published files has, by path below its address; `folder` is for scratch files."""
    export_torch_shards(TorchShards(GOLDEN / "index_1shard"), folder / "shards", 128)
    files = {f"{INDEX}/{path.name}": path.read_bytes() for path in (folder / "shards").iterdir()}
    return files | {f"{MODEL}/model.pth.tar": (GOLDEN / "checkpoint_initial" / "model.pth.tar").read_bytes()}


def write_mmlu_archive(path: Path, questions: int) -> None:
    """Writes data.tar: two domains with that many test and validation questions and five training questions each."""
    rows = [json.loads(line) for line in (GOLDEN / "mmlu_eval.jsonl").read_text(encoding="utf-8").splitlines()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, domain in enumerate(DOMAINS):
            own = rows[number * 50 : number * 50 + 50]
            splits = {"dev": own[:5], "val": own[5 : 5 + questions], "test": own[20 : 20 + questions]}
            for split, part in splits.items():
                _add_csv(archive, f"data/{split}/{domain}_{split}.csv", part)
        auxiliary = [row | {"question": f"{row['question']} ({n})"} for n in range(45) for row in rows]
        _add_csv(archive, "data/auxiliary_train/race.csv", auxiliary)


def _add_csv(archive: tarfile.TarFile, name: str, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([row["question"], *row["options"].values(), row["answer"]] for row in rows)
    info = tarfile.TarInfo(name)
    info.size = len(content := text.getvalue().encode())
    archive.addfile(info, io.BytesIO(content))


def write_model_folders(folder: Path) -> dict[str, str]:
    """Writes the folders of reader and retriever without weights; returns the variables that name them."""
    for name, files in {"reader": ("config.json", "spiece.model"), "retriever": ("config.json", "vocab.txt")}.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            shutil.copy(GOLDEN / "assets" / name / file, folder / name)
    return {"READER": str(folder / "reader"), "RETRIEVER": str(folder / "retriever")}


class Reader:
    """A person who follows the README: a data folder, variables, and the commands as they are typed there."""

    def __init__(self, home: Path, url: str):
        data = home / "data dir"
        mmlu, save = data / "data" / "mmlu_data", data / "experiments"
        self.variables = {"DATA_DIR": str(data), "MMLU": str(mmlu), "SAVE_DIR": str(save), "PRECISION": "fp32"}
        self.variables |= write_model_folders(home / "models")
        self.mmlu, self.save = mmlu, save
        self.environment = os.environ | {"ATLAS_BASE_URL": url, "no_proxy": "127.0.0.1", "XDG_CACHE_HOME": str(home)}
        self.environment |= {"PYTHONPATH": str(ROOT)}

    def run(self, command: str, **variables: str) -> str:
        """Runs a command of the README with `python SCRIPT` or `atlas` at its start; returns what it prints."""
        # Substituted after splitting, as in quotes
        words = [string.Template(word).substitute(self.variables | variables) for word in shlex.split(command)]
        program = [sys.executable, "-m", "atlas_jax"] if words[0] == "atlas" else [sys.executable]
        options = {"env": self.environment, "cwd": ROOT, "capture_output": True, "text": True}
        done = subprocess.run([*program, *words[1:]], check=False, **options)
        assert done.returncode == 0, done.stderr
        self.log = done.stderr
        return done.stdout

    def atlas(self, experiment: str, flags: str, **variables: str) -> str:
        """Runs an experiment of the README with these flags after its own."""
        retriever = "--retriever_model_path $RETRIEVER"
        return self.run(f"atlas {COMMANDS[experiment]} {retriever} {flags}", **variables)


@contextlib.contextmanager
def downloaded_files(home: Path, questions: int) -> Iterator[Reader]:
    """A reader who has downloaded model, index and MMLU as the README says."""
    with run_server() as server:
        server.files |= published_files(home)
        reader = Reader(home, server.url)
        write_mmlu_archive(reader.mmlu / "data.tar", questions)
        for command in ("prepare_mmlu.py", f"download_model.py --model {MODEL}", f"download_index.py --model {INDEX}"):
            reader.run(f"python preprocessing/{command} --output_directory $DATA_DIR")
        yield reader


def check_table(reader: Reader, predictions: list[Path], path: str, gold: str, flags: str = "") -> str:
    """The score table, whose debiased accuracy must be the mean of those that the runs reported with these files."""
    script = "python eval/evaluate_mmlu_predictions.py"
    table = reader.run(f"{script} --predictions_path $SAVE_DIR/{path} --gold_path $MMLU/{gold} {flags}")
    scores = [json.loads(file.with_suffix(".metrics.json").read_text()) for file in predictions]
    debiased = float(re.search(r"^\s*all\s.*\s([\d.]+)$", table, re.MULTILINE)[1])
    assert debiased == pytest.approx(np.mean([score["debiased_accuracy"] for score in scores]), abs=0.01)
    return table
