"""FLOPs, memory traffic and collectives counted in small compiled programs, against figures computed by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas_jax.plan import hlo

LAYERS, ROWS, WIDTH, HIDDEN = 5, 16, 32, 64


def compile_program(function, *args, **jit_options):
    return jax.jit(function, **jit_options).lower(*args).compile()


def count_program(function, *args, **jit_options) -> hlo.Counts:
    return hlo.count(hlo.parse(compile_program(function, *args, **jit_options).as_text()))


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


@pytest.fixture(scope="module")
def mesh_2x4():
    """A mesh of eight devices, two by four."""
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_a_product_in_a_loop_is_counted_once_per_iteration():
    """Two products of 16 x 32 x 64 in each of five layers have the same FLOPs as a scan and unrolled."""

    def scanned(x, up, down):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer[0]) @ layer[1], None), x, (up, down))[0]

    def unrolled(x, up, down):
        for layer in range(LAYERS):
            x = jnp.tanh(x @ up[layer]) @ down[layer]
        return x

    args = shape(ROWS, WIDTH), shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH)
    by_hand = LAYERS * 2 * (2 * ROWS * WIDTH * HIDDEN)
    for function in (scanned, unrolled):
        assert count_program(function, *args).flops == {"f32": by_hand}


def test_the_gradient_of_a_product_adds_two_products():
    """d/dx and d/dw of sum(tanh(x w)) are one product each, besides the forward one; XLA's own count agrees."""
    args = shape(ROWS, WIDTH), shape(WIDTH, HIDDEN)
    program = compile_program(jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), argnums=(0, 1)), *args)
    flops = hlo.count(hlo.parse(program.as_text())).flops["f32"]
    assert flops == 3 * 2 * ROWS * WIDTH * HIDDEN
    elementwise = 10 * ROWS * HIDDEN  # which XLA's count includes: a few operations per element
    assert flops <= program.cost_analysis()["flops"] <= flops + elementwise


def test_flops_of_batched_products_and_of_several_contracted_axes():
    """bthk,bshk->bhts is batched over b and h; bthk,hkd->btd contracts the two axes h and k."""
    b, t, s, h, k, d = 2, 3, 5, 4, 8, 6
    scores = count_program(lambda q, x: jnp.einsum("bthk,bshk->bhts", q, x), shape(b, t, h, k), shape(b, s, h, k))
    assert scores.flops == {"f32": 2 * b * h * t * s * k}
    out = count_program(lambda q, o: jnp.einsum("bthk,hkd->btd", q, o), shape(b, t, h, k), shape(h, k, d))
    assert out.flops == {"f32": 2 * b * t * d * h * k}


def test_an_all_gather_in_a_loop_is_counted_once_per_iteration(mesh_2x4):
    """Each of five layers gathers its 32 x 64 floats from four devices: 8192 bytes, of which a device sends 3/4."""
    sharded = NamedSharding(mesh_2x4, P(None, "y", None))
    weights = shape(LAYERS, WIDTH, HIDDEN, sharding=sharded)
    x = shape(ROWS, HIDDEN, WIDTH, sharding=NamedSharding(mesh_2x4, P("x")))

    def layers(x, w):
        def layer(x, w):
            gathered = jax.lax.with_sharding_constraint(w, NamedSharding(mesh_2x4, P()))
            return jnp.einsum("bhd,de->bhe", x, gathered @ gathered.T), None

        return jax.lax.scan(layer, x, w)[0]

    with jax.set_mesh(mesh_2x4):
        (gather,) = count_program(layers, x, weights).collectives
    assert (gather.kind, gather.times, gather.nbytes) == ("all-gather", LAYERS, 4 * WIDTH * HIDDEN)
    assert gather.group == (0, 1, 2, 3)  # along `y`, the inner axis
    assert gather.sent_bytes == gather.nbytes * 3 / 4


def test_a_sum_over_the_outer_axis_is_an_all_reduce(mesh_2x4):
    """A sum over rows sharded along `x` is one all-reduce in the group (0, 4), which sends its array once each way."""
    rows = shape(ROWS, WIDTH, sharding=NamedSharding(mesh_2x4, P("x")))
    replicated = NamedSharding(mesh_2x4, P())
    (reduce,) = count_program(lambda x: x.sum(0), rows, out_shardings=replicated).collectives
    assert (reduce.kind, reduce.times, reduce.nbytes, reduce.group) == ("all-reduce", 1, 4 * WIDTH, (0, 4))
    assert reduce.sent_bytes == 2 * reduce.nbytes / 2


def test_bytes_sent_by_reduce_scatter_all_to_all_and_permute(mesh_2x4):
    """With 4 KiB on each of four devices, a permute sends all of it, a reduce-scatter and an all-to-all 3/4."""

    def each_collective(x):
        scattered = jax.lax.psum_scatter(x, "y", tiled=True)
        exchanged = jax.lax.all_to_all(x, "y", 0, 0, tiled=True)
        permuted = jax.lax.ppermute(x, "y", [(i, (i + 1) % 4) for i in range(4)])
        return scattered, exchanged, permuted

    function = jax.shard_map(each_collective, mesh=mesh_2x4, in_specs=P("y"), out_specs=P("y"), check_vma=False)
    by_kind = {collective.kind: collective for collective in count_program(function, shape(4 * ROWS, 64)).collectives}
    nbytes = 4 * ROWS * 64
    assert {kind: collective.nbytes for kind, collective in by_kind.items()} == dict.fromkeys(by_kind, nbytes)
    assert by_kind["reduce-scatter"].sent_bytes == nbytes * 3 / 4
    assert by_kind["all-to-all"].sent_bytes == nbytes * 3 / 4
    assert by_kind["collective-permute"].sent_bytes == nbytes


@pytest.mark.parametrize(
    ("attribute", "group"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
    ],
)
def test_replica_groups_are_read_in_every_form(attribute, group):
    """The first replica group is read from each form in which XLA writes replica groups."""
    assert hlo._first_group(f"channel_id=1, {attribute}, dimensions={{0}}") == group


ASYNC = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,8]{1,0} all-gather-done(%start)
}
"""  # noqa: E501


def test_an_asynchronous_collective_is_counted_once():
    """all-gather-start and all-gather-done are one all-gather of 16 x 8 bf16, whatever the layout says."""
    (gather,) = hlo.count(hlo.parse(ASYNC)).collectives
    assert (gather.kind, gather.times, gather.nbytes) == ("all-gather", 1, 2 * 16 * 8)


def test_collectives_in_tpu_fusions_are_counted_once_per_chain():
    """An all-gather in three fusions with one chain id is counted once; one with another chain id is another.

    An all-reduce that is sliced in its fusion is a reduce-scatter; one that is not sliced, an all-reduce.
    """

    def all_gather(chain: int) -> str:
        attributes = f'replica_groups={{{{0,1}}}}, dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}'
        return f"  ROOT %g = bf16[16,8]{{1,0}} all-gather(%p), {attributes}"

    def computation(name: str, *lines: str) -> str:
        head = f"%{name} (p: bf16[8,8]) -> bf16[16,8] {{"
        return "\n".join([head, "  %p = bf16[8,8]{1,0} parameter(0)", *lines, "}", ""])

    reduced = "%r = bf16[8,8]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add"
    sliced = "  ROOT %s = bf16[4,8]{1,0} dynamic-slice(%r, %p, %p), dynamic_slice_sizes={4,8}"
    names = ["start", "beside", "done", "other", "scattered", "reduced"]
    text = "HloModule m\n\n" + "\n".join(
        [
            *(computation(name, all_gather(7)) for name in names[:3]),
            computation("other", all_gather(8)),
            computation("scattered", "  " + reduced, sliced),
            computation("reduced", "  ROOT " + reduced),
            "ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {",
            "  %a = bf16[8,8]{1,0} parameter(0)",
            *(f"  %{name} = bf16[16,8]{{1,0}} fusion(%a), kind=kCustom, calls=%{name}" for name in names),
            "  ROOT %b = bf16[8,8]{1,0} bitcast(%a)\n}\n",
        ]
    )
    collectives = hlo.count(hlo.parse(text)).collectives
    assert [(collective.kind, collective.nbytes) for collective in collectives] == [
        ("all-gather", 16 * 8 * 2),
        ("all-gather", 16 * 8 * 2),
        ("reduce-scatter", 8 * 8 * 2),
        ("all-reduce", 8 * 8 * 2),
    ]


def test_traffic_of_a_slice_is_the_slice():
    """A loop that reads one row of a table per iteration reads that row from memory, not the table."""
    table = shape(1024, 256)

    def sum_of_rows(table):
        return jax.lax.fori_loop(0, 8, lambda i, total: total + table[i], jnp.zeros(256))

    traffic = count_program(sum_of_rows, table).traffic
    row = 4 * 256
    assert 8 * 3 * row <= traffic < 8 * 12 * row  # read, add, write; never 8 x 1 MiB


@pytest.mark.parametrize("start", ["", "-start"])
def test_traffic_of_a_slice_inside_a_gpu_fusion_is_the_slice(start):
    """A row sliced after a bitcast and a conversion, and written into another table: 256 bf16 read, 256 f32 written.

    The other 4 bytes are the index. Counter-case: a fusion that sums its table reads all 12 rows.
    """
    done = "  ROOT %e = f32[12,256]{1,0} fusion-done(%d)\n" if start else ""
    kind = "((bf16[12,256]{1,0}, f32[12,256]{1,0}, s32[]), f32[12,256]{1,0}, u32[])" if start else "f32[12,256]{1,0}"
    text = f"""HloModule m

%row (p: bf16[12,256], q: f32[12,256], i: s32[]) -> f32[12,256] {{
  %p = bf16[12,256]{{1,0}} parameter(0)
  %q = f32[12,256]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %turned = bf16[256,12]{{0,1}} bitcast(%p)
  %wide = f32[256,12]{{0,1}} convert(%turned)
  %slice = f32[256,1]{{0,1}} dynamic-slice(%wide, %z, %i), dynamic_slice_sizes={{256,1}}
  %one = f32[1,256]{{1,0}} bitcast(%slice)
  ROOT %put = f32[12,256]{{1,0}} dynamic-update-slice(%q, %one, %i, %z)
}}

ENTRY %main (a: bf16[12,256], b: f32[12,256], c: s32[]) -> f32[12,256] {{
  %a = bf16[12,256]{{1,0}} parameter(0)
  %b = f32[12,256]{{1,0}} parameter(1)
  %c = s32[] parameter(2)
  {"" if start else "ROOT "}%d = {kind} fusion{start}(%a, %b, %c), kind=kLoop, calls=%row
{done}}}
"""
    assert hlo.count(hlo.parse(text)).traffic == 256 * 2 + 256 * 4 + 4
    summed = text.replace("dynamic-slice(%wide, %z, %i)", "reduce(%wide, %z)").replace("f32[256,1]", "f32[256]")
    assert hlo.count(hlo.parse(summed)).traffic == 12 * 256 * 2 + 256 * 4 + 4


def test_a_loop_of_unknown_trip_count_has_the_assumed_one():
    """The body counts `assumed_trip_count` times, and the loop is counted in `unknown_loops`."""
    module = hlo.parse(
        compile_program(
            lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w, x), shape(4, 4), shape(4, 4)
        ).as_text()
    )
    once, thrice = (hlo.count(module, assumed_trip_count=trips) for trips in (1, 3))
    assert (once.unknown_loops, once.flops) == (1, {"f32": 2 * 4**3})
    assert thrice.flops == {"f32": 3 * 2 * 4**3}


@pytest.mark.parametrize(
    ("root", "trip_count"),
    [
        ("compare(%i, %n), direction=LT", 6),
        ("compare(%i, %n), direction=NE", None),
        ("compare(%i, %m), direction=LT", None),
        ("and(%more, %more)", None),
    ],
)
def test_the_trip_count_is_read_from_a_condition_that_is_i_below_n(root, trip_count):
    """TPU's compiler states no trip count: `i < 6` alone gives 6, any other condition an unknown trip count."""
    state = "(s32[]{:T(128)}, f32[4]{0}, s32[]{:T(128)})"
    text = f"""HloModule m

%body (p: {state}) -> {state} {{
  ROOT %p = {state} parameter(0)
}}

%condition (p: {state}) -> pred[] {{
  %p = {state} parameter(0)
  %n = s32[]{{:T(128)}} constant(6)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %m = s32[]{{:T(128)}} get-tuple-element(%p), index=2
  %more = pred[]{{:T(512)}} compare(%i, %n), direction=LT
  ROOT %root = pred[]{{:T(512)}} {root}, metadata={{op_name="lt"}}
}}

ENTRY %main (a: {state}) -> {state} {{
  %a = {state} parameter(0)
  ROOT %loop = {state} while(%a), condition=%condition, body=%body
}}
"""
    module = hlo.parse(text)
    assert hlo.trip_count(module, module.computations["main"]["loop"]) == trip_count
    assert hlo.count(module).unknown_loops == (trip_count is None)


def test_flops_of_a_product_that_a_tpu_writes_as_a_convolution():
    """A batched product as a convolution has 2 x 3 x 16 x 8 x 32 FLOPs: products with padding are not counted."""
    line = (
        "%c = f32[3,16,32]{2,1,0} convolution(%a, %b), "
        "window={size=3 pad=0_0 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf"
    )
    text = (
        "HloModule m\n\nENTRY %main (a: bf16[3,16,8], b: bf16[3,8,32]) -> f32[3,16,32] {\n"
        "  %a = bf16[3,16,8]{2,1,0} parameter(0)\n  %b = bf16[3,8,32]{2,1,0} parameter(1)\n"
        f"  ROOT {line}\n}}\n"
    )
    assert hlo.count(hlo.parse(text)).flops == {"bf16": 2 * 3 * 16 * 8 * 32}
