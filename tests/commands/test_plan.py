"""`atlas plan` on host devices: the whole command, and what it refuses."""

import contextlib
import io
import json
import math
import re

import jax
import numpy as np
import pytest

from atlas_jax.commands import plan as command
from atlas_jax.commands.flags import parse_plan
from atlas_jax.commands.main import main
from atlas_jax.commands.plan import alternatives, more_room
from atlas_jax.mesh import make_mesh
from atlas_jax.plan import hlo, topology
from atlas_jax.plan.hlo import Collective, Counts, Shape
from atlas_jax.plan.programs import make_plan
from atlas_jax.plan.report import examine, roofline
from benchmarks import plan_table

FLAGS = ["--text_maxlength", "32", "--target_maxlength", "8", "--generation_max_length", "4", "--dropout", "0"]


@pytest.fixture(scope="session")
def flags(golden):
    """The golden reader, which reads 32 tokens and writes 4."""
    return ["--reader_model_type", str(golden / "assets" / "reader"), *FLAGS]


@pytest.fixture(scope="session")
def searching(flags, golden):
    """The same on eight devices, with the golden retriever and an index of 8 x 4096 passages."""
    retriever = str(golden / "assets" / "retriever")
    return [*flags, "--topology", "cpu:8", "--retriever_model_path", retriever, "--passages_count", "32768"]


@pytest.fixture(scope="module")
def planned(flags, quick_compiler):
    """The steps that the command prints of a closed-book run on two devices, as JSON, and its exit status."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["plan", "--topology", "cpu:2", *flags, "--closed_book", "--json"])
    return json.loads(printed.getvalue())["steps"], status


def test_memory_adds_up(planned, tiny_weights):
    """Parameters and AdamW's two moments, split by two or whole as the table says, are what the compiler was given."""
    (train, reader), status = planned
    assert (status, train["name"], reader["name"]) == (0, "train step", "reader")
    mesh = make_mesh("fsdp=2")
    by_hand = 0
    for path, array in tiny_weights.params.items():
        if path.startswith("reader/"):
            whole = not path.endswith(("kernel", "reader/embed/embedding"))
            by_hand += array.nbytes if whole else array.nbytes // mesh.size
    assert train["memory"]["parameters"] == by_hand
    assert train["memory"]["optimizer"] == 2 * by_hand + 2 * 4  # and two counts of updates
    key = 2 * 4 + 4  # and the number of the step
    ids, masks, lengths = 4 * (32 + 8), 32 + 8, 4  # of the one question of a device
    assert train["memory"]["batch"] == ids + masks + lengths + key
    given = train["memory"]["parameters"] + train["memory"]["optimizer"] + train["memory"]["batch"]
    assert train["arguments"] == pytest.approx(given, abs=64)
    assert reader["memory"]["activations and temporaries"] > 0
    assert train["total"] == sum(train["memory"].values())


def test_arithmetic_is_six_for_each_parameter_and_token(planned, tiny_weights):
    """Per device: 6 N T for the matrices of the encoder and for those of the decoder, plus attention's products."""
    train = planned[0][0]
    sizes = {path: array.size for path, array in tiny_weights.params.items() if path.endswith("kernel")}
    encoder = sum(size for path, size in sizes.items() if path.startswith("reader/encoder"))
    crossing = sum(size for path, size in sizes.items() if "/cross_attn/k" in path or "/cross_attn/v" in path)
    decoder = sum(size for path, size in sizes.items() if path.startswith(("reader/decoder", "reader/lm_head")))
    source, target = 32, 8
    matrices = 6 * (source * (encoder + crossing) + target * (decoder - crossing))
    layers, width = 3, 4 * 16
    attention = 3 * 2 * 2 * layers * width * (source * source + target * target + target * source)
    found = sum(train["flops"].values())
    assert 0.95 * (matrices + attention) <= found <= 1.25 * (matrices + attention)


def test_it_does_not_fit(searching, monkeypatch, capsys):
    """With room for what stays but not for the search: exit status 1, and what was tried; else 0, and nothing was.

    The mesh, which divides no number of passages, is told so once.
    """
    room = []

    def search_alone(*args):
        plan = make_plan(*args)
        room.append(plan.held)
        return plan._replace(steps=plan.steps[-1:])

    monkeypatch.setattr("atlas_jax.plan.programs.make_plan", search_alone)
    first = "--use_gradient_checkpoint_reader"
    monkeypatch.setattr(command, "alternatives", lambda config, count: [(first, config)])
    assert main(["plan", *searching]) == 0
    out, err = capsys.readouterr()
    assert "search: fits" in out
    assert "tried" not in out
    assert "does not divide" not in err
    monkeypatch.setitem(topology.DEVICES, "cpu", topology.DEVICES["cpu"]._replace(memory=room[0]))
    assert main(["plan", *searching, "--mesh", "passages=8"]) == 1
    out, err = capsys.readouterr()
    assert err.count("passages=8 does not divide 1 (passages a query)") == 1
    assert "search: DOES NOT FIT" in out
    assert f"tried {first}: does not fit (search 0." in out
    assert "nothing that was tried fits: take more devices, --index_mode faiss, or" in out


def test_where_the_compiler_fails(searching, monkeypatch, capsys):
    """Its words and status 1, after what does compile; for want of memory nothing is tried."""

    def with_a_call_of_nothing(*args):
        plan = make_plan(*args)
        nothing = jax.jit(jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct((), np.float32)))
        broken = plan.steps[0]._replace(compile=lambda: nothing.lower().compile())
        return plan._replace(steps=(plan.steps[-1], broken))

    monkeypatch.setattr("atlas_jax.plan.programs.make_plan", with_a_call_of_nothing)
    assert main(["plan", *searching]) == 1
    out = capsys.readouterr().out
    assert "search: fits" in out
    assert re.search(r"\ntrain step: DOES NOT COMPILE: the compiler says .*no_such_kernel.*\n\n.*please report", out)
    assert "tried" not in out


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(self, *_):
        raise AssertionError(f"{self.name} was compiled")

    monkeypatch.setattr("atlas_jax.runtime.compiled.CompiledFunction.compile_for", refuse)


def test_an_index_too_large_is_told_before_anything_is_compiled(searching, nothing_compiles, capsys):
    """Figures and remedy; as JSON, each program with the reason and nothing tried. Without the index it is compiled."""
    large = [*searching, "--passages_count", "400000000", "--n_context", "8", "--retriever_n_context", "8"]
    remedy = "take --index_mode faiss, which keeps the index on the hosts, or 9 devices to hold it"
    assert main(["plan", *large]) == 1
    out = capsys.readouterr().out
    assert "what stays on the device: DOES NOT FIT, 4.80 of 4.3 GB (112%)" in out
    assert "index                             4.800 GB" in out
    assert out.endswith(f"\n\n{remedy}\n")
    assert "tried" not in out
    assert main(["plan", *large, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["tried"], found["advice"]) == ([], remedy)
    assert [step["name"] for step in found["steps"]] == [
        *("train step", "reader", "query encoder", "passage encoder", "search"),
    ]
    for step in found["steps"]:
        assert (step["fits"], step["refused"]) == (False, "what stays on the device takes 4.80 of 4.3 GB")
        assert step["memory"]["index"] == 400_000_000 * 48 * 2 / 8
    assert "| what stays on the device takes 4.80 of 4.3 GB |" in plan_table.table(
        [found | {"size": "golden", "machine": "cpu:8", "passages": 400_000_000}]
    )
    with pytest.raises(AssertionError, match="train step was compiled"):
        main(["plan", *large, "--index_mode", "faiss"])


@pytest.mark.parametrize(
    ("whole", "split", "index", "said"),
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
def test_room_for_what_stays(whole, split, index, said):
    """Two devices of ten bytes, models of so many on this mesh and on the one of `auto`, and an index."""
    models = {"": whole} | ({"--mesh auto": split} if split else {})
    stays = {flags: {"parameters": n} | ({"index": index} if index else {}) for flags, n in models.items()}
    assert more_room(stays, 2, 10.0) == said


def test_parameters_too_large_are_split(searching, nothing_compiles, monkeypatch, capsys):
    """Where they are whole on every device and `auto` would split them; where they are, there is nothing to say."""
    config, asked = parse_plan(searching)
    held = make_plan(config, make_mesh("fsdp=8"), asked.passages_count).held
    monkeypatch.setitem(topology.DEVICES, "cpu", topology.DEVICES["cpu"]._replace(memory=held))
    assert main(["plan", *searching, "--mesh", "data=8"]) == 1
    assert capsys.readouterr().out.endswith("\n\ntake --mesh auto\n")
    with pytest.raises(AssertionError, match="train step was compiled"):
        main(["plan", *searching])


def test_what_is_tried_in_order(flags):
    """Each measure on top of those before it; what the flags have already is left out."""
    given = [*flags, "--topology", "cpu:8", "--train_retriever", "--n_context", "6", "--per_gpu_batch_size", "2"]
    config, _ = parse_plan([*given, "--retriever_n_context", "6", "--precision", "bf16"])
    tried = list(alternatives(config, 8))
    both = "--use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever"
    assert [flags for flags, _ in tried] == [
        both,
        f"{both} --per_gpu_batch_size 1",
        f"{both} --per_gpu_batch_size 1 --mesh fsdp=4,passages=2",  # auto is fsdp=8
        f"{both} --per_gpu_batch_size 1 --mesh fsdp=2,model=4",
    ]
    last = tried[-1][1]
    assert last.run.mesh == "fsdp=2,model=4"
    assert last.model.use_gradient_checkpoint_retriever
    config, _ = parse_plan([*given, "--mesh", "data=8"])
    assert any(flags.endswith("--mesh auto") for flags, _ in alternatives(config, 8))


@pytest.mark.parametrize(
    ("n_context", "retriever_n_context", "train", "passages"),
    [
        (8, 8, True, 8),
        (8, 12, True, 4),  # training has twelve
        (4, 16, True, 4),  # the reader learns from four of them
        (8, 5, True, 1),
        (8, 12, False, 8),  # nothing learns from the other four
    ],
)
def test_passages_are_split_as_far_as_all_numbers_of_them_allow(flags, n_context, retriever_n_context, train, passages):
    """Those that the retriever learns from, that the reader learns from, and that it is evaluated with."""
    given = ["--n_context", str(n_context), "--retriever_n_context", str(retriever_n_context)]
    config, _ = parse_plan([*flags, "--topology", "cpu:8", *given, *["--train_retriever"] * train])
    meshes = {changed.run.mesh for _, changed in alternatives(config, 8)} - {"fsdp=2,model=4"}
    assert meshes == ({"auto", f"fsdp={8 // passages},passages={passages}"} if passages > 1 else {"auto"})


@pytest.mark.parametrize(("count", "mesh"), [(16, "fsdp=4,model=4"), (6, "fsdp=3,model=2"), (9, "fsdp=3,passages=3")])
def test_what_divides_the_heads_is_tried_on_model(flags, count, mesh):
    """Last, 4 at most; nothing where 4, the 12 heads and the devices have no divisor in common."""
    given = ["--reader_model_type", "t5-base", "--n_context", "3", "--retriever_n_context", "3"]
    config, _ = parse_plan([*flags, "--topology", "cpu:8", *given])
    assert [changed.run.mesh for _, changed in alternatives(config, count)][-1] == mesh


def test_the_search_reads_its_share_of_the_index_once(searching):
    """4096 x 8 rows of 48 float16 on eight devices; its products are 2 x queries x rows x width on each."""
    config, asked = parse_plan(searching)
    plan = make_plan(config, make_mesh("fsdp=8"), asked.passages_count)
    rows, width, queries = 4096, 48, 8
    assert plan.resident["index"] == rows * width * 2
    search = plan.steps[-1]
    report = examine(search, plan, topology.parse("cpu:8"), turns=1)
    assert report.flops == {"f32": 2 * queries * rows * width}
    assert report.traffic >= rows * width * 2
    assert report.collectives.keys() == {"all-gather"}
    assert report.collectives["all-gather"]["bytes"] == 8 * queries * config.retrieval.n_context * (4 + 4)


def test_a_faiss_index_is_not_on_the_devices(searching):
    """Nothing of it stays there and nothing searches it; a flat one does both."""
    for mode, there in (("flat", True), ("faiss", False)):
        config, asked = parse_plan([*searching, "--index_mode", mode])
        plan = make_plan(config, make_mesh("fsdp=8"), asked.passages_count)
        assert ("index" in plan.resident, "search" in {step.name for step in plan.steps}) == (there, there)


def test_time_between_nodes():
    """64 GPUs of 8 nodes gather 64 MB: 7/8 must come into each node through its 8 ports; inside one node, NVLink."""
    machine = topology.parse("a100-80gb:8x8")
    nbytes = 64_000_000
    shapes = (Shape("s8", (nbytes,)),)

    def seconds(group):
        counts = Counts({"bf16": 312e12, "f32": 156e12}, 2039e9, [Collective("all-gather", shapes, group, 3, "")], 0)
        return roofline(counts, machine)

    everywhere, within = seconds(tuple(range(64))), seconds(tuple(range(8)))
    assert everywhere["interconnect"] == pytest.approx(3 * nbytes * 7 / 8 / 8 / 25e9)
    assert within["interconnect"] == pytest.approx(3 * nbytes * 7 / 8 / 300e9)
    assert (everywhere["compute"], everywhere["memory"]) == pytest.approx((2, 1))


@pytest.mark.parametrize(
    ("argv", "said"),
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
def test_what_is_refused(flags, capsys, argv, said):
    """Exit status 2 and one line."""
    assert main(["plan", *flags, *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_without_the_compiler(flags, capsys, monkeypatch, tmp_path):
    """A GPU needs `make plan-env`; where that was made, its Python runs the same command."""
    monkeypatch.setattr(topology, "COMPILERS", {"cuda": "no_such_module", "tpu": "no_such_module"})
    monkeypatch.setattr(command, "PYTHON", tmp_path / "python")
    argv = ["plan", "--topology", "a100-80gb:8x8", *flags]
    assert main(argv) == 2
    assert "run `make plan-env`" in capsys.readouterr().err
    (tmp_path / "python").touch()
    ran = []
    monkeypatch.setattr("os.execve", lambda *args: ran.append(args) or (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("atlas_jax.commands.main.exit_while_compiling", lambda status: status)
    main(argv)
    ((python, arguments, _),) = ran
    assert python == tmp_path / "python"
    assert arguments[1:] == ["-m", "atlas_jax", *argv]


def test_every_gpu_has_a_description():
    """Memory and bandwidth in the table are those that XLA is told."""
    for name, device in topology.DEVICES.items():
        if device.platform == "cuda":
            text = topology.parse(f"{name}:1x8").target
            assert f"device_memory_size: {device.memory}\n" in text
            told = float(text.split("memory_bandwidth: ")[1].split()[0])
            assert math.isclose(told, device.bandwidth, rel_tol=1e-3)


def test_a_whole_array_is_found():
    """A program that makes an array as large as a stacked parameter is found out."""
    text = (
        "HloModule m\n\nENTRY %main (p: f32[3,8,4]) -> f32[3,64,4] {\n  %p = f32[3,8,4]{2,1,0} parameter(0)\n"
        "  ROOT %g = f32[3,64,4]{2,1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={1}\n}\n"
    )
    assert [shape.sizes for shape, _ in hlo.arrays(hlo.parse(text))] == [(3, 64, 4)]
