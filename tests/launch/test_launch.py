"""The launch scripts: the commands that they start, on which hosts, and how they forward signals."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atlas_jax.commands.flags import parse_args
from atlas_jax.config import Config
from atlas_jax.runtime import cluster

REPOSITORY = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted(path for path in (REPOSITORY / "launch").rglob("*.sh") if path.name != "common.sh")
EXPERIMENTS = {"zeroshot": "evaluate", "5-shot": "train", "5-shot-multitask": "train", "full": "train"}
STEPS = {"5-shot": (16, 4, 4), "5-shot-multitask": (250, 25, 16), "full": (2000, 50, 150)}  # as published
NODES = {
    "node[1-4]-ib": "node1-ib node2-ib node3-ib node4-ib",
    "rack1-[2,4-5]n[1-2]": "rack1-2n1 rack1-2n2 rack1-4n1 rack1-4n2 rack1-5n1 rack1-5n2",
}
IMAGES = {"": {}, "apptainer": {"IMAGE": "atlas.sif"}, "pyxis": {"IMAGE": "nvcr.io#atlas:1", "CONTAINER": "pyxis"}}


def check_command(experiment: str, command: str, *flags: str) -> Config:
    """Asserts that `atlas` parses the flags of an experiment and finds its files, and returns the configuration."""
    assert command == EXPERIMENTS[experiment]
    config = parse_args(command, flags)
    assert config.run.seed == 7
    assert (config.retrieval.n_context, config.text.text_maxlength) == (30, 512)
    assert config.distill.train_retriever == (command == "train")
    if command == "train":
        assert (config.optim.total_steps, config.optim.warmup_steps, config.run.eval_freq) == STEPS[experiment]
        assert config.run.keep == (0 if experiment == "5-shot" else 1)
        assert "valid" in config.run.eval_data[0]  # by which the best step is selected
    return config


def words_after(word: str, line: str) -> list[str]:
    """The words of a printed command line after `word`."""
    words = shlex.split(line)
    return words[words.index(word) + 1 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_shellcheck_finds_no_fault(script):
    """Neither in the script nor in the files that it sources."""
    process = subprocess.run([SHELLCHECK, "-x", "-a", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")


def test_shellcheck_finds_a_fault():
    """The counter-case of the test above."""
    process = subprocess.run([SHELLCHECK, "-"], input="#!/bin/bash\nrm $1\n", capture_output=True, text=True)
    assert process.returncode == 1
    assert "SC2086" in process.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_atlas_with_valid_flags(site, experiment):
    """The script's arguments come last; DRY_RUN prints the same commands; the score table comes once, at the end."""
    script = f"launch/mmlu/{experiment}.sh"
    printed = site.run(script, "--seed", "7", DRY_RUN="1").splitlines()
    assert not site.calls()
    site.run(script, "--seed", "7")
    calls = [call["arguments"] for call in site.calls()]
    assert len(calls) == (2 if experiment == "5-shot" else 1)
    for line, call in zip(printed, calls, strict=False):
        assert words_after("atlas", line) == call
        check_command(experiment, *call)
    (table,) = site.read_log("python")
    assert "eval/evaluate_mmlu_predictions.py --predictions_path" in table


def write_predictions(path: Path, gold: Path, *, right: bool) -> None:
    """Writes predictions of all questions of a gold file, all right or all wrong, as `atlas` does."""
    rows = [json.loads(line) for line in gold.read_text().splitlines()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in rows:
            logits = {letter: float((letter == row["answer"]) == right) for letter in row["options"]}
            letter = max(logits, key=logits.__getitem__)
            permutations = [{"metadata": row | {"is_original": True}, "choice_logits": logits}]
            line = {"generation": letter, "metadata": row | {"is_original": True}, "permutations": permutations}
            print(json.dumps(line), file=file)


@pytest.mark.parametrize("experiment", STEPS)
def test_the_step_that_is_best_on_validation_is_scored(site, experiment):
    """One model: the step that its best.json names, and no other. 57 models: step 16, as published."""
    last, _, every = STEPS[experiment]
    runs, gold = site.home / f"experiments/base-mmlu-{experiment}", site.home / "data/mmlu_data" / experiment
    files = {runs: gold / "combined_test.jsonl"}
    if experiment == "5-shot":
        files = {runs / name: gold / f"individual_test/{name}.test.jsonl" for name in ("anatomy", "virology")}
    for step in range(every, last + 1, every):
        for run, file in files.items():
            right = step == (16 if experiment == "5-shot" else 2 * every)
            write_predictions(run / f"{file.stem}-step-{step}.jsonl", file, right=right)
    for best in (2 * every, every):
        for run in files:
            (run / "best.json").write_text(json.dumps({"step": best}, indent=2))
        scores = {"ATLAS": "true", "SCORES": f"{sys.executable} eval/evaluate_mmlu_predictions.py"}
        table = site.run(f"launch/mmlu/{experiment}.sh", **scores).splitlines()
        accuracy = "100.00" if experiment == "5-shot" or best == 2 * every else "0.00"
        assert table[-1].split() == ["all", accuracy, accuracy]


def test_5_shot_trains_each_domain_once(site):
    """One domain by name or by the index of a SLURM array task, else all in order; a finished domain is skipped."""

    def names(**environment: str) -> list[str]:
        site.run("launch/mmlu/5-shot.sh", **environment)
        return [call["arguments"][call["arguments"].index("--name") + 1] for call in site.calls()]

    assert names(DOMAIN="virology") == ["virology"]
    assert names(SLURM_ARRAY_TASK_ID="1") == []
    assert not site.read_log("python")  # anatomy has no predictions yet
    assert names() == ["anatomy"]
    assert site.read_log("python")


@pytest.mark.parametrize("script", ["mmlu", "slurm"])
def test_a_tilde_in_a_setting_is_the_home_folder(site, script):
    """`DATA_DIR="~/x"`, which the shell leaves alone, is the same as `DATA_DIR=~/x`; a quoted command stays whole."""
    expected = site.run(f"launch/{script}/full.sh", DRY_RUN="1", SAVE_DIR=f"{site.home}/runs")
    site.environment |= {"HOME": str(site.home.parent), "DATA_DIR": f"~/{site.home.name}"}
    assert site.run(f"launch/{script}/full.sh", DRY_RUN="1", SAVE_DIR=f"~/{site.home.name}/runs") == expected
    command = "'a \"quoted\" atlas' now"
    if script == "mmlu":
        (line, *_) = site.run("launch/mmlu/full.sh", DRY_RUN="1", ATLAS=command).splitlines()
        assert shlex.split(line)[:2] == shlex.split(command)


def test_a_path_that_no_container_can_mount_is_refused(site):
    """Mounts are separated by commas, and their ends by colons: one line, status 2; without a container it runs."""
    settings = {"SAVE_DIR": f"{site.home}/a,b", "DRY_RUN": "1"}
    process = site.start("launch/slurm/full.sh", **settings, **IMAGES["apptainer"])
    line = f"{site.home}/a,b: no container can mount a path with , or : in its name; take another\n"
    assert (process.communicate(timeout=30)[0], process.returncode) == (line, 2)
    assert "a\\,b" in site.run("launch/slurm/full.sh", **settings)


@pytest.mark.parametrize("script", ["mmlu", "slurm"])
@pytest.mark.parametrize("empty", [False, True])
def test_5_shot_without_domains_names_the_script_that_makes_them(site, script, empty):
    """If the folder of the domains is missing or empty: one line, exit status 2, and no command runs."""
    folder = site.home / "data/mmlu_data/5-shot/individual_train"
    shutil.rmtree(folder)
    if empty:
        folder.mkdir()
    process = site.start(f"launch/{script}/5-shot.sh", DRY_RUN="1")
    remedy = f"python preprocessing/prepare_mmlu.py --output_directory {site.home} makes them"
    assert process.communicate(timeout=30)[0] == f"{folder}: no domains there; {remedy}\n"
    assert process.returncode == 2


@pytest.mark.parametrize("script", ["mmlu", "slurm"])
def test_5_shot_refuses_an_array_task_beyond_the_domains(site, script):
    """One line with the right --array, exit status 2, and no command runs."""
    folder = site.home / "data/mmlu_data/5-shot/individual_train"
    process = site.start(f"launch/{script}/5-shot.sh", DRY_RUN="1", SLURM_ARRAY_TASK_ID="2")
    line = f"SLURM_ARRAY_TASK_ID 2: {folder} has 2 domains; submit with --array=0-1\n"
    assert (process.communicate(timeout=30)[0], process.returncode) == (line, 2)


def test_a_missing_setting_is_named(site):
    """Without DATA_DIR no command runs."""
    process = site.start("launch/mmlu/full.sh", DATA_DIR="")
    assert "set DATA_DIR" in process.communicate()[0]
    assert process.returncode
    assert not site.calls()


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_slurm_script_prints_srun_and_the_container(site, experiment, image):
    """DRY_RUN prints `srun`, then the container if there is one, then the command of launch/mmlu."""
    script = f"launch/slurm/{experiment}.sh"
    line = site.run(script, "--seed", "7", DRY_RUN="1", **IMAGES[image]).splitlines()[0]
    assert shlex.split(line)[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert ("apptainer exec" in line, "--container-image" in line) == (image == "apptainer", image == "pyxis")
    check_command(experiment, *words_after("atlas", line))


@pytest.mark.parametrize("start", [[], ["sbatch"]], ids=["by hand", "sbatch"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_slurm_script_must_be_submitted_from_the_repository(site, experiment, start):
    """From another folder: one line, exit status 2, and no command runs."""
    script = site.repository / f"launch/slurm/{experiment}.sh"
    job = site.start(*start, script, cwd=site.home, NODES="a b", NODE_LIST="a,b", ARRAY="0")
    line = f"{site.home}: no launch/slurm; submit from the repository's folder\n"
    assert (job.communicate(timeout=30)[0], job.returncode) == (line, 2)
    assert not site.calls()


@pytest.mark.parametrize(
    ("experiment", "image", "nodes"),
    [
        ("zeroshot", "", "node[1-4]-ib"),
        ("5-shot", "", "node[1-4]-ib"),
        ("5-shot", "apptainer", "rack1-[2,4-5]n[1-2]"),
        ("5-shot-multitask", "pyxis", "rack1-[2,4-5]n[1-2]"),
        ("full", "", "rack1-[2,4-5]n[1-2]"),
    ],
)
def test_slurm_starts_one_process_per_node(site, experiment, image, nodes):
    """Each process has its index and the coordinator; one, in the same container, prints the score table at the end."""
    names = NODES[nodes].split()
    environment = {"NODES": NODES[nodes], "NODE_LIST": nodes, "ARRAY": "1 0", "SAVE_DIR": str(site.home / "runs")}
    site.run("sbatch", f"launch/slurm/{experiment}.sh", "--seed", "7", **environment, **IMAGES[image])
    calls = site.calls()
    assert len(calls) == (4 if experiment == "5-shot" else 2)
    for call in calls:
        check_command(experiment, *call["arguments"])
        assert call["cluster"]["count"] == len(names)
        assert call["cluster"]["host_names"] == names
        assert call["location"] == IMAGES[image].get("IMAGE")
        mounts = f"{site.home}:{site.home},{site.repository}:{site.repository},{site.home}/runs:{site.home}/runs"
        assert call["mounts"] == (mounts if image else None)
    by_job = {(call["cluster"]["coordinator"], call["cluster"]["index"]) for call in calls}
    ports = (21234, 21235) if experiment == "5-shot" else (21234,)
    assert by_job == {(f"{names[0]}:{port}", index) for port in ports for index in (0, len(names) - 1)}
    if experiment == "5-shot":
        started = [call["arguments"][call["arguments"].index("--name") + 1] for call in calls]
        assert sorted(started) == ["anatomy", "anatomy", "virology", "virology"]
    (table,) = site.read_log("python")
    program = f"{site.repository}/eval/evaluate_mmlu_predictions.py"
    assert table.startswith(f"0 1 {IMAGES[image].get('IMAGE', '')} {program} ")


@pytest.mark.parametrize("image", IMAGES)
def test_sigusr1_saves_on_every_process_and_requeues_the_job_once(site, image):
    """SIGUSR1 reaches the processes of srun, each of which saves in its own time; no score table is printed."""
    nodes = {"NODES": "a b", "NODE_LIST": "a,b", "SAVE_SECONDS": "0.1 0.5"}
    job = site.start("sbatch", "launch/slurm/full.sh", **nodes, **IMAGES[image])
    site.wait_for_lines("calls", 2)
    for pid in site.read_log("pids")[0].split():
        os.kill(int(pid), signal.SIGUSR1)
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 138, output
    assert [call["saved"] for call in site.calls() if "saved" in call] == [0, 1]
    assert site.read_log("scontrol") == ["requeue 1234"]
    assert not site.read_log("python")


def test_kill_on_bad_exit_would_lose_a_checkpoint(site):
    """The counter-case of the test above: with --kill-on-bad-exit=1 the slower process does not save."""
    nodes = {"NODES": "a b", "NODE_LIST": "a,b", "SAVE_SECONDS": "0.1 0.8", "SLURM_JOB_ID": "1234"}
    (line,) = [line for line in site.run("launch/mmlu/full.sh", DRY_RUN="1").splitlines() if "atlas" in line][:1]
    job = site.start("srun", "--kill-on-bad-exit=1", *shlex.split(line), **nodes)
    site.wait_for_lines("calls", 2)
    for pid in site.read_log("pids")[0].split():
        os.kill(int(pid), signal.SIGUSR1)
    job.communicate(timeout=30)
    assert [call["saved"] for call in site.calls() if "saved" in call] == [0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_script_forwards_signals_to_atlas(site, signum):
    """In a container only the first process, the script, gets signals. Ctrl-C goes to all, and reaches `atlas` once."""
    script = site.start("launch/mmlu/full.sh", SAVE_SECONDS="0.3")
    site.wait_for_lines("calls", 1)
    (os.killpg if signum == signal.SIGINT else os.kill)(script.pid, signum)
    output = script.communicate(timeout=30)[0]
    assert script.returncode == 128 + signum, output
    assert {"saved": 0} in site.calls()
    assert not site.read_log("python")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_local_forwards_signals_to_all_processes(site, signum):
    """Each process has time to save; lines of output are numbered; the exit status is that of an interrupted run."""
    script = site.start("launch/mmlu/full.sh", ATLAS="launch/local.sh -n 2 -- atlas", SAVE_SECONDS="0.1 0.8", GRACE="0")
    site.wait_for_lines("calls", 2)
    (os.killpg if signum == signal.SIGINT else os.kill)(script.pid, signum)
    output = script.communicate(timeout=30)[0]
    assert script.returncode == 128 + signum, output
    calls = site.calls()
    assert sorted(call["saved"] for call in calls if "saved" in call) == [0, 1]
    assert [call["cluster"]["index"] for call in calls if "cluster" in call] == [0, 1]
    assert {"[0] saved", "[1] saved"} <= set(output.splitlines())


def test_local_prints_the_command_of_each_process(site):
    command = words_after("atlas", site.run("launch/mmlu/full.sh", "--seed", "7", DRY_RUN="1").splitlines()[0])
    lines = site.run("launch/local.sh", "-n", "2", "--", "atlas", *command, DRY_RUN="1").splitlines()
    configs = [check_command("full", *words_after("atlas", line)) for line in lines]
    assert [config.run.process_id for config in configs] == [0, 1]
    assert len({config.run.coordinator for config in configs}) == 1


@pytest.mark.parametrize(
    ("count", "environment", "shares"),
    [
        (2, {"GPUS": "8"}, ["0,1,2,3", "4,5,6,7"]),
        (2, {"GPUS": "8", "CUDA_VISIBLE_DEVICES": "2,5"}, ["2", "5"]),
        (2, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c,GPU-d"}, ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
        (1, {"GPUS": "3"}, ["0,1,2"]),
        (2, {}, ["unset", "unset"]),
        (2, {"GPUS": "8", "CUDA_VISIBLE_DEVICES": ""}, ["", ""]),
        (2, {"GPUS": "8", "CUDA_VISIBLE_DEVICES": "-1"}, ["-1", "-1"]),
        (2, {"GPUS": "1", "JAX_PLATFORMS": "cpu"}, ["unset", "unset"]),
    ],
)
def test_local_divides_the_gpus(site, count, environment, shares):
    """GPUs of CUDA_VISIBLE_DEVICES, else of the machine; without GPUs, or with JAX on the CPU, it sets nothing."""
    script = ["launch/local.sh", "-n", str(count), "--", "bash", "-c", 'echo "${CUDA_VISIBLE_DEVICES-unset}"']
    lines = site.run(*script, **environment).splitlines()
    assert sorted(lines) == [f"[{index}] {share}" for index, share in enumerate(shares)]
    printed = site.run(*script, **environment, DRY_RUN="1")
    assert site.run("bash", "-c", printed, **environment).splitlines() == shares


@pytest.mark.parametrize(("count", "gpus"), [(2, 3), (2, 1), (3, 8)])
def test_local_refuses_a_number_of_processes_that_does_not_divide_the_gpus(site, count, gpus):
    """One line with a remedy, exit status 2, and no process is started."""
    process = site.start("launch/local.sh", "-n", str(count), "--", "echo", GPUS=str(gpus))
    (line,) = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 2
    assert line.startswith(f"launch/local.sh -n {count}: does not divide the number of GPUs, {gpus}; ")


@pytest.mark.parametrize("failing", [0, 1])
def test_local_kills_all_processes_after_the_first_failure(site, failing):
    """The exit status is that of the process that failed."""
    command = ["bash", "-c", f'[ "${{!#}}" != {failing} ] || exit 4; exec sleep 60', "bash"]
    script = site.start("launch/local.sh", "-n", "2", "--", *command, GRACE="0")
    script.communicate(timeout=30)
    assert script.returncode == 4


def test_local_sees_the_failure_of_one_of_two_simultaneous_exits(site):
    """Process 0 succeeds and process 1 fails at the same moment: the exit status is that of process 1."""
    command = ["bash", "-c", 'while [ ! -e "$LOG/go" ]; do sleep 0.01; done; exit $((3 * ${!#}))', "bash"]
    script = site.start("launch/local.sh", "-n", "2", "--", *command)
    (site.home / "go").touch()
    script.communicate(timeout=30)
    assert script.returncode == 3


def load_jobset(name: str) -> tuple[dict, dict, dict, dict]:
    """The JobSet of a launch/gke file, its only replicated job, the job's pod and the pod's only container."""
    jobset = yaml.safe_load((REPOSITORY / f"launch/gke/{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated_job,) = jobset["spec"]["replicatedJobs"]
    job = replicated_job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert replicated_job["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    return jobset, replicated_job, pod, container


def test_gke_pods_with_gpus_find_the_coordinator(site):
    """Each of 8 pods with 8 GPUs finds process 0 by the host name that JobSet gives it; pod 0 prints the table."""
    jobset, replicated_job, pod, container = load_jobset("gpu")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "gke-accelerator" in str(pod["nodeSelector"])
    first = f"{jobset['metadata']['name']}-{replicated_job['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    settings = {variable["name"]: variable["value"] for variable in container["env"]}
    settings |= {"DATA_DIR": str(site.home), "SIZE": "base"}
    for index in range(replicated_job["template"]["spec"]["completions"]):
        command = [*container["command"], *container["args"], "--seed", "7"]
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in command]  # as Kubernetes does
        environment = settings | {"JOB_COMPLETION_INDEX": str(index)}
        (line,) = site.run(*words, DRY_RUN="1", **environment).splitlines()[:1]
        config = check_command("full", *words_after("atlas", line))
        spec = cluster.ClusterSpec(f"{first}:12345", 8, index, source="--coordinator")
        assert cluster.detect_cluster(config.run, environment) == spec
        if index < 2:
            site.run(*words, **environment)
            assert len(site.read_log("python")) == (index == 0)


def test_gke_pods_with_tpus_find_the_coordinator(site):
    """There are as many pods as the slice has hosts; each finds its index and the coordinator in GKE's environment."""
    jobset, replicated_job, pod, container = load_jobset("tpu")
    (chips,) = container["resources"]["limits"].values()
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    count = replicated_job["template"]["spec"]["completions"]
    assert math.prod(map(int, topology.split("x"))) == chips * count == 32
    names = [f"{jobset['metadata']['name']}-{replicated_job['name']}-0-{pod}.atlas" for pod in range(count)]
    environment = {"TPU_WORKER_HOSTNAMES": ",".join(names), "TPU_WORKER_ID": "3", "JOB_COMPLETION_INDEX": "3"}
    site.run(*container["command"], **environment)
    (call,) = site.calls()
    spec = call["cluster"]
    assert (spec["coordinator"], spec["count"], spec["index"]) == (f"{names[0]}:20000", 8, 3)
    assert not site.read_log("python")


@pytest.mark.parametrize("experiment", ["5-shot", "full"])
def test_all_tpu_workers_run_the_experiment(site, experiment):
    """Settings, also with spaces and quotes, are passed on; worker 0 prints the table; DRY_RUN prints the commands."""
    (site.home / "a copy").mkdir()
    (site.home / "a copy/launch").symlink_to(site.repository / "launch")
    script = ["launch/tpu/run.sh", experiment, "--seed", "7", "--mesh", "data=-1"]
    settings = {"TPU": "slice", "ZONE": "here", "REPOSITORY": "a copy", "READER": "it's a reader", "DRY_RUN": "1"}
    lines = site.run(*script, **settings).splitlines()
    (command,) = [word.removeprefix("--command=") for word in shlex.split(lines[0]) if word.startswith("--command=")]
    (printed, *_) = site.run("bash", "-c", command, cwd=site.home, DRY_RUN="1").splitlines()
    words = words_after("atlas", printed)
    assert words[words.index("--reader_model_type") + 1] == "it's a reader"
    del settings["READER"], settings["DRY_RUN"]
    site.run(*script, **settings)
    calls = site.calls()
    check_command(experiment, *calls[0]["arguments"])
    assert sorted(call["location"] for call in calls) == sorted(["0", "1"] * (2 if experiment == "5-shot" else 1))
    assert len(site.read_log("python")) == 1


def test_stop_sends_sigterm_to_all_tpu_workers(site):
    """SIGTERM is sent on each worker, to every process whose name is atlas."""
    (line,) = site.run("launch/tpu/run.sh", "stop", TPU="slice", ZONE="here", DRY_RUN="1").splitlines()
    assert "--worker=all" in line
    assert shlex.split(line)[-1] == "--command=pkill -TERM -x atlas"


def test_python_m_atlas_jax_is_atlas():
    """`python -m atlas_jax` has the exit status and the messages of `atlas`, which need not be on PATH."""
    process = subprocess.run(
        [sys.executable, "-m", "atlas_jax", "trian"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert "did you mean train?" in process.stderr
