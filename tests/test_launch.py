"""The launch scripts: what they run, with a stand-in for `atlas` that writes down its arguments."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from atlas_jax.command_line import parse_args

REPOSITORY = Path(__file__).parents[1]
EXPERIMENTS = {"zeroshot": "evaluate", "5-shot": "train", "5-shot-multitask": "train", "full": "train"}


@pytest.fixture
def data(tmp_path) -> Path:
    """The published layout, with two domains of a question each and nothing in the weights."""
    rows = {
        domain: {"question": f"{domain}?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "A"}
        | {"dataset": f"{domain}_test"}
        for domain in ("anatomy", "virology")
    }
    mmlu = tmp_path / "data/mmlu_data"
    for domain, row in rows.items():
        for name in ("train/{}.5-shot-train", "valid/{}.val", "test/{}.test"):
            write(mmlu / f"5-shot/individual_{name.format(domain)}.jsonl", [row])
    for setting in ("5-shot", "5-shot-multitask", "full"):
        for name in ("train", "combined_valid", "combined_test"):
            write(mmlu / setting / f"{name}.jsonl", list(rows.values()))
    for folder in ("models/atlas/base", "indices/atlas/wiki/base"):
        (tmp_path / folder).mkdir(parents=True)
    atlas = tmp_path / "atlas"
    atlas.write_text(
        "#!/usr/bin/env python3\n"
        "import json, sys\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(tmp_path / 'calls')!r}, 'a'))\n"
    )
    atlas.chmod(0o755)
    return tmp_path


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(data: Path, experiment: str, *flags: str, **environment: str) -> list[list[str]]:
    """What the script calls `atlas` with."""
    script = REPOSITORY / f"launch/mmlu/{experiment}.sh"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    settings = {"DATA_DIR": str(data), "SIZE": "base", "ATLAS": str(data / "atlas")}
    (data / "calls").unlink(missing_ok=True)
    subprocess.run([script, *flags], env=plain | settings | environment, capture_output=True, check=False)
    calls = data / "calls"
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_its_flags_are_ours(data, experiment):
    """`atlas` knows every flag and finds every file; arguments of the script come last."""
    calls = launch(data, experiment, "--seed", "7")
    assert len(calls) == (2 if experiment == "5-shot" else 1)
    for command, *flags in calls:
        assert command == EXPERIMENTS[experiment]
        config = parse_args(command, flags)
        assert config.run.seed == 7
        assert (config.retrieval.n_context, config.text.text_maxlength) == (30, 512)
        assert config.distill.train_retriever == (command == "train")


def test_5_shot_takes_one_domain(data):
    """By name, or by the index of a SLURM array task; all domains otherwise, in order; none twice."""

    def names(**environment: str) -> list[str]:
        return [call[call.index("--name") + 1] for call in launch(data, "5-shot", **environment)]

    assert names() == ["anatomy", "virology"]
    assert names(DOMAIN="virology") == ["virology"]
    assert names(SLURM_ARRAY_TASK_ID="1") == ["virology"]
    write(data / "experiments/base-mmlu-5-shot/anatomy/anatomy.test-step-16.jsonl", [])
    assert names() == ["virology"]


def test_a_missing_setting_is_named(data):
    """Without DATA_DIR nothing runs."""
    script = REPOSITORY / "launch/mmlu/full.sh"
    environment = {name: value for name, value in os.environ.items() if name != "DATA_DIR"}
    done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "set DATA_DIR" in done.stderr
    assert not (data / "calls").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_slurm_starts_the_same_command(data, experiment):
    """`srun`, and in a container that, before the command of launch/mmlu."""
    script = REPOSITORY / f"launch/slurm/{experiment}.sh"
    settings = {"DATA_DIR": str(data), "SIZE": "base", "DRY_RUN": "1", "IMAGE": "atlas.sif"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run([script, "--seed", "7"], env=plain | settings, capture_output=True, text=True, cwd=REPOSITORY)
    first = done.stdout.splitlines()[0].split()
    assert first[0] == "srun"
    assert first[first.index("apptainer") :][:2] == ["apptainer", "exec"]
    assert parse_args(EXPERIMENTS[experiment], first[first.index("atlas") + 2 :]).run.seed == 7


def test_local_numbers_lines_and_ends_all_with_the_first_failure():
    """The others are killed, and the status is that of the one that failed."""
    command = ["bash", "-c", 'echo "process"; [ "${!#}" = 0 ] || exit 4; exec sleep 60', "bash"]
    script = [REPOSITORY / "launch/local.sh", "-n", "2", "--", *command]
    done = subprocess.run(script, env=os.environ | {"GRACE": "0"}, capture_output=True, text=True, timeout=30)
    assert done.returncode == 4
    assert "[1] " in done.stdout
