"""Presets are the flags of the published commands, and flags beside them replace their own."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest

from atlas_jax.commands.flags import parse_args
from atlas_jax.commands.presets import PRESETS
from atlas_jax.config import to_dict
from atlas_jax.errors import UserError

PATHS = "--model_path M --load_index_path I --eval_data E --reader_model_type google/t5-xl-lm-adapt --name N"
MULTIPLE_CHOICE = """--precision bf16 --target_maxlength 16 --text_maxlength 512 --per_gpu_batch_size 1 --n_context 30
    --retriever_n_context 30 --write_results --task multiple_choice --multiple_choice_train_permutations all
    --multiple_choice_eval_permutations cyclic --index_mode flat"""
MMLU = f"""{MULTIPLE_CHOICE} --shuffle --train_retriever --gold_score_mode ppmean --use_gradient_checkpoint_reader
    --use_gradient_checkpoint_retriever --shard_optim --shard_grads --temperature_gold 0.1 --temperature_score 0.1
    --dropout 0.1 --lr 5e-5 --lr_retriever 1e-5 --scheduler linear --weight_decay 0.01 --log_freq 4
    --query_side_retriever_training --refresh_index -1"""
QA = """--precision fp32 --text_maxlength 512 --target_maxlength 16 --n_context 40 --retriever_n_context 40 --task qa
    --index_mode flat --write_results --per_gpu_batch_size 1"""
NQ = f"""{QA} --shuffle --train_retriever --gold_score_mode pdist --use_gradient_checkpoint_reader
    --use_gradient_checkpoint_retriever --shard_optim --shard_grads --temperature_gold 0.01 --temperature_score 0.01
    --dropout 0.1 --weight_decay 0.01 --lr 4e-5 --lr_retriever 4e-5"""
FEW_SHOT = f"{NQ} --query_side_retriever_training --refresh_index -1 --scheduler linear --log_freq 4"
TEMPLAMA = "--n_context 20 --retriever_n_context 20 --qa_prompt_format {question}"
PUBLISHED = {  # name: the flags of the published command, without paths and --save_freq 10000000000
    "mmlu-zeroshot": MULTIPLE_CHOICE,
    "mmlu-5-shot": f"{MMLU} --eval_freq 4 --total_steps 16 --warmup_steps 4",
    "mmlu-5-shot-multitask": f"{MMLU} --eval_freq 16 --total_steps 250 --warmup_steps 25",
    "mmlu-full": f"{MMLU} --eval_freq 150 --total_steps 2000 --warmup_steps 50",
    "nq-64-shot": f"{FEW_SHOT} --eval_freq 30 --total_steps 30 --warmup_steps 5 --save_freq 30",
    "nq": f"""{NQ} --refresh_index 0-1000:500,1000-10000:2000 --scheduler cosine --eval_freq 500 --log_freq 50
        --total_steps 10000 --warmup_steps 100 --save_freq 5000""",
    "nq-evaluate": f"--generation_max_length 32 --gold_score_mode ppmean {QA}",
    "nq-retrieve-only": f"{QA} --retrieve_only",
    "templama": f"{FEW_SHOT} {TEMPLAMA} --eval_freq 20 --total_steps 100 --warmup_steps 20 --save_freq 100",
    "templama-evaluate": f"{QA} {TEMPLAMA} --generation_max_length 32 --text_maxlength 384",
}
COMMANDS = {name: command for command in ("train", "evaluate") for name in PRESETS[command]}


@pytest.fixture(autouse=True)
def input_files(tmp_path, monkeypatch):
    """The files and folders of PATHS, in the working directory."""
    for folder in ("M", "I"):
        (tmp_path / folder).mkdir()
    for file in ("E", "T"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)


def parse(name: str, flags: str):
    """The configuration of a preset's command with PATHS and these flags."""
    data = ["--train_data", "T"] if COMMANDS[name] == "train" else []
    return parse_args(COMMANDS[name], [*PATHS.split(), *data, *flags.split()])


def test_every_preset_is_compared():
    """A preset that is added has its published command here."""
    assert PUBLISHED.keys() == COMMANDS.keys() == PRESETS["plan"].keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_command(name):
    """Every flag of the run is equal, but --loss_group, whose published value is --per_gpu_batch_size."""
    published, preset = to_dict(parse(name, PUBLISHED[name])), to_dict(parse(name, f"--preset {name}"))
    expected = {"shard_grads": False, "loss_group": 1 if COMMANDS[name] == "train" else None}
    assert preset == published | expected
    assert published["per_gpu_batch_size"] == 1
    assert published != to_dict(parse(name, "--task qa"))


def test_flags_beside_a_preset_replace_its_own():
    """Before it and after it, numbers and switches; a switch is turned off by --no-FLAG, and on again by itself."""
    preset = parse("mmlu-full", "--preset mmlu-full")
    config = parse(
        "mmlu-full", "--lr 1e-3 --no-shuffle --preset mmlu-full --n_context 5 --no-write_results --write_results"
    )
    assert (preset.optim.lr, preset.run.shuffle, preset.retrieval.n_context) == (5e-5, True, 30)
    assert (config.optim.lr, config.run.shuffle, config.retrieval.n_context) == (1e-3, False, 5)
    assert config.run.write_results
    assert config.distill == preset.distill
    assert dataclasses.replace(config.optim, lr=5e-5) == preset.optim


@pytest.mark.parametrize(
    ("command", "name", "problem"),
    [
        ("evaluate", "mmlu-full", "--preset mmlu-full: is for atlas train"),
        ("train", "nq-evaluate", "--preset nq-evaluate: is for atlas evaluate"),
        ("train", "mmlu-ful", "--preset mmlu-ful: did you mean mmlu-full?"),
        ("train", "zzz", "--preset zzz: choose from mmlu-5-shot, "),
    ],
)
def test_other_presets_are_refused(command, name, problem):
    """One of the other command, a misspelt one and an unknown one: a line that says which there are."""
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_args(command, ["--preset", name])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_in_a_docstring_parses(name, tmp_path):
    """It uses the preset, and its docstring names the source; the files it names are made first."""
    doc = inspect.getdoc(PRESETS[COMMANDS[name]][name])
    words = shlex.split(re.search(r"^atlas .*\n( {4}.*\n)+", doc, re.MULTILINE)[0])
    assert words[:4] == ["atlas", COMMANDS[name], "--preset", name]
    assert "Source: " in doc
    for word in words:
        if "/" in word and not word.startswith("google/"):
            path = tmp_path / word
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch() if word.endswith(".jsonl") else path.mkdir(parents=True)
    parse_args(COMMANDS[name], words[2:])


def test_the_guide_names_every_preset():
    """docs/training.md has a line for each."""
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", guide, re.MULTILINE)) >= COMMANDS.keys()
