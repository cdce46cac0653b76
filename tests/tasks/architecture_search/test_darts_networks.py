"""The DARTS space: published parameter counts, operations against literal ones, drop-path, the auxiliary head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from norms import registry
from norms.protocol import norm_modules
from norms.registry import make_norm, norm_names, norm_option_defaults
from tasks.architecture_search.genotype import CHOICES, EDGES, OPERATIONS, PUBLISHED, Genotype
from tasks.architecture_search.networks import (
    AuxiliaryHead,
    DerivedNetwork,
    SearchNetwork,
    check_size,
    drop_path_factors,
    places,
)
from tasks.architecture_search.operations import FactorizedReduce, MixedOperation, ReLUConvNorm, operation
from tasks.nets.blocks import ConvNormAct

OPTIONS = {n: {"num_groups": 2} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
FACTS = {"in_channels": 3, "num_classes": 10}


def factory(name="bn"):
    return make_norm(name, **OPTIONS.get(name, {}))


def generator(purpose):
    return torch.Generator().manual_seed(sum(purpose.encode()))


def derived(genotype="DARTS_V2", channels=2, cells=3, norm="bn", **options):
    return DerivedNetwork(PUBLISHED[genotype], channels, cells, norm=factory(norm), **(FACTS | options))


# Published sizes


def test_the_search_network_has_the_published_number_of_parameters():
    net = SearchNetwork(16, 8, norm=make_norm("bn"), device="meta", **FACTS)
    assert sum(p.numel() for p in net.body.parameters()) == 1_930_618
    assert sum(p.numel() for p in net.architecture.parameters()) == 2 * 14 * 8


def test_darts_v2_has_the_published_number_of_parameters():
    plain = derived("DARTS_V2", 36, 20, device="meta")
    assert sum(p.numel() for p in plain.parameters()) == 3_349_342
    with_head = derived("DARTS_V2", 36, 20, auxiliary=True, device="meta")
    assert with_head.parameters_without_auxiliary() == 3_349_342
    head = 576 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert sum(p.numel() for p in with_head.parameters()) == 3_349_342 + head


def test_reduction_cells_stand_at_one_and_two_thirds():
    row = places(16, 20)
    assert [i for i, place in enumerate(row) if place.reduction] == [6, 13]
    assert [row[i].channels for i in (0, 6, 13, 19)] == [16, 32, 64, 64]
    assert [row[0].before_last, row[0].last, row[1].last, row[7].last] == [48, 48, 64, 128]


@pytest.mark.parametrize(("channels", "cells", "message"), [(0, 8, "0 channels"), (4, 2, "2 cells: at least 3")])
def test_what_the_space_can_not_build_is_refused(channels, cells, message):
    with pytest.raises(ValueError, match=message):
        places(channels, cells)


@pytest.mark.parametrize(
    ("shape", "auxiliary", "message"),
    [((3, 30, 32), False, "30x32: two reduction cells"), ((3, 28, 28), True, "auxiliary head needs sides of 32")],
)
def test_images_of_a_size_that_can_not_be_served_are_refused(shape, auxiliary, message):
    with pytest.raises(ValueError, match=message):
        check_size(shape, auxiliary)
    check_size((3, 32, 32), True)
    check_size((1, 28, 28), False)


# Operations


def conv(x, weight, **options):
    return F.conv2d(x, weight, None, **options)


def norm_of(x, affine=None):
    y = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y if affine is None else y * affine.weight.view(-1, 1, 1) + affine.bias.view(-1, 1, 1)


def literal(name, module, x, stride, affine):
    """The operation written out from the paper's appendix, with the module's own parameters."""
    size = int(name[-1]) if name != "skip_connect" else 0
    norms = [n if affine else None for _, n in norm_modules(module)]
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    if name.endswith("pool_3x3"):
        if name.startswith("max"):
            y = F.max_pool2d(x, 3, stride, 1)
        else:
            total = F.conv2d(x.flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3).to(x), None, stride, 1)
            count = F.conv2d(torch.ones_like(x).flatten(0, 1)[:, None], torch.ones(1, 1, 3, 3).to(x), None, stride, 1)
            y = (total / count).view(*x.shape[:2], *total.shape[2:])
        return y if affine else norm_of(y)
    if name == "skip_connect":
        if stride == 1:
            return x
        (weight,) = weights
        half = len(weight) // 2
        z = x.relu()
        both = [conv(z, weight[:half], stride=2), conv(z[:, :, 1:, 1:], weight[half:], stride=2)]
        return norm_of(torch.cat(both, 1), norms[0])
    channels = x.shape[1]
    if name.startswith("dil"):
        y = conv(x.relu(), weights[0], stride=stride, padding=size - 1, dilation=2, groups=channels)
        return norm_of(conv(y, weights[1]), norms[0])
    y = conv(x.relu(), weights[0], stride=stride, padding=size // 2, groups=channels)
    y = norm_of(conv(y, weights[1]), norms[0])
    y = conv(y.relu(), weights[2], padding=size // 2, groups=channels)
    return norm_of(conv(y, weights[3]), norms[1])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", CHOICES)
def test_every_operation_is_the_literal_one(name, stride, affine):
    module = operation(name, 4, stride, norm=make_norm("bn"), affine=affine).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), literal(name, module, x, stride, affine), rtol=1e-9, atol=1e-9)
    assert all((n.weight is not None) == affine for _, n in norm_modules(module))
    assert not any(m.bias is not None for m in module.modules() if isinstance(m, nn.Conv2d))


def test_the_two_inputs_of_a_cell_are_brought_to_one_size():
    x = torch.randn(2, 6, 8, 8)
    one = ReLUConvNorm(6, 4, norm=make_norm("bn"), affine=False)
    torch.testing.assert_close(one(x), norm_of(conv(x.relu(), one[1].conv.weight)))
    assert FactorizedReduce(6, 5, norm=make_norm("bn"), affine=False)(x).shape == (2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"must be even; given \(2, 6, 7, 7\)"):
        FactorizedReduce(6, 4, norm=make_norm("bn"), affine=False)(x[:, :, :7, :7])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mixture_is_the_weighted_sum(stride):
    mixed = MixedOperation(4, stride, norm=make_norm("bn")).double()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    weights = torch.rand(len(OPERATIONS), dtype=torch.float64)
    expected = 0
    for index, name in enumerate(CHOICES):
        whole = (
            nn.Sequential(nn.ReLU(), mixed.candidates[index]) if mixed.takes_relu[index] else mixed.candidates[index]
        )
        expected = expected + weights[index + 1] * literal(name, whole, x, stride, False)
    torch.testing.assert_close(mixed(x, x.relu(), weights.unbind()), expected, rtol=1e-9, atol=1e-9)


def test_a_norm_that_sees_the_convolution_gets_the_weight_of_both_halves():
    seen = []

    @registry.register(name="sees", source="test", mixes_samples=False, keeps_stats=False, needs={"conv_weight"})
    class Sees(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

        def forward(self, x, weight):
            seen.append((x.shape[1], tuple(weight.shape)))
            return x

    FactorizedReduce(6, 4, norm=make_norm("sees"), affine=False)(torch.randn(2, 6, 8, 8))
    assert seen == [(4, (4, 6, 1, 1))]


# Networks


@pytest.mark.parametrize("name", norm_names(without=["domain", "context", "conv_weight"]))
def test_every_norm_searches_without_affine_and_retrains_with_its_own(name):
    net = SearchNetwork(4, 3, norm=factory(name), generator=generator, **FACTS)
    out = net(torch.randn(2, 3, 16, 16))
    assert out.shape == (2, 10)
    # a norm may learn more than its affine, as sn's weights of its statistics
    own = [{n for n, _ in factory(name)(4, affine=affine).named_parameters()} for affine in (False, True)]
    assert own[1] - own[0] == {"weight", "bias"}
    for path, norm in norm_modules(net.body):
        assert {n for n, _ in norm.named_parameters()} == own[path == "stem.norm"]
    assert derived(norm=name, channels=4)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_search_norms_have_no_affine_but_the_stems():
    net = SearchNetwork(4, 3, norm=make_norm("bn"), **FACTS)
    with_affine = [name for name, norm in norm_modules(net) if norm.weight is not None]
    assert with_affine == ["body.stem.norm"]
    pooled = [m for m in net.modules() if isinstance(m, nn.Sequential) and isinstance(m[0], nn.MaxPool2d)]
    assert len(pooled) == 3 * EDGES
    assert all(hasattr(m[1], "norm_info") for m in pooled)


def test_weights_are_drawn_by_name_and_the_architecture_near_zero():
    one, two = (SearchNetwork(4, 3, norm=factory(n), generator=generator, **FACTS) for n in ("bn", "pn"))
    weights = {n: p for n, p in one.named_parameters() if n.endswith("conv.weight")}
    assert len(weights) > 100
    other = dict(two.named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in weights.items())
    assert torch.equal(one.architecture.normal, two.architecture.normal)
    assert 0.0005 < one.architecture.normal.std() < 0.002
    assert not torch.equal(one.architecture.normal, one.architecture.reduce)


def test_building_does_not_move_the_global_generator():
    before = torch.get_rng_state()
    SearchNetwork(2, 3, norm=factory(), generator=generator, **FACTS)
    derived(generator=generator, auxiliary=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_derived_cell_sums_the_two_operations_that_each_node_names():
    net = derived(channels=4).double()
    cell = net.cells[0]
    x = torch.randn(3, 12, 8, 8, dtype=torch.float64)
    states = [cell.preprocess0(x), cell.preprocess1(x)]
    genes = PUBLISHED["DARTS_V2"].normal
    for node in range(4):
        pair = [
            literal(genes[i][0], cell.operations[i], states[genes[i][1]], 1, True) for i in (2 * node, 2 * node + 1)
        ]
        states.append(pair[0] + pair[1])
    torch.testing.assert_close(cell(x, x), torch.cat(states[2:], 1), rtol=1e-9, atol=1e-9)


def test_no_activation_follows_a_norm_directly_but_in_the_auxiliary_head():
    net = derived(auxiliary=True)
    pairs = [(name, m.activation) for name, m in net.named_modules() if isinstance(m, ConvNormAct)]
    assert {name for name, activation in pairs if activation is not None} == {"auxiliary.first", "auxiliary.second"}


# Drop-path and the auxiliary head


def test_drop_path_factors_have_mean_one_and_the_given_zeros():
    factors = drop_path_factors(50, 400, 0.25, torch.Generator().manual_seed(0))
    assert factors.shape == (50, 400, 1, 1, 1)
    assert factors.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (factors == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(drop_path_factors(3, 2, 0.0, torch.Generator()), torch.ones(3, 2, 1, 1, 1))


def test_drop_path_spares_identities_only():
    net = derived("DARTS_V1", cells=4).eval()
    genes = PUBLISHED["DARTS_V1"]
    normal = sum(name != "skip_connect" for name, _ in genes.normal)
    # in a reduction cell a skip connection on a cell's input halves it and is no identity
    reduce = sum(name != "skip_connect" or state < 2 for name, state in genes.reduce)
    assert net.num_paths == 2 * normal + 2 * reduce
    x = torch.randn(2, 3, 16, 16)
    kept = net.logits(x, torch.ones(net.num_paths, 2, 1, 1, 1))[0]
    torch.testing.assert_close(kept, net(x))
    # every path dropped for the second image: its logits are those of the identities' maps alone, the first's stay
    keep = torch.ones(net.num_paths, 2, 1, 1, 1)
    keep[:, 1] = 0
    dropped = net.logits(x, keep)[0]
    torch.testing.assert_close(dropped[0], kept[0])
    assert not torch.allclose(dropped[1], kept[1])


def test_the_auxiliary_head_speaks_in_training_only_and_sees_two_thirds():
    net = derived(auxiliary=True, cells=6, norm="gn", channels=4)
    x = torch.randn(2, 3, 32, 32)
    main, extra = net.logits(x)
    assert main.shape == extra.shape == (2, 10)
    states = [net.stem(x)] * 2
    for cell in net.cells[:5]:
        states.append(cell(states[-2], states[-1]))
    torch.testing.assert_close(extra, net.auxiliary(states[-1]))
    assert len(net.eval().logits(x)) == 1
    assert len(derived().logits(x)) == 1


def test_the_auxiliary_head_is_the_published_one_on_8x8_maps():
    head = AuxiliaryHead(6, 10, norm=make_norm("bn"), device=None).double()
    x = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    y = F.avg_pool2d(x.relu(), 5, 3)
    assert y.shape[2:] == (2, 2)
    y = norm_of(conv(y, head.first.conv.weight)).relu()
    y = norm_of(conv(y, head.second.conv.weight)).relu()
    assert y.shape == (3, 768, 1, 1)
    torch.testing.assert_close(head(x), head.head(y.flatten(1)))
    assert head(torch.randn(2, 6, 16, 16, dtype=torch.float64)).shape == (2, 10)


def test_any_genotype_trains_on_the_meta_device():
    genes = tuple((CHOICES[i % 7], i % 2) for i in range(8))
    net = DerivedNetwork(Genotype(normal=genes, reduce=genes), 4, 5, norm=factory(), device="meta", **FACTS)
    logits = net(torch.empty(2, 3, 32, 32, device="meta"))
    logits.sum().backward()
    assert all(p.grad.is_meta for p in net.parameters())
