"""`atlas plan` on CPU devices: memory, FLOPs and advice of its plans, and the topologies that it refuses."""

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import venv

import jax
import numpy as np
import pytest

from atlas_jax.commands import plan as plan_command
from atlas_jax.commands.flags import parse_plan
from atlas_jax.commands.main import main
from atlas_jax.commands.plan import memory_saving_configs, resident_advice
from atlas_jax.mesh import make_mesh
from atlas_jax.plan import hlo, topology
from atlas_jax.plan.hlo import Collective, Counts, HloShape
from atlas_jax.plan.programs import make_plan
from atlas_jax.plan.report import compile_and_report, roofline
from benchmarks import plan_table

FLAGS = ["--text_maxlength", "32", "--target_maxlength", "8", "--generation_max_length", "4", "--dropout", "0"]


@pytest.fixture(scope="session")
def flags(golden):
    """Flags of the golden reader, with passages of 32 tokens and answers of at most 4."""
    return ["--reader_model_type", str(golden / "assets" / "reader"), *FLAGS]


@pytest.fixture(scope="session")
def search_flags(flags, golden):
    """`flags` on eight devices, with the golden retriever and an index of 8 x 4096 passages."""
    retriever = str(golden / "assets" / "retriever")
    return [*flags, "--topology", "cpu:8", "--retriever_model_path", retriever, "--passages_count", "32768"]


@pytest.fixture(scope="module")
def planned(flags, quick_compiler):
    """The `steps` of `atlas plan --json` for a closed-book run on two devices, and the exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        status = main(["plan", "--topology", "cpu:2", *flags, "--closed_book", "--json"])
    return json.loads(stdout.getvalue())["steps"], status


def test_the_memory_of_resident_arrays_is_that_of_the_compiled_arguments(planned, tiny_weights):
    """Parameters and AdamW's two moments, sharded over two devices or replicated, have the bytes computed by hand."""
    (train, reader), status = planned
    assert (status, train["name"], reader["name"]) == (0, "train step", "reader")
    mesh = make_mesh("fsdp=2")
    expected = 0
    for path, array in tiny_weights.params.items():
        if path.startswith("reader/"):
            replicated = not path.endswith(("kernel", "reader/embed/embedding"))
            expected += array.nbytes if replicated else array.nbytes // mesh.size
    assert train["memory"]["parameters"] == expected
    assert train["memory"]["optimizer"] == 2 * expected + 2 * 4  # and two counts of updates
    key = 2 * 4 + 4  # a random key and the number of the step
    ids, masks, lengths = 4 * (32 + 8), 32 + 8, 4  # of the one question on a device
    assert train["memory"]["batch"] == ids + masks + lengths + key
    arguments = train["memory"]["parameters"] + train["memory"]["optimizer"] + train["memory"]["batch"]
    assert train["arguments"] == pytest.approx(arguments, abs=64)
    assert reader["memory"]["activations and temporaries"] > 0
    assert train["total"] == sum(train["memory"].values())


def test_train_flops_are_six_per_parameter_and_token(planned, tiny_weights):
    """Per device: 6 N T for the matrices of encoder and decoder (N parameters, T tokens), plus attention's products."""
    train = planned[0][0]
    sizes = {path: array.size for path, array in tiny_weights.params.items() if path.endswith("kernel")}
    encoder = sum(size for path, size in sizes.items() if path.startswith("reader/encoder"))
    cross_attention = sum(size for path, size in sizes.items() if "/cross_attn/k" in path or "/cross_attn/v" in path)
    decoder = sum(size for path, size in sizes.items() if path.startswith(("reader/decoder", "reader/lm_head")))
    source, target = 32, 8
    matrices = 6 * (source * (encoder + cross_attention) + target * (decoder - cross_attention))
    layers, width = 3, 4 * 16
    attention = 3 * 2 * 2 * layers * width * (source * source + target * target + target * source)
    flops = sum(train["flops"].values())
    assert 0.95 * (matrices + attention) <= flops <= 1.25 * (matrices + attention)


def test_a_program_that_does_not_fit_has_exit_status_1_and_attempts(search_flags, monkeypatch, capsys):
    """The memory suffices for the resident arrays, not for the search; counter-case: enough: status 0 and no attempt.

    That the mesh does not divide the passages is warned of once.
    """
    resident_bytes = []

    def make_plan_of_search(*args):
        plan = make_plan(*args)
        resident_bytes.append(plan.resident_bytes)
        return plan._replace(programs=plan.programs[-1:])

    monkeypatch.setattr("atlas_jax.plan.programs.make_plan", make_plan_of_search)
    first = "--use_gradient_checkpoint_reader"
    monkeypatch.setattr(plan_command, "memory_saving_configs", lambda config, count: [(first, config)])
    assert main(["plan", *search_flags]) == 0
    out, err = capsys.readouterr()
    assert "search: fits" in out
    assert "tried" not in out
    assert "does not divide" not in err
    monkeypatch.setitem(topology.DEVICES, "cpu", topology.DEVICES["cpu"]._replace(memory=resident_bytes[0]))
    assert main(["plan", *search_flags, "--mesh", "passages=8"]) == 1
    out, err = capsys.readouterr()
    assert err.count("passages=8 does not divide 1 (passages a query)") == 1
    assert "search: DOES NOT FIT" in out
    assert f"tried {first}: does not fit (search 0." in out
    assert "nothing that was tried fits: take more devices, --index_mode faiss, or" in out


def test_a_compiler_failure_is_reported(search_flags, monkeypatch, capsys):
    """The compiler's message, after the programs that compile, and exit status 1; no memory-saving flags are tried."""

    def make_broken_plan(*args):
        plan = make_plan(*args)
        unknown_call = jax.jit(jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct((), np.float32)))
        broken = plan.programs[0]._replace(compile=lambda: unknown_call.lower().compile())
        return plan._replace(programs=(plan.programs[-1], broken))

    monkeypatch.setattr("atlas_jax.plan.programs.make_plan", make_broken_plan)
    assert main(["plan", *search_flags]) == 1
    out = capsys.readouterr().out
    assert "search: fits" in out
    assert re.search(r"\ntrain step: DOES NOT COMPILE: the compiler says .*no_such_kernel.*\n\n.*please report", out)
    assert "tried" not in out


@pytest.fixture
def no_compilation(monkeypatch):
    """Makes compiling a program fail the test."""

    def compile_for(self, *_):
        raise AssertionError(f"{self.name} was compiled")

    monkeypatch.setattr("atlas_jax.runtime.compiled.CompiledFunction.compile_for", compile_for)


def test_an_index_too_large_is_reported_without_compiling(search_flags, no_compilation, capsys):
    """Text has figures and remedy, JSON the reason for each program. Counter-case: --index_mode faiss does compile."""
    large = [*search_flags, "--passages_count", "400000000", "--n_context", "8", "--retriever_n_context", "8"]
    remedy = "take --index_mode faiss, which keeps the index on the hosts, or 9 devices to hold it"
    assert main(["plan", *large]) == 1
    out = capsys.readouterr().out
    assert "what stays on the device: DOES NOT FIT, 4.80 of 4.3 GB (112%)" in out
    assert "index                             4.800 GB" in out
    assert out.endswith(f"\n\n{remedy}\n")
    assert "tried" not in out
    assert main(["plan", *large, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["tried"], result["advice"]) == ([], remedy)
    assert [step["name"] for step in result["steps"]] == [
        *("train step", "reader", "query encoder", "passage encoder", "search"),
    ]
    for step in result["steps"]:
        assert (step["fits"], step["refused"]) == (False, "what stays on the device takes 4.80 of 4.3 GB")
        assert step["memory"]["index"] == 400_000_000 * 48 * 2 / 8
    assert "| what stays on the device takes 4.80 of 4.3 GB |" in plan_table.markdown_table(
        [result | {"size": "golden", "machine": "cpu:8", "passages": 400_000_000}]
    )
    with pytest.raises(AssertionError, match="train step was compiled"):
        main(["plan", *large, "--index_mode", "faiss"])


@pytest.mark.parametrize(
    ("models", "sharded_models", "index", "advice"),
    [
        (9, None, 50, "take --index_mode faiss, which keeps the index on the hosts, or 100 devices to hold it"),
        (9, 1, 50, "take --index_mode faiss, which keeps the index on the hosts, or 100 devices to hold it"),
        (11, 1, 2, "take --mesh auto"),
        (
            *(11, 1, 50),
            "take --mesh auto and --index_mode faiss, which keeps the index on the hosts, or 12 devices to hold it",
        ),
        (11, None, 0, "take more devices, or a smaller --reader_model_type"),
        (20, 11, 50, "take more devices, or a smaller --reader_model_type"),
    ],
)
def test_advice_for_resident_arrays_that_do_not_fit(models, sharded_models, index, advice):
    """Two devices of ten bytes; bytes of the models on this mesh and on that of `auto`, and bytes of an index."""
    model_bytes = {"": models} | ({"--mesh auto": sharded_models} if sharded_models else {})
    resident = {flags: {"parameters": n} | ({"index": index} if index else {}) for flags, n in model_bytes.items()}
    assert resident_advice(resident, 2, 10.0) == advice


def test_replicated_parameters_that_do_not_fit_are_advised_to_be_sharded(
    search_flags, no_compilation, monkeypatch, capsys
):
    """--mesh data=8 replicates them, `auto` would shard them. Counter-case: with `auto` the programs are compiled."""
    config, plan_config = parse_plan(search_flags)
    sharded = make_plan(config, make_mesh("fsdp=8"), plan_config.passages_count).resident_bytes
    monkeypatch.setitem(topology.DEVICES, "cpu", topology.DEVICES["cpu"]._replace(memory=sharded))
    assert main(["plan", *search_flags, "--mesh", "data=8"]) == 1
    assert capsys.readouterr().out.endswith("\n\ntake --mesh auto\n")
    with pytest.raises(AssertionError, match="train step was compiled"):
        main(["plan", *search_flags])


def test_memory_saving_flags_are_added_in_order(flags):
    """Each flag is added to those before it; flags that the run has already are left out."""
    argv = [*flags, "--topology", "cpu:8", "--train_retriever", "--n_context", "6", "--per_gpu_batch_size", "2"]
    config, _ = parse_plan([*argv, "--retriever_n_context", "6", "--precision", "bf16"])
    configs = list(memory_saving_configs(config, 8))
    both = "--use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever"
    assert [flags for flags, _ in configs] == [
        both,
        f"{both} --per_gpu_batch_size 1",
        f"{both} --per_gpu_batch_size 1 --mesh fsdp=4,passages=2",  # auto is fsdp=8
        f"{both} --per_gpu_batch_size 1 --mesh fsdp=2,model=4",
    ]
    last = configs[-1][1]
    assert last.run.mesh == "fsdp=2,model=4"
    assert last.model.use_gradient_checkpoint_retriever
    config, _ = parse_plan([*argv, "--mesh", "data=8"])
    assert any(flags.endswith("--mesh auto") for flags, _ in memory_saving_configs(config, 8))


@pytest.mark.parametrize(
    ("n_context", "retriever_n_context", "train", "passages"),
    [
        (8, 8, True, 8),
        (8, 12, True, 4),  # training retrieves twelve
        (4, 16, True, 4),  # the reader is trained on four of them
        (8, 5, True, 1),
        (8, 12, False, 8),  # no model is trained on the other four
    ],
)
def test_the_passages_axis_divides_every_number_of_passages(flags, n_context, retriever_n_context, train, passages):
    """The numbers that the retriever is trained on, that the reader is trained on, and that evaluation uses."""
    n_flags = ["--n_context", str(n_context), "--retriever_n_context", str(retriever_n_context)]
    config, _ = parse_plan([*flags, "--topology", "cpu:8", *n_flags, *["--train_retriever"] * train])
    meshes = {changed.run.mesh for _, changed in memory_saving_configs(config, 8)} - {"fsdp=2,model=4"}
    assert meshes == ({"auto", f"fsdp={8 // passages},passages={passages}"} if passages > 1 else {"auto"})


@pytest.mark.parametrize(
    ("num_devices", "mesh"), [(16, "fsdp=4,model=4"), (6, "fsdp=3,model=2"), (9, "fsdp=3,passages=3")]
)
def test_the_model_axis_divides_heads_and_devices(flags, num_devices, mesh):
    """A `model` axis is tried last, of size 4 at most; none if 4, 12 heads and the devices have no common divisor."""
    reader_flags = ["--reader_model_type", "t5-base", "--n_context", "3", "--retriever_n_context", "3"]
    config, _ = parse_plan([*flags, "--topology", "cpu:8", *reader_flags])
    assert [changed.run.mesh for _, changed in memory_saving_configs(config, num_devices)][-1] == mesh


def test_the_search_reads_its_shard_of_the_index_once(search_flags):
    """4096 x 8 rows of 48 float16 on eight devices; the FLOPs are 2 x queries x rows x width on each."""
    config, plan_config = parse_plan(search_flags)
    plan = make_plan(config, make_mesh("fsdp=8"), plan_config.passages_count)
    rows, width, queries = 4096, 48, 8
    assert plan.resident["index"] == rows * width * 2
    search = plan.programs[-1]
    report = compile_and_report(search, plan, topology.parse_topology("cpu:8"), assumed_trip_count=1)
    assert report.flops == {"f32": 2 * queries * rows * width}
    assert report.traffic >= rows * width * 2
    assert report.collectives.keys() == {"all-gather"}
    assert report.collectives["all-gather"]["bytes"] == 8 * queries * config.retrieval.n_context * (4 + 4)


def test_a_faiss_index_is_not_on_the_devices(search_flags):
    """A faiss index is no resident array and has no search program; a flat index has both."""
    for mode, on_devices in (("flat", True), ("faiss", False)):
        config, plan_config = parse_plan([*search_flags, "--index_mode", mode])
        plan = make_plan(config, make_mesh("fsdp=8"), plan_config.passages_count)
        assert ("index" in plan.resident, "search" in {program.name for program in plan.programs}) == (
            on_devices,
            on_devices,
        )


def test_interconnect_time_between_and_within_nodes():
    """64 GPUs of 8 nodes gather 64 MB: 7/8 of it enter each node through its 8 ports; within a node NVLink has it."""
    machine = topology.parse_topology("a100-80gb:8x8")
    nbytes = 64_000_000
    shapes = (HloShape("s8", (nbytes,)),)

    def seconds(group):
        counts = Counts({"bf16": 312e12, "f32": 156e12}, 2039e9, [Collective("all-gather", shapes, group, 3, "")], 0)
        return roofline(counts, machine)

    all_nodes, one_node = seconds(tuple(range(64))), seconds(tuple(range(8)))
    assert all_nodes["interconnect"] == pytest.approx(3 * nbytes * 7 / 8 / 8 / 25e9)
    assert one_node["interconnect"] == pytest.approx(3 * nbytes * 7 / 8 / 300e9)
    assert (all_nodes["compute"], all_nodes["memory"]) == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--topology"),
        (["--topology", "a100:8x8"], "--topology a100:8x8: no such device; choose from a100-40gb, a100-80gb"),
        (["--topology", "a100-80gb:64"], "expected its shape as in a100-80gb:8x8"),
        (["--topology", "v5e:8"], "expected its shape as in v5e:8x8"),
        (["--topology", "cpu:0"], "expected its shape as in cpu:8"),
        (["--topology", "cpu:9"], "JAX has 8 CPU devices here"),
        (["--topology", "cpu:8", "--mesh", "fsdp=3"], "--mesh fsdp=3: 3 devices, but there are 8"),
        (["--topology", "cpu:8", "--passages_count", "-1"], "--passages_count -1: must be at least 0"),
        (["--topology", "cpu:8", "--reader_model_type", "t5-bse"], "did you mean t5-base?"),
        (["--topology", "cpu:8", "--retrieve_only"], "--retrieve_only: is for atlas evaluate"),
    ],
)
def test_bad_flags_are_refused(flags, capsys, argv, message):
    """Exit status 2, with the message on stderr and nothing on stdout."""
    assert main(["plan", *flags, *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_missing_compiler_runs_the_command_in_the_plan_environment(flags, capsys, monkeypatch, tmp_path):
    """Without `make plan-env` the message names it; with it, its Python executes the same command."""
    monkeypatch.setattr(topology, "COMPILER_MODULES", {"cuda": "no_such_module", "tpu": "no_such_module"})
    monkeypatch.setattr(plan_command, "PLAN_PYTHON", tmp_path / "python")
    argv = ["plan", "--topology", "a100-80gb:8x8", *flags]
    assert main(argv) == 2
    assert "run `make plan-env`" in capsys.readouterr().err
    (tmp_path / "python").touch()
    executed = []
    monkeypatch.setattr("os.execve", lambda *args: executed.append(args) or (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("atlas_jax.commands.main.exit_while_compiling", lambda status: status)
    main(argv)
    ((python, arguments, _),) = executed
    assert python == tmp_path / "python"
    assert arguments[1:] == ["-m", "atlas_jax", *argv]


def test_the_figures_of_every_gpu_are_those_of_its_xla_description():
    """Memory and bandwidth in DEVICES are those of the GpuTargetConfigProto that XLA reads."""
    for name, device in topology.DEVICES.items():
        if device.platform == "cuda":
            text = topology.parse_topology(f"{name}:1x8").target_config
            assert f"device_memory_size: {device.memory}\n" in text
            bandwidth = float(text.split("memory_bandwidth: ")[1].split()[0])
            assert math.isclose(bandwidth, device.memory_bandwidth, rel_tol=1e-3)


def test_materialized_arrays_include_a_gathered_parameter():
    """An array as large as a stacked parameter, which an all-gather writes, is among `materialized_arrays`."""
    text = (
        "HloModule m\n\nENTRY %main (p: f32[3,8,4]) -> f32[3,64,4] {\n  %p = f32[3,8,4]{2,1,0} parameter(0)\n"
        "  ROOT %g = f32[3,64,4]{2,1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={1}\n}\n"
    )
    assert [shape.sizes for shape, _ in hlo.materialized_arrays(hlo.parse(text))] == [(3, 64, 4)]


@pytest.mark.parametrize("packages", [(), ("jax_cuda12_plugin",), ("jax", "jaxlib", "jax_cuda12_plugin")])
def test_a_half_made_plan_environment_is_named(monkeypatch, tmp_path, packages):
    """As an interrupted `make plan-env` leaves it: without packages, or with folders of them that hold no module."""
    venv.create(tmp_path / ".venv-plan", symlinks=True)
    (site_packages,) = (tmp_path / ".venv-plan").glob("lib/python*/site-packages")
    for package in packages:
        (site_packages / package).mkdir()
    (tmp_path / "atlas_jax").symlink_to(plan_command.ROOT / "atlas_jax")
    program = (
        "import sys; from pathlib import Path; from atlas_jax.commands import main, plan; "
        f"plan.PLAN_PYTHON = Path({str(tmp_path / '.venv-plan/bin/python')!r}); "
        "plan.has_compiler = lambda platform: False; sys.exit(main.main(sys.argv[1:]))"
    )
    argv = ["plan", "--topology", "a100-80gb:1x8", "--reader_model_type", "t5-small"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=plan_command.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("atlas: ")
    assert "run `make plan-env`" in line


def test_a_plan_environment_that_does_not_start_is_named(flags, capsys, monkeypatch, tmp_path):
    """Its Python is a file that is no program."""
    monkeypatch.setattr(topology, "COMPILER_MODULES", {"cuda": "no_such_module", "tpu": "no_such_module"})
    monkeypatch.setattr(plan_command, "PLAN_PYTHON", tmp_path / "python")
    (tmp_path / "python").touch()
    assert main(["plan", "--topology", "a100-80gb:8x8", *flags]) == 2
    assert "python: does not start (Permission denied); run `make plan-env` to its end" in capsys.readouterr().err
