"""The launch scripts: what they start where, and who gets which signal; `fakes/` stand in for what they call."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from atlas_jax.commands.flags import parse_args
from atlas_jax.config import Config
from atlas_jax.runtime import cluster

REPOSITORY = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = sorted(path for path in (REPOSITORY / "launch").rglob("*.sh") if path.name != "common.sh")
EXPERIMENTS = {"zeroshot": "evaluate", "5-shot": "train", "5-shot-multitask": "train", "full": "train"}
NODES = {
    "node[1-4]-ib": "node1-ib node2-ib node3-ib node4-ib",
    "rack1-[2,4-5]n[1-2]": "rack1-2n1 rack1-2n2 rack1-4n1 rack1-4n2 rack1-5n1 rack1-5n2",
}
IMAGES = {"": {}, "apptainer": {"IMAGE": "atlas.sif"}, "pyxis": {"IMAGE": "nvcr.io#atlas:1", "CONTAINER": "pyxis"}}


class Site:
    """A machine with `fakes/` and the published layout: two domains of a question each, nothing in the weights."""

    def __init__(self, home: Path):
        self.home = home
        inside = f"{FAKES / 'inside'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        ours = ("SLURM", "CUDA", "JAX_PLATFORMS")
        plain = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment = plain | {"LOG": str(home), "DATA_DIR": str(home), "SIZE": "base", "HOME": str(home)}
        self.environment |= {"INSIDE": inside, "PATH": f"{FAKES / 'outside'}:{inside}", "PYTHONPATH": str(REPOSITORY)}

    def start(self, *command: object, cwd: Path = REPOSITORY, **environment: str) -> subprocess.Popen:
        """In a session of its own, as behind a terminal."""
        everything = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, env=self.environment | environment, cwd=cwd, **everything)

    def run(self, *command: object, **environment: str) -> str:
        """What it prints; it must not fail."""
        process = self.start(*command, **environment)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        return output

    def log(self, name: str) -> list[str]:
        """What a fake has written down, which is then forgotten."""
        file = self.home / name
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def calls(self) -> list[dict]:
        """Those of `atlas`, by process."""
        rows = [json.loads(line) for line in self.log("calls")]
        return sorted(rows, key=lambda row: row["place"]["index"] if "place" in row else -1)

    def until(self, name: str, count: int) -> None:
        """Waits until a fake has written so many lines."""
        file, end = self.home / name, time.monotonic() + 30
        while not file.exists() or len(file.read_text().splitlines()) < count:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def site(tmp_path) -> Site:
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
    return Site(tmp_path)


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check(experiment: str, command: str, *flags: str) -> Config:
    """`atlas` knows every flag and finds every file."""
    assert command == EXPERIMENTS[experiment]
    config = parse_args(command, flags)
    assert config.run.seed == 7
    assert (config.retrieval.n_context, config.text.text_maxlength) == (30, 512)
    assert config.distill.train_retriever == (command == "train")
    return config


def after(word: str, line: str) -> list[str]:
    """The words of a printed command after this one."""
    words = shlex.split(line)
    return words[words.index(word) + 1 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_shellcheck_finds_nothing(script):
    """In it and in what it sources."""
    done = subprocess.run([SHELLCHECK, "-x", "-a", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_what_is_wrong():
    done = subprocess.run([SHELLCHECK, "-"], input="#!/bin/bash\nrm $1\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert "SC2086" in done.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_its_flags_are_ours(site, experiment):
    """Arguments of the script come last; DRY_RUN prints the same commands; the table is printed once, at the end."""
    script = f"launch/mmlu/{experiment}.sh"
    printed = site.run(script, "--seed", "7", DRY_RUN="1").splitlines()
    assert not site.calls()
    site.run(script, "--seed", "7")
    calls = [call["arguments"] for call in site.calls()]
    assert len(calls) == (2 if experiment == "5-shot" else 1)
    for line, call in zip(printed, calls, strict=False):
        assert after("atlas", line) == call
        check(experiment, *call)
    (table,) = site.log("python")
    assert "eval/evaluate_mmlu_predictions.py --predictions_path" in table


def test_5_shot_takes_one_domain(site):
    """By name, or by the index of a SLURM array task; all domains otherwise, in order; none twice."""

    def names(**environment: str) -> list[str]:
        site.run("launch/mmlu/5-shot.sh", **environment)
        return [call["arguments"][call["arguments"].index("--name") + 1] for call in site.calls()]

    assert names(DOMAIN="virology") == ["virology"]
    assert names(SLURM_ARRAY_TASK_ID="1") == []
    assert not site.log("python")  # anatomy is not there yet
    assert names() == ["anatomy"]
    assert site.log("python")


@pytest.mark.parametrize("script", ["mmlu", "slurm"])
@pytest.mark.parametrize("empty", [False, True])
def test_5_shot_names_what_makes_its_domains(site, script, empty):
    """Where their folder is not there or has none: in one line, and nothing runs."""
    folder = site.home / "data/mmlu_data/5-shot/individual_train"
    shutil.rmtree(folder)
    if empty:
        folder.mkdir()
    process = site.start(f"launch/{script}/5-shot.sh", DRY_RUN="1")
    remedy = f"python preprocessing/prepare_mmlu.py --output_directory {site.home} makes them"
    assert process.communicate(timeout=30)[0] == f"{folder}: no domains there; {remedy}\n"
    assert process.returncode == 2


@pytest.mark.parametrize("script", ["mmlu", "slurm"])
def test_5_shot_refuses_a_task_without_a_domain(site, script):
    """In one line with the array that fits; nothing runs."""
    folder = site.home / "data/mmlu_data/5-shot/individual_train"
    process = site.start(f"launch/{script}/5-shot.sh", DRY_RUN="1", SLURM_ARRAY_TASK_ID="2")
    line = f"SLURM_ARRAY_TASK_ID 2: {folder} has 2 domains; submit with --array=0-1\n"
    assert (process.communicate(timeout=30)[0], process.returncode) == (line, 2)


def test_a_missing_setting_is_named(site):
    """Without DATA_DIR nothing runs."""
    process = site.start("launch/mmlu/full.sh", DATA_DIR="")
    assert "set DATA_DIR" in process.communicate()[0]
    assert process.returncode
    assert not site.calls()


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_slurm_prints_its_command(site, experiment, image):
    """`srun`, and in a container that, before the command of launch/mmlu."""
    script = f"launch/slurm/{experiment}.sh"
    line = site.run(script, "--seed", "7", DRY_RUN="1", **IMAGES[image]).splitlines()[0]
    assert shlex.split(line)[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert ("apptainer exec" in line, "--container-image" in line) == (image == "apptainer", image == "pyxis")
    check(experiment, *after("atlas", line))


@pytest.mark.parametrize("start", [[], ["sbatch"]], ids=["by hand", "sbatch"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_slurm_is_submitted_from_the_repository(site, experiment, start):
    """From elsewhere one line says so, and nothing runs."""
    script = REPOSITORY / f"launch/slurm/{experiment}.sh"
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
def test_slurm_starts_a_process_a_node(site, experiment, image, nodes):
    """Each knows its place; the table is printed once, in the end, by one process, in the same container."""
    names = NODES[nodes].split()
    environment = {"NODES": NODES[nodes], "NODE_LIST": nodes, "ARRAY": "1 0", "SAVE_DIR": str(site.home / "runs")}
    site.run("sbatch", f"launch/slurm/{experiment}.sh", "--seed", "7", **environment, **IMAGES[image])
    calls = site.calls()
    assert len(calls) == (4 if experiment == "5-shot" else 2)
    for call in calls:
        check(experiment, *call["arguments"])
        assert call["place"]["count"] == len(names)
        assert call["place"]["names"] == names
        assert call["where"] == IMAGES[image].get("IMAGE")
        mounts = f"{site.home}:{site.home},{REPOSITORY}:{REPOSITORY},{site.home}/runs:{site.home}/runs"
        assert call["mounts"] == (mounts if image else None)
    by_job = {(call["place"]["coordinator"], call["place"]["index"]) for call in calls}
    ports = (21234, 21235) if experiment == "5-shot" else (21234,)
    assert by_job == {(f"{names[0]}:{port}", index) for port in ports for index in (0, len(names) - 1)}
    if experiment == "5-shot":
        started = [call["arguments"][call["arguments"].index("--name") + 1] for call in calls]
        assert sorted(started) == ["anatomy", "anatomy", "virology", "virology"]
    (table,) = site.log("python")
    assert table.startswith(f"0 1 {IMAGES[image].get('IMAGE', '')} {REPOSITORY}/eval/evaluate_mmlu_predictions.py ")


@pytest.mark.parametrize("image", IMAGES)
def test_slurm_warns_of_its_time_and_the_job_comes_back(site, image):
    """SIGUSR1 comes to what srun started; each saves in its time; the job is queued again, once; there is no table."""
    nodes = {"NODES": "a b", "NODE_LIST": "a,b", "SAVING": "0.1 0.5"}
    job = site.start("sbatch", "launch/slurm/full.sh", **nodes, **IMAGES[image])
    site.until("calls", 2)
    for pid in site.log("pids")[0].split():
        os.kill(int(pid), signal.SIGUSR1)
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 138, output
    assert [call["saved"] for call in site.calls() if "saved" in call] == [0, 1]
    assert site.log("scontrol") == ["requeue 1234"]
    assert not site.log("python")


def test_kill_on_bad_exit_would_lose_a_checkpoint(site):
    """Why the scripts do not have it: the counter-case of the test above."""
    nodes = {"NODES": "a b", "NODE_LIST": "a,b", "SAVING": "0.1 0.8", "SLURM_JOB_ID": "1234"}
    (line,) = [one for one in site.run("launch/mmlu/full.sh", DRY_RUN="1").splitlines() if "atlas" in one][:1]
    job = site.start("srun", "--kill-on-bad-exit=1", *shlex.split(line), **nodes)
    site.until("calls", 2)
    for pid in site.log("pids")[0].split():
        os.kill(int(pid), signal.SIGUSR1)
    job.communicate(timeout=30)
    assert [call["saved"] for call in site.calls() if "saved" in call] == [0]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_go_through_a_script(site, signum):
    """As a container's first process it is the only one that gets them. A Ctrl-C goes to all, and to `atlas` once."""
    script = site.start("launch/mmlu/full.sh", SAVING="0.3")
    site.until("calls", 1)
    (os.killpg if signum == signal.SIGINT else os.kill)(script.pid, signum)
    output = script.communicate(timeout=30)[0]
    assert script.returncode == 128 + signum, output
    assert {"saved": 0} in site.calls()
    assert not site.log("python")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_local_sends_signals_to_all(site, signum):
    """Each may take its time to save; lines are numbered; the status is that of an interrupted run."""
    script = site.start("launch/mmlu/full.sh", ATLAS="launch/local.sh -n 2 -- atlas", SAVING="0.1 0.8", GRACE="0")
    site.until("calls", 2)
    (os.killpg if signum == signal.SIGINT else os.kill)(script.pid, signum)
    output = script.communicate(timeout=30)[0]
    assert script.returncode == 128 + signum, output
    calls = site.calls()
    assert sorted(call["saved"] for call in calls if "saved" in call) == [0, 1]
    assert [call["place"]["index"] for call in calls if "place" in call] == [0, 1]
    assert {"[0] saved", "[1] saved"} <= set(output.splitlines())


def test_local_prints_its_commands(site):
    command = after("atlas", site.run("launch/mmlu/full.sh", "--seed", "7", DRY_RUN="1").splitlines()[0])
    lines = site.run("launch/local.sh", "-n", "2", "--", "atlas", *command, DRY_RUN="1").splitlines()
    configs = [check("full", *after("atlas", line)) for line in lines]
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
    """Those of CUDA_VISIBLE_DEVICES, else of the machine; where there are none or JAX takes none, nothing changes."""
    script = ["launch/local.sh", "-n", str(count), "--", "bash", "-c", 'echo "${CUDA_VISIBLE_DEVICES-unset}"']
    lines = site.run(*script, **environment).splitlines()
    assert sorted(lines) == [f"[{index}] {share}" for index, share in enumerate(shares)]
    printed = site.run(*script, **environment, DRY_RUN="1")
    assert site.run("bash", "-c", printed, **environment).splitlines() == shares


@pytest.mark.parametrize(("count", "gpus"), [(2, 3), (2, 1), (3, 8)])
def test_local_refuses_what_does_not_divide(site, count, gpus):
    """In one line that says what would; nothing is started."""
    process = site.start("launch/local.sh", "-n", str(count), "--", "echo", GPUS=str(gpus))
    (line,) = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 2
    assert line.startswith(f"launch/local.sh -n {count}: does not divide the number of GPUs, {gpus}; ")


@pytest.mark.parametrize("who", [0, 1])
def test_local_ends_all_with_the_first_failure(site, who):
    """The others are killed, and the status is that of the one that failed."""
    command = ["bash", "-c", f'[ "${{!#}}" != {who} ] || exit 4; exec sleep 60', "bash"]
    script = site.start("launch/local.sh", "-n", "2", "--", *command, GRACE="0")
    script.communicate(timeout=30)
    assert script.returncode == 4


def test_local_sees_the_failure_of_one_that_ends_with_another(site):
    """At the same moment."""
    command = ["bash", "-c", 'while [ ! -e "$LOG/go" ]; do sleep 0.01; done; exit $((3 * ${!#}))', "bash"]
    script = site.start("launch/local.sh", "-n", "2", "--", *command)
    (site.home / "go").touch()
    script.communicate(timeout=30)
    assert script.returncode == 3


def pods(name: str) -> tuple[dict, dict, dict, dict]:
    """The JobSet of a file, its only kind of job, and of its pods what they are and what runs in them."""
    jobset = yaml.safe_load((REPOSITORY / f"launch/gke/{name}.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (kind,) = jobset["spec"]["replicatedJobs"]
    job = kind["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert kind["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    return jobset, kind, pod, container


def test_gke_gpus(site):
    """Each of 8 pods with 8 GPUs finds process 0 by the name that JobSet gives it; the first one prints the table."""
    jobset, kind, pod, container = pods("gpu")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert "gke-accelerator" in str(pod["nodeSelector"])
    first = f"{jobset['metadata']['name']}-{kind['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    settings = {one["name"]: one["value"] for one in container["env"]} | {"DATA_DIR": str(site.home), "SIZE": "base"}
    for index in range(kind["template"]["spec"]["completions"]):
        command = [*container["command"], *container["args"], "--seed", "7"]
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in command]  # as Kubernetes does
        own = settings | {"JOB_COMPLETION_INDEX": str(index)}
        (line,) = site.run(*words, DRY_RUN="1", **own).splitlines()[:1]
        assert cluster.detect_cluster(check("full", *after("atlas", line)).run, own) == cluster.ClusterSpec(
            f"{first}:12345", 8, index, found="--coordinator"
        )
        if index < 2:
            site.run(*words, **own)
            assert len(site.log("python")) == (index == 0)


def test_gke_tpus(site):
    """As many pods as the slice has hosts, and GKE's environment says which is which."""
    jobset, kind, pod, container = pods("tpu")
    (chips,) = container["resources"]["limits"].values()
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    count = kind["template"]["spec"]["completions"]
    assert math.prod(map(int, topology.split("x"))) == chips * count == 32
    names = [f"{jobset['metadata']['name']}-{kind['name']}-0-{pod}.atlas" for pod in range(count)]
    own = {"TPU_WORKER_HOSTNAMES": ",".join(names), "TPU_WORKER_ID": "3", "JOB_COMPLETION_INDEX": "3"}
    site.run(*container["command"], **own)
    (call,) = site.calls()
    assert (call["place"]["coordinator"], call["place"]["count"], call["place"]["index"]) == (f"{names[0]}:20000", 8, 3)
    assert not site.log("python")


@pytest.mark.parametrize("experiment", ["5-shot", "full"])
def test_tpu_workers_all_run_it(site, experiment):
    """With the settings of here, awkward ones too; the first prints the table; DRY_RUN prints what is sent."""
    (site.home / "a copy").mkdir()
    (site.home / "a copy/launch").symlink_to(REPOSITORY / "launch")
    script = ["launch/tpu/run.sh", experiment, "--seed", "7", "--mesh", "data=-1"]
    settings = {"TPU": "slice", "ZONE": "here", "REPOSITORY": "a copy", "READER": "it's a reader", "DRY_RUN": "1"}
    lines = site.run(*script, **settings).splitlines()
    (command,) = [word.removeprefix("--command=") for word in shlex.split(lines[0]) if word.startswith("--command=")]
    (printed, *_) = site.run("bash", "-c", command, cwd=site.home, DRY_RUN="1").splitlines()
    words = after("atlas", printed)
    assert words[words.index("--reader_model_type") + 1] == "it's a reader"
    del settings["READER"], settings["DRY_RUN"]
    site.run(*script, **settings)
    calls = site.calls()
    check(experiment, *calls[0]["arguments"])
    assert sorted(call["where"] for call in calls) == sorted(["0", "1"] * (2 if experiment == "5-shot" else 1))
    assert len(site.log("python")) == 1


def test_tpu_workers_stop(site):
    """The saving is asked of each process that is called atlas."""
    (line,) = site.run("launch/tpu/run.sh", "stop", TPU="slice", ZONE="here", DRY_RUN="1").splitlines()
    assert "--worker=all" in line
    assert shlex.split(line)[-1] == "--command=pkill -TERM -x atlas"


def test_as_a_module():
    """Where `atlas` is not on PATH; its status is kept."""
    done = subprocess.run([sys.executable, "-m", "atlas_jax", "trian"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr
