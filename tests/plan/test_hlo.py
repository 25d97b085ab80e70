"""Reading compiled programs: arithmetic, traffic and collectives of small ones, against sums done by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas_jax.plan import hlo

LAYERS, ROWS, WIDTH, HIDDEN = 5, 16, 32, 64


def compiled(function, *args, **how):
    return jax.jit(function, **how).lower(*args).compile()


def counted(function, *args, **how) -> hlo.Counts:
    return hlo.count(hlo.parse(compiled(function, *args, **how).as_text()))


def shape(*sizes, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


@pytest.fixture(scope="module")
def square():
    """Eight devices, two by four."""
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_a_product_in_a_loop_counts_as_often_as_it_turns():
    """Two products of 16 x 32 x 64 in each of five layers, as a scan and unrolled."""

    def layers(x, up, down):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer[0]) @ layer[1], None), x, (up, down))[0]

    def unrolled(x, up, down):
        for layer in range(LAYERS):
            x = jnp.tanh(x @ up[layer]) @ down[layer]
        return x

    args = shape(ROWS, WIDTH), shape(LAYERS, WIDTH, HIDDEN), shape(LAYERS, HIDDEN, WIDTH)
    by_hand = LAYERS * 2 * (2 * ROWS * WIDTH * HIDDEN)
    for function in (layers, unrolled):
        assert counted(function, *args).flops == {"f32": by_hand}


def test_the_gradient_of_a_product_is_two_more():
    """d/dx and d/dw of sum(tanh(x w)) are a product each, beside the one forward: XLA's own count agrees."""
    args = shape(ROWS, WIDTH), shape(WIDTH, HIDDEN)
    program = compiled(jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), argnums=(0, 1)), *args)
    found = hlo.count(hlo.parse(program.as_text())).flops["f32"]
    assert found == 3 * 2 * ROWS * WIDTH * HIDDEN
    elementwise = 10 * ROWS * HIDDEN  # XLA's count has a few operations for each number besides
    assert found <= program.cost_analysis()["flops"] <= found + elementwise


def test_batched_products_with_several_contracted_axes():
    """bthk,bshk->bhts contracts k; bthk,hkd->btd contracts two axes."""
    b, t, s, h, k, d = 2, 3, 5, 4, 8, 6
    scores = counted(lambda q, x: jnp.einsum("bthk,bshk->bhts", q, x), shape(b, t, h, k), shape(b, s, h, k))
    assert scores.flops == {"f32": 2 * b * h * t * s * k}
    out = counted(lambda q, o: jnp.einsum("bthk,hkd->btd", q, o), shape(b, t, h, k), shape(h, k, d))
    assert out.flops == {"f32": 2 * b * t * d * h * k}


def test_a_gathered_weight_in_a_loop(square):
    """Each of five layers gathers its 32 x 64 floats from four devices: 8192 bytes, of which 3/4 travel."""
    split = NamedSharding(square, P(None, "y", None))
    weights = shape(LAYERS, WIDTH, HIDDEN, sharding=split)
    x = shape(ROWS, HIDDEN, WIDTH, sharding=NamedSharding(square, P("x")))

    def layers(x, w):
        def layer(x, w):
            whole = jax.lax.with_sharding_constraint(w, NamedSharding(square, P()))
            return jnp.einsum("bhd,de->bhe", x, whole @ whole.T), None

        return jax.lax.scan(layer, x, w)[0]

    with jax.set_mesh(square):
        (found,) = counted(layers, x, weights).collectives
    assert (found.kind, found.times, found.nbytes) == ("all-gather", LAYERS, 4 * WIDTH * HIDDEN)
    assert found.group == (0, 1, 2, 3)  # `y`, the inner axis
    assert found.sent == found.nbytes * 3 / 4


def test_a_sum_over_the_outer_axis(square):
    """A mean over the rows that `x` splits is an all-reduce among devices 0 and 4, sent once each way."""
    rows = shape(ROWS, WIDTH, sharding=NamedSharding(square, P("x")))
    whole = NamedSharding(square, P())
    (found,) = counted(lambda x: x.sum(0), rows, out_shardings=whole).collectives
    assert (found.kind, found.times, found.nbytes, found.group) == ("all-reduce", 1, 4 * WIDTH, (0, 4))
    assert found.sent == 2 * found.nbytes / 2


def test_kinds_that_shard_map_asks_for(square):
    """One of each, on 4 KiB a device; a permutation sends everything, an exchange of all with all three quarters."""

    def each(x):
        scattered = jax.lax.psum_scatter(x, "y", tiled=True)
        exchanged = jax.lax.all_to_all(x, "y", 0, 0, tiled=True)
        passed = jax.lax.ppermute(x, "y", [(i, (i + 1) % 4) for i in range(4)])
        return scattered, exchanged, passed

    run = jax.shard_map(each, mesh=square, in_specs=P("y"), out_specs=P("y"), check_vma=False)
    found = {one.kind: one for one in counted(run, shape(4 * ROWS, 64)).collectives}
    nbytes = 4 * ROWS * 64
    assert {kind: one.nbytes for kind, one in found.items()} == dict.fromkeys(found, nbytes)
    assert found["reduce-scatter"].sent == nbytes * 3 / 4
    assert found["all-to-all"].sent == nbytes * 3 / 4
    assert found["collective-permute"].sent == nbytes


@pytest.mark.parametrize(
    ("written", "group"),
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
def test_groups_in_every_form(written, group):
    """The first group of a collective, however XLA writes it."""
    assert hlo._group(f"channel_id=1, {written}, dimensions={{0}}") == group


ASYNC = """HloModule m

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,8]{1,0} all-gather-done(%start)
}
"""  # noqa: E501


def test_what_starts_and_ends_apart_counts_once():
    """A pair of start and done is one all-gather of 16 x 8 bf16, whatever the layout says."""
    (found,) = hlo.count(hlo.parse(ASYNC)).collectives
    assert (found.kind, found.times, found.nbytes) == ("all-gather", 1, 2 * 16 * 8)


def test_collectives_as_a_tpu_writes_them():
    """One all-gather begun, gone on with beside a product and ended is one; one in another chain is another.

    An all-reduce of which a fusion keeps the slice is a reduce-scatter; of which it keeps all, an all-reduce.
    """

    def gather(chain: int) -> str:
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
            *(computation(name, gather(7)) for name in names[:3]),
            computation("other", gather(8)),
            computation("scattered", "  " + reduced, sliced),
            computation("reduced", "  ROOT " + reduced),
            "ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {",
            "  %a = bf16[8,8]{1,0} parameter(0)",
            *(f"  %{name} = bf16[16,8]{{1,0}} fusion(%a), kind=kCustom, calls=%{name}" for name in names),
            "  ROOT %b = bf16[8,8]{1,0} bitcast(%a)\n}\n",
        ]
    )
    found = [(one.kind, one.nbytes) for one in hlo.count(hlo.parse(text)).collectives]
    assert found == [
        ("all-gather", 16 * 8 * 2),
        ("all-gather", 16 * 8 * 2),
        ("reduce-scatter", 8 * 8 * 2),
        ("all-reduce", 8 * 8 * 2),
    ]


def test_traffic_of_a_slice_is_the_slice():
    """A loop that reads one row of a table each turn moves that row, not the table."""
    table = shape(1024, 256)

    def sums(table):
        return jax.lax.fori_loop(0, 8, lambda i, total: total + table[i], jnp.zeros(256))

    traffic = counted(sums, table).traffic
    row = 4 * 256
    assert 8 * 3 * row <= traffic < 8 * 12 * row  # read, add, write; never 8 x 1 MiB


@pytest.mark.parametrize("start", ["", "-start"])
def test_traffic_of_a_slice_that_a_gpu_takes_within_a_fusion(start):
    """Behind a bitcast and a conversion, and put into another table: a row of 256 bf16 read, one of 256 f32 written.

    The counter-case is a fusion that adds up its table: 12 rows, and a number.
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


def test_a_loop_without_a_known_end():
    """It counts as often as one says, and is told of."""
    module = hlo.parse(
        compiled(
            lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w, x), shape(4, 4), shape(4, 4)
        ).as_text()
    )
    once, thrice = (hlo.count(module, turns=turns) for turns in (1, 3))
    assert (once.unknown_loops, once.flops) == (1, {"f32": 2 * 4**3})
    assert thrice.flops == {"f32": 3 * 2 * 4**3}


@pytest.mark.parametrize(
    ("root", "turns"),
    [
        ("compare(%i, %n), direction=LT", 6),
        ("compare(%i, %n), direction=NE", None),
        ("compare(%i, %m), direction=LT", None),
        ("and(%more, %more)", None),
    ],
)
def test_a_loop_whose_condition_alone_says_how_often_it_turns(root, turns):
    """As the TPU's compiler leaves a scan: i < 6. With another end than that alone, nobody knows."""
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
    assert hlo.trips(module, module.computations["main"]["loop"]) == turns
    assert hlo.count(module).unknown_loops == (turns is None)


def test_products_as_a_tpu_writes_them():
    """A batched product as a convolution: what meets padding is no work, so it is 2 x 3 x 16 x 8 x 32 all the same."""
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
