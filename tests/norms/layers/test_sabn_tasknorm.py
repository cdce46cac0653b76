"""sabn and tasknorm against literal float64 versions of their definitions, and their known identities."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from norms.factory import factory_info
from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import after_update, hold, situation
from tasks import get_task

SHAPES = [(6, 3), (6, 3, 5), (6, 3, 4, 2), (6, 3, 2, 2, 3)]
DOMAINS = {
    "one": 1,
    "blocks": torch.tensor([0, 0, 0, 0, 1, 1]),
    "mixed": torch.tensor([1, 0, 1, 1, 0, 1]),
    "one of all": torch.zeros(6, dtype=torch.long),
}


def vary(layer):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64), alpha=0.3)
    return layer


def batch(shape=(6, 3, 4, 2), seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    head = (*shape[:2], *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    spread = torch.rand(head, generator=draw, dtype=torch.float64) + 0.5
    return (x * spread + torch.randn(head, generator=draw, dtype=torch.float64)).to(dtype)


def assert_same_gradients(one, two, inputs):
    """Of two scalars with respect to the same inputs."""
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, allow_unused=True, materialize_grads=True)
                                 for y in (one, two)))  # fmt: skip


def moments(values):
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / len(values)


def entries(x, n, c):
    return list(x[n, c].reshape(-1))


# --- sabn: its definition -----------------------------------------------------------------------------------------


def literal_sabn(layer, x, domain, slices=1):
    """Training output, and the running statistics after it, value by value."""
    n_samples, channels = x.shape[:2]
    weight = [1.0] * channels if layer.weight is None else layer.weight
    bias = [0.0] * channels if layer.bias is None else layer.bias
    running = layer.running_mean.clone(), layer.running_var.clone()
    rows = {}
    for k, c in itertools.product(range(slices), range(channels)):
        members = range(k, n_samples, slices)
        values = [v for n in members for v in entries(x, n, c)]
        mean, var = moments(values)
        for buffer, new in zip(running, (mean, var * len(values) / (len(values) - 1)), strict=True):
            buffer[c] = 0.9 * buffer[c] + 0.1 * new.detach()
        for n in members:
            d = domain if isinstance(domain, int) else int(domain[n])
            y = [(v - mean) / (var + layer.eps).sqrt() * weight[c] + bias[c] for v in entries(x, n, c)]
            rows[n, c] = torch.stack([v * layer.domain_weight[d, c] + layer.domain_bias[d, c] for v in y])
    y = torch.stack([torch.stack([rows[n, c] for c in range(channels)]) for n in range(n_samples)])
    return y.reshape(x.shape), running


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("slices", [1, 2])
def test_sabn_is_its_definition_value_by_value(shape, domain, affine, slices):
    layer = vary(make_norm("sabn")(3, affine=affine, dtype=torch.float64))
    for step in range(2):
        x = batch(shape, step).requires_grad_()
        with torch.no_grad():
            _, running = literal_sabn(layer, x, domain, slices)
        expected, _ = literal_sabn(layer, x, domain, slices)
        with situation(layer, domain, slices=slices):
            y = layer(x)
        torch.testing.assert_close(y, expected)
        pull = batch(shape, 9)
        assert_same_gradients((y * pull).sum(), (expected * pull).sum(), [x, *layer.parameters()])
        torch.testing.assert_close((layer.running_mean, layer.running_var), running)
    assert int(layer.num_batches_tracked) == 2 * slices


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_sabn_evaluates_with_the_shared_statistics_and_the_told_affine(domain):
    layer = vary(make_norm("sabn")(3, dtype=torch.float64))
    with situation(layer, domain):
        layer(batch())
        x = batch(seed=1).requires_grad_()
        y = layer.eval()(x)
    each = [domain] * 6 if isinstance(domain, int) else domain.tolist()
    z = (x - layer.running_mean.view(3, 1, 1)) / (layer.running_var + layer.eps).sqrt().view(3, 1, 1)
    z = z * layer.weight.view(3, 1, 1) + layer.bias.view(3, 1, 1)
    rows = [
        z[n] * layer.domain_weight[d].view(3, 1, 1) + layer.domain_bias[d].view(3, 1, 1) for n, d in enumerate(each)
    ]
    torch.testing.assert_close(y, torch.stack(rows))
    assert_same_gradients((y**3).sum(), (torch.stack(rows) ** 3).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize(("num_domains", "domain"), [(1, None), (1, 0), (2, DOMAINS["mixed"])], ids=str)
def test_sabn_whose_second_affine_is_the_identity_is_bn(num_domains, domain):
    sabn, bn = make_norm("sabn", num_domains=num_domains)(3), make_norm("bn")(3)
    with torch.no_grad():
        sabn.domain_weight.fill_(1)
    for step in range(3):
        one, two = (batch(seed=step, dtype=torch.float32).requires_grad_() for _ in range(2))
        with situation(sabn, domain):
            y = sabn(one)
        expected = bn(two)
        torch.testing.assert_close(y, expected)
        grads = [
            torch.autograd.grad((z**3).sum(), [x, layer.weight, layer.bias])
            for z, x, layer in ((y, one, sabn), (expected, two, bn))
        ]
        torch.testing.assert_close(*grads)
    shared = {key: value for key, value in sabn.state_dict().items() if not key.startswith("domain")}
    assert shared.keys() == bn.state_dict().keys()
    torch.testing.assert_close(shared, dict(bn.state_dict()))
    with situation(sabn, domain):
        torch.testing.assert_close(sabn.eval()(one), bn.eval()(two))


def test_sabn_starts_with_scales_near_one_that_differ_and_shifts_of_zero():
    torch.manual_seed(0)
    layer = make_norm("sabn", num_domains=4)(256)
    assert layer.domain_weight.shape == layer.domain_bias.shape == (4, 256)
    spread, mean = torch.std_mean(layer.domain_weight.detach())
    assert abs(float(mean) - 1) < 0.003
    assert abs(float(spread) - 0.02) < 0.003
    assert not layer.domain_bias.any()
    assert torch.equal(layer.weight, torch.ones(256))
    before = torch.get_rng_state()
    again = make_norm("sabn", num_domains=4)(256)  # drawn, yet the stream of others is where it was
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.domain_weight, layer.domain_weight)


def test_gradients_of_a_domain_reach_its_own_affine_and_the_shared_one():
    layer = vary(make_norm("sabn")(3))
    with situation(layer, 1):
        layer(batch(dtype=torch.float32)).square().sum().backward()
    assert not layer.domain_weight.grad[0].any()
    assert not layer.domain_bias.grad[0].any()
    assert all(g.all() for g in (layer.domain_weight.grad[1], layer.domain_bias.grad[1], layer.weight.grad))


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_the_gradients_of_sabn_are_exact_to_the_second_order(domain):
    layer = vary(make_norm("sabn")(3, dtype=torch.float64))
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        with hold(layer), situation(layer, domain):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (batch().requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters))
    for mode in (True, False):
        layer.train(mode)
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("domain", [1, DOMAINS["mixed"]], ids=["one", "mixed"])
def test_sabn_in_other_formats_and_types(domain):
    layer = vary(make_norm("sabn")(3))
    exact = copy.deepcopy(layer).double()
    far = (1e4 + batch((6, 3, 8, 8))).float()
    for x, allowed in ((far, 0.01), (batch((6, 3, 8, 8)).bfloat16(), 0.05)):
        x = x.contiguous(memory_format=torch.channels_last)
        with situation(layer, domain), situation(exact, domain):
            y, expected = layer(x), exact(x.double())
        assert y.dtype == x.dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y.double() - expected).abs().max() < allowed
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (None, "training needs the domain of the images .0 to 1., none was told"),
        (2, "domain 2 is not in 0 to 1"),
        (torch.tensor([0, 1, 2, 0, 1, 0]), "domains 0 to 2 are not in 0 to 1"),
        (torch.tensor([0, 1]), r"domains of shape \(2,\) for a batch of 6"),
    ],
)
def test_a_missing_or_unknown_domain_is_refused(domain, words):
    layer = make_norm("sabn")(3)
    with situation(layer, domain), pytest.raises(ValueError, match=words):
        layer(batch(dtype=torch.float32))
    with situation(layer, domain), pytest.raises(ValueError, match=words.replace("training", "evaluation")):
        layer.eval()(batch(dtype=torch.float32))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32])
def test_domains_may_be_of_any_integer_type(kind):
    layer, x = vary(make_norm("sabn")(3)), batch(dtype=torch.float32)
    outputs = []
    for domain in (DOMAINS["mixed"], DOMAINS["mixed"].to(kind)):
        with hold(layer), situation(layer, domain):
            outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("options", "channels", "words"),
    [
        ({}, 0, "num_channels=0: at least 1"),
        ({"num_domains": 0}, 3, "num_domains=0: at least 1"),
        ({"eps": 0.0}, 3, "eps=0.0: it must be positive"),
        ({"momentum": 2.0}, 3, "momentum=2.0"),
    ],
)
def test_sabn_refuses_bad_options(options, channels, words):
    with pytest.raises(ValueError, match=words):
        make_norm("sabn", **options)(channels)


def test_sabn_refuses_bad_input():
    layer = make_norm("sabn", num_domains=1)(3)
    for x, words in (
        (torch.zeros(2, 4, 2, 2), r"SandwichBatchNorm for 3 channels: x must be \(N, 3, \*\)"),
        (torch.zeros(1, 3, 1, 1), "Expected more than 1 value per channel when training, given 1"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(x)
    with situation(layer, slices=2), pytest.raises(ValueError, match="3 does not split into 2 norm batches"):
        layer(torch.zeros(3, 3, 2, 2))


@pytest.mark.parametrize("momentum", [0.3, 1.0, None])
@pytest.mark.parametrize("slices", [1, 2])
def test_the_statistics_of_sabn_move_as_those_of_bn(momentum, slices):
    sabn, bn = (make_norm(name, momentum=momentum)(3) for name in ("sabn", "bn"))
    for step in range(3):
        x = batch(seed=step, dtype=torch.float32)
        with situation(sabn, DOMAINS["mixed"], slices=slices), situation(bn, slices=slices):
            sabn(x), bn(x)
    for name, buffer in bn.named_buffers():
        torch.testing.assert_close(getattr(sabn, name), buffer)
    recalibrate(nn.Sequential(sabn), [x], slices, domain=0)
    recalibrate(nn.Sequential(bn), [x], slices)
    torch.testing.assert_close(sabn.running_var, bn.running_var)
    sabn.reset_running_stats()
    assert not sabn.running_mean.any()


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_sabn_resumes_with_the_same_future(way):
    layer = vary(make_norm("sabn")(3))
    with situation(layer, DOMAINS["mixed"]):
        layer(batch(dtype=torch.float32))
    twin = copied(layer, make_norm("sabn"), way)
    for one in (layer, twin):
        with situation(one, 1):
            one(batch(seed=1, dtype=torch.float32))
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in layer.state_dict().items())


def copied(layer, factory, way):
    if way == "deepcopy":
        return copy.deepcopy(layer)
    if way == "pickle":
        return pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes
    file, twin = io.BytesIO(), factory(layer.num_channels)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return twin


# --- tasknorm: its definition -------------------------------------------------------------------------------------


def literal_tasknorm(layer, context, x):
    """The output of x after a context, value by value from the class's formula."""
    channels = x.shape[1]
    weight = [1.0] * channels if layer.weight is None else layer.weight
    bias = [0.0] * channels if layer.bias is None else layer.bias
    alpha = 1 / (1 + torch.exp(-(layer.a * len(context) + layer.b)))
    of_context = [moments([v for n in range(len(context)) for v in entries(context, n, c)]) for c in range(channels)]
    samples = []
    for n in range(len(x)):
        rows = []
        for c in range(channels):
            values, (mean_c, var_c) = entries(x, n, c), of_context[c]
            mean_i, var_i = moments(values)
            mean = alpha * mean_c + (1 - alpha) * mean_i
            var = alpha * (var_c + (mean_c - mean) ** 2) + (1 - alpha) * (var_i + (mean_i - mean) ** 2)
            rows.append(torch.stack([(v - mean) / (var + layer.eps).sqrt() * weight[c] + bias[c] for v in values]))
        samples.append(torch.stack(rows))
    return torch.stack(samples).reshape(x.shape)


def tasknorm(affine=True, dtype=torch.float64, **options):
    return vary(make_norm("tasknorm", **options)(3, affine=affine, dtype=dtype))


def episode(layer, context, query):
    with situation(layer, part="context"):
        first = layer(context)
    with situation(layer, part="query"):
        return first, layer(query)


@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_tasknorm_is_its_definition_value_by_value(shape, affine, mode):
    layer = tasknorm(affine).train(mode)
    for seed, size in ((0, 6), (3, 4)):  # two episodes of other sizes: the second has nothing of the first
        context = batch((size, *shape[1:]), seed).requires_grad_()
        query = batch((5, *shape[1:]), seed + 1).requires_grad_()
        found = episode(layer, context, query)
        expected = literal_tasknorm(layer, context, context), literal_tasknorm(layer, context, query)
        torch.testing.assert_close(found, expected)
        # of the queries alone: what reaches the context goes through the moments that were kept
        pulls = [batch(tuple(y.shape), 9) for y in found]
        learned = list(layer.parameters())
        for first in (0.0, 1.0):
            losses = [sum(s * (y * g).sum() for s, y, g in zip((first, 1.0), ys, pulls, strict=True))
                      for ys in (found, expected)]  # fmt: skip
            grads = [torch.autograd.grad(loss, [context, query, *learned], retain_graph=True) for loss in losses]
            torch.testing.assert_close(*grads)
            assert grads[0][0].abs().max() > 1e-3
    assert layer.context_size == 4
    torch.testing.assert_close(layer.context_mean, context.transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(layer.context_var, context.transpose(0, 1).flatten(1).var(1, correction=0))


def test_the_gradients_of_tasknorm_are_exact_to_the_second_order_through_the_context():
    layer = tasknorm()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(context, query, *values):
        given = dict(zip(names, values, strict=True))
        with hold(layer):
            for part, x in (("context", context), ("query", query)):
                with situation(layer, part=part):
                    y = torch.func.functional_call(layer, given, (x,))
        return y

    inputs = [batch((4, 3, 2, 2)), batch((3, 3, 2, 2), 1), *(p.detach().clone() for p in parameters)]
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def mixing(alpha):
    layer = tasknorm()
    with torch.no_grad():
        layer.a.zero_()
        layer.b.fill_({1: math.inf, 0: -math.inf}[alpha])
    return layer


def test_with_all_weight_on_the_context_it_is_bn():
    layer, bn = mixing(1), make_norm("bn", momentum=1.0)(3, dtype=torch.float64)
    bn.load_state_dict(layer.state_dict(), strict=False)
    context, query = batch().requires_grad_(), batch(seed=1)
    found, of_queries = episode(layer, context, query)
    expected = bn(context)
    torch.testing.assert_close(found, expected)
    assert_same_gradients((found**3).sum(), (expected**3).sum(), [context])
    with torch.no_grad():
        count = context.numel() // 3
        bn.running_var.mul_((count - 1) / count)  # biased, as in the formula
    torch.testing.assert_close(of_queries, bn.eval()(query))


def test_with_all_weight_on_the_sample_it_is_in():
    layer, instance = mixing(0), make_norm("in")(3, dtype=torch.float64)
    instance.load_state_dict({name: getattr(layer, name) for name in ("weight", "bias")})
    for x, y in zip((batch(), batch(seed=1)), episode(layer, batch(), batch(seed=1)), strict=True):
        torch.testing.assert_close(y, instance(x))


def test_the_weights_start_at_one_half_and_grow_with_the_context():
    layer = make_norm("tasknorm")(3)
    assert (layer.a.item(), layer.b.item()) == (0, 0)
    x = batch(dtype=torch.float32)
    with situation(layer, part="context"):
        y = layer(x)
    # what is normalized by both means and by the second moment about them, with equal weights
    mean = (x.mean((0, 2, 3)) + x.mean((2, 3))) / 2
    second = (x.square().mean((0, 2, 3)) + x.square().mean((2, 3))) / 2
    spread = (second - mean.square() + layer.eps).sqrt()
    torch.testing.assert_close(y, (x - mean[..., None, None]) / spread[..., None, None])
    with torch.no_grad():
        layer.a.fill_(100.0)  # a large context: its statistics alone
        with situation(layer, part="context"):
            torch.testing.assert_close(layer(x), make_norm("bn")(3)(x))


def test_a_query_does_not_depend_on_other_queries():
    layer = tasknorm()
    context, query = batch(), batch(seed=1)
    for mode in (True, False):
        together = episode(layer.train(mode), context, query)[1]
        alone = [episode(layer, context, one[None])[1] for one in query]
        torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_it_must_be_told_and_have_seen_a_context(mode):
    layer, x = tasknorm().train(mode), batch()
    with pytest.raises(ValueError, match="tasknorm needs to be told context or query"):
        layer(x)
    with situation(layer, part="query"), pytest.raises(ValueError, match="a query before any context"):
        layer(x)
    with hold(layer):
        episode(layer, x, x)
    with situation(layer, part="query"), pytest.raises(ValueError, match="a query before any context"):
        layer(x)  # what was held is gone
    assert not layer.context_mean.any()


def test_tasknorm_refuses_bad_input_and_options():
    layer = tasknorm()
    with situation(layer, part="context"):
        with pytest.raises(ValueError, match=r"TaskNorm for 3 channels: x must be \(N, 3, \*\)"):
            layer(torch.zeros(2, 4, 2, 2))
        with pytest.raises(ValueError, match="more than one value per channel of the context is needed"):
            layer(torch.zeros(1, 3, 1, 1))
    for channels, options, words in ((0, {}, "num_channels=0"), (3, {"eps": 0.0}, "eps=0.0: it must be positive")):
        with pytest.raises(ValueError, match=words):
            make_norm("tasknorm", **options)(channels)


def test_a_single_query_of_one_position_is_defined():
    layer = tasknorm()
    context, query = batch((6, 3, 1, 1)), batch((1, 3, 1, 1), 1).requires_grad_()
    y = episode(layer, context, query)[1]
    torch.testing.assert_close(y, literal_tasknorm(layer, context, query))
    assert torch.autograd.grad(y.sum(), query)[0].isfinite().all()


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_tasknorm_with_a_graph_in_its_buffers_is_copied_and_goes_on_alike(way):
    layer, context, query = tasknorm(dtype=torch.float32), *(batch(seed=s, dtype=torch.float32) for s in (0, 1))
    expected = episode(layer, context.requires_grad_(), query)[1]
    assert layer.context_mean.requires_grad  # not detached: the loss of queries reaches the context
    twin = copied(layer, make_norm("tasknorm"), way)
    assert not any(b.requires_grad for b in twin.buffers())
    assert layer.context_mean.requires_grad
    with situation(twin, part="query"):
        torch.testing.assert_close(twin(query), expected)
    with situation(twin, part="context"):
        twin(5 * context)
    with situation(layer, part="query"):
        torch.testing.assert_close(layer(query), expected)


def test_hold_puts_the_context_back():
    layer, context, query = tasknorm(), batch().requires_grad_(), batch(seed=1)
    expected = episode(layer, context, query)[1]
    kept = dict(layer.named_buffers())
    with hold(layer):
        other = episode(layer, 3 * batch((4, 3, 4, 2), 2) + 1, query)[1]
    assert not torch.allclose(other, expected)
    assert all(buffer is kept[name] for name, buffer in layer.named_buffers())
    assert layer.context_size == 6
    with situation(layer, part="query"):
        y = layer(query)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), context)[0].any()


def test_two_episodes_of_one_step_have_their_own_gradients_and_no_graph_stays():
    layer = tasknorm()
    pairs = [tuple(batch(seed=s).requires_grad_() for s in seeds) for seeds in ((0, 1), (2, 3))]
    apart = []
    for context, query in pairs:
        apart += torch.autograd.grad((episode(layer, context, query)[1] ** 3).sum(), (context, query))
    both = sum((episode(layer, *pair)[1] ** 3).sum() for pair in pairs)
    torch.testing.assert_close(torch.autograd.grad(both, [x for pair in pairs for x in pair]), tuple(apart))
    after_update(layer, lambda: None, 0.5)
    assert not any(b.requires_grad for b in layer.buffers())


def test_tasknorm_in_other_formats_and_types():
    layer = tasknorm(dtype=torch.float32)
    exact = copy.deepcopy(layer).double()
    far = [(1e4 + batch((6, 3, 8, 8), seed)).float() for seed in (0, 1)]
    small = [batch((6, 3, 8, 8), seed).bfloat16() for seed in (0, 1)]
    for images, allowed in ((far, 0.01), (small, 0.05)):
        images = [x.contiguous(memory_format=torch.channels_last) for x in images]
        found, expected = episode(layer, *images), episode(exact, *(x.double() for x in images))
        for y, z, x in zip(found, expected, images, strict=True):
            assert y.dtype == x.dtype
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert (y.double() - z).abs().max() < allowed
        assert layer.context_mean.dtype == torch.float32


@pytest.mark.parametrize("name", ["sabn", "tasknorm"])
@pytest.mark.parametrize("of_one", [True, False])
def test_nothing_is_made_on_another_device(name, of_one):
    """Forwards on a pretended accelerator, which no one may wait for."""
    with torch._subclasses.FakeTensorMode():
        layer = make_norm(name)(3, device="cuda")
        x = torch.empty(6, 3, 4, 2, device="cuda")
        domain = 1 if of_one else torch.empty(6, dtype=torch.long, device="cuda")
        for mode in (True, False):
            for part in ("context", "query"):
                with situation(layer.train(mode), domain, part):
                    assert layer(x).device.type == "cuda"
        assert all(b.device.type == "cuda" for b in layer.buffers())


@pytest.mark.parametrize("name", ["sabn", "tasknorm"])
def test_a_training_step_runs_on_the_meta_device(name):
    layer = make_norm(name)(3, device="meta")
    x = torch.zeros(4, 3, 2, 2, device="meta", requires_grad=True)
    domain = torch.zeros(4, dtype=torch.long, device="meta")
    for told in (domain, 0):
        with situation(layer, told, "context"):
            first = layer(x)
        with situation(layer, told, "query"):
            (first + layer(x)).sum().backward()
    assert x.grad.device.type == "meta"


@pytest.mark.parametrize(
    "task", ["classification", "architecture_search", "adversarial", "domain_adaptation", "domain_generalization"]
)
def test_tasks_without_episodes_skip_tasknorm_with_the_reason(task):
    chosen, factory = get_task(task), make_norm("tasknorm")
    why = chosen.why_not(factory, factory_info(factory), chosen.options())
    assert why is not None
    assert why.startswith(f"needs context, which {task}")
