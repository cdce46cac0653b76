"""torch.ops.normsuite: what torch asks of an operator, and the same numbers as the public functions'."""

import pytest
import torch
from torch.library import opcheck

import norms.kernels.operators  # noqa: F401  registers them
from norms.kernels import affine, moments, native
from norms.kernels.grouping import normalize

ops = torch.ops.normsuite
LAYOUTS = ["contiguous", "channels_last", "one axis last", "no axis", "strided"]
HALVES = torch.bfloat16, torch.float16


def numbers(layout="channels_last", dtype=torch.float64, grad=True):
    x = {
        "contiguous": lambda: torch.randn(4, 3, 2, 2),
        "channels_last": lambda: torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "one axis last": lambda: torch.randn(4, 5, 3).movedim(-1, 1),
        "no axis": lambda: torch.randn(4, 3),
        "strided": lambda: torch.randn(4, 6, 2, 3)[:, ::2, :, 1:],
    }[layout]()
    return x.to(dtype).detach().requires_grad_(grad)


def table(rows=2, grad=True):
    return torch.randn(rows, 3, dtype=torch.float64, requires_grad=grad)


def arguments(name, x):
    """Every form of a call of the operator, and which of its results have a gradient."""
    dy = torch.randn_like(x).detach().requires_grad_()
    weight, bias = torch.randn(2, 3, dtype=torch.promote_types(x.dtype, torch.float32)).unbind()
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    coefficients = table(), table(), table()
    if name == "moments":
        return [(x, 1), (x, 2), (x, 4)]
    if name == "affine":
        return [(x, *coefficients[:2]), (x, *coefficients)]
    if name == "sums":
        return [(dy, x, *coefficients[:2]), (dy, x, *coefficients)]
    if name == "blend":
        own = table(), table(), table()
        return [(dy, x, *coefficients, *own), (None, x, None, None, None, *own), (dy, x, coefficients[0])]
    if name == "normalize":
        given = table(1, False), table(1, False).square()
        return [(x, weight, bias, 3, 2, 0.1), (x, None, None, 1, 4, 0.1), (x, weight, bias, 3, 1, 0.1, *given, True)]
    stats = [torch.ops.normsuite.normalize(x.detach(), None, None, g, k, 0.1)[1] for g, k in ((3, 2), (1, 4), (3, 3))]
    own = [(dy, x, weight, stats[0], 0.1), (dy, x, None, stats[1], 0.1), (dy, x, weight, stats[2], 0.1)]
    return [*own, (dy, x, weight, stats[0], 0.1, True)]


NAMES = ["moments", "affine", "sums", "blend", "normalize", "normalize_backward"]


def differentiable(found):
    found = (found,) if isinstance(found, torch.Tensor) else found
    return tuple(t for t in found if t.requires_grad and t.numel())


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((layout, torch.float32) for layout in LAYOUTS), *((LAYOUTS[1], kind) for kind in (torch.float64, *HALVES))],
)
@pytest.mark.parametrize("name", NAMES)
def test_schema_autograd_and_fake_form_are_those_of_the_operator(name, layout, dtype):
    for given in arguments(name, numbers(layout, dtype)):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        found = opcheck(getattr(ops, name).default, given, test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.slow  # half a minute of tracing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_graphs_hold_the_operator_at_every_size(name, layout):
    for given in arguments(name, numbers(layout)):
        assert opcheck(getattr(ops, name).default, given, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_their_gradients_are_right(name, layout):
    for given in arguments(name, numbers(layout)):
        leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]

        def call(*tensors, given=given):
            rest = iter(tensors)
            there = [next(rest) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in given]
            if name == "normalize_backward" and len(given) < 6:  # which takes the statistics of its x
                sets, groups = given[3].shape[1:]
                there[3] = ops.normalize(there[1].detach(), None, None, groups, sets, 0.1)[1]
            return differentiable(getattr(ops, name)(*there))

        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        # its fast mode can not tell results apart of which some have no gradient, as x without moments
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=name != "blend")


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_those_of_the_public_functions(layout, dtype):
    x, scale, shift, floor = numbers(layout, dtype), table(), table(), table()
    weight, bias = torch.randn(3), torch.randn(3)
    for own, other in (
        (ops.moments(x, 2), moments(x, 2)),
        ((ops.affine(x, scale, shift, floor),), (affine(x, scale, shift, floor),)),
        (ops.normalize(x, weight, bias, 3, 2, 1e-5)[:1], normalize(x, weight, bias, 3, 2, 1e-5)[:1]),
    ):
        for a, b in zip(own, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_torch_give_what_the_library_gives(name, monkeypatch):
    for layout in LAYOUTS:
        for given in arguments(name, numbers(layout)):
            with torch.no_grad():
                own = getattr(ops, name)(*given)
                with monkeypatch.context() as patched:
                    patched.setattr(native, "ready", lambda x: None)
                    other = getattr(ops, name)(*given)
            torch.testing.assert_close(own, other)
            for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (own, other)), strict=True):
                assert a.stride() == b.stride()


@pytest.mark.parametrize("dims", ["all", "x alone", "tables alone", "last"])
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_over_copies(name, dims):
    copies = 3
    for index, one in enumerate(arguments(name, numbers("contiguous", grad=False))):
        every = [arguments(name, numbers("contiguous", grad=False))[index] for _ in range(copies)]
        in_dims, stacked = [], []
        for i, t in enumerate(one):
            large = isinstance(t, torch.Tensor) and t.dim() == 4
            mapped = isinstance(t, torch.Tensor) and (dims in ("all", "last") or (dims == "x alone") == large)
            at = None if not mapped else t.dim() if dims == "last" else 0
            in_dims.append(at)
            stacked.append(t if not mapped else torch.stack([e[i].detach() for e in every], at))
        if all(at is None for at in in_dims):
            continue
        found = torch.vmap(getattr(ops, name), tuple(in_dims))(*stacked)
        looped = [
            getattr(ops, name)(*(s if at is None else s.select(at, b) for s, at in zip(stacked, in_dims, strict=True)))
            for b in range(copies)
        ]
        if isinstance(found, torch.Tensor):
            found, looped = (found,), [(t,) for t in looped]
        for i, t in enumerate(found):
            torch.testing.assert_close(t, torch.stack([each[i] for each in looped]))


def test_vmap_with_sets_of_unequal_size_is_a_loop():
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    found = torch.vmap(lambda x: ops.normalize(x, None, None, 4, 2, 1e-5))(x)
    for b in range(3):
        torch.testing.assert_close(tuple(t[b] for t in found), ops.normalize(x[b], None, None, 4, 2, 1e-5))


def test_gradients_go_through_vmap():
    """torch.func.grad knows no operators with a gradient in Python; there norms.kernels serves."""
    x, scale, shift = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True), table(), table()

    def one(x, scale, shift):
        mean, var = ops.moments(x, 2)
        y = ops.affine(x, scale * var - mean, shift)
        return y.pow(3) + ops.normalize(x, shift[0], shift[1], 3, 2, 0.1)[0].exp()

    losses = torch.vmap(one, (0, None, None))(x, scale, shift).sum(), sum(one(each, scale, shift).sum() for each in x)
    found, looped = (torch.autograd.grad(loss, (x, scale, shift), create_graph=True) for loss in losses)
    torch.testing.assert_close(found, looped)
    found, looped = (torch.autograd.grad(g[0].pow(2).sum(), (x, scale, shift)) for g in (found, looped))
    torch.testing.assert_close(found, looped)


def test_autocast_changes_nothing():
    x, scale, shift = numbers(dtype=torch.float32), table(), table()

    def run():
        mean, var = ops.moments(x, 2)
        y = ops.affine(x, scale * torch.rsqrt(var + 1e-5), shift - mean)
        z, _ = ops.normalize(x, None, None, 3, 2, 1e-5)
        return mean, y, z, *torch.autograd.grad(y.square().sum() + (y * z).sum(), (x, scale, shift))

    plainly = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for a, b in zip(plainly, cast, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [t.dtype for t in cast[:2]] == [torch.float64, torch.float32]


def test_a_compiled_function_holds_operators_and_gives_the_same():
    def run(x, scale):
        mean, var = ops.moments(x, 1)
        return ops.affine(x, scale * torch.rsqrt(var + 1e-5), -mean)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    x, scale = numbers(), table(1)
    found = torch.compile(run, backend=backend, fullgraph=True)(x, scale)
    torch.testing.assert_close(found, run(x, scale))
    assert "normsuite.moments" in graphs[0]
    assert "normsuite.affine" in graphs[0]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x, scale)
    own, other = (torch.autograd.grad(y.pow(3).sum(), (x, scale)) for y in (compiled, run(x, scale)))
    torch.testing.assert_close(own, other)


def test_meta_tensors_have_shapes_types_and_strides():
    x = numbers("channels_last").detach().to("meta")
    mean, var = ops.moments(x, 2)
    assert (mean.shape, mean.dtype, var.shape) == ((2, 3), torch.float64, (2, 3))
    assert ops.affine(x, mean, var).stride() == x.stride()
    assert ops.normalize(x, None, None, 3, 2, 1e-5)[1].shape == (4, 2, 3)


def test_empty_batches_have_empty_results():
    x = torch.randn(0, 3, 2)
    assert ops.affine(x, table(1), table(1)).shape == x.shape
    assert [t.shape for t in ops.moments(x, 1)] == [(1, 3)] * 2
