"""Modules that are kept whole while a network is traced: what the forward around them sees of their results."""

import copy
import pickle
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torchvision
from parts.convert_parts import register_own_norms, trained
from torch import nn
from torch.nn import functional as F

from norms.convert import converted
from norms.convert.modes import GraphOfEachMode
from norms.convert.trace import Untraceable
from norms.registry import make_norm


@pytest.fixture(autouse=True)
def own_norms():
    register_own_norms()


class Around(nn.Module):
    """A forward that has to be rewritten, and goes on with what a module without convolutions and norms returns."""

    def __init__(self, whole, use):
        super().__init__()
        self.part, self.whole, self.use = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), whole, use

    def forward(self, x):
        return self.use(self.whole, torch.relu(self.part(x)))


class Whole(nn.Module):
    """Kept whole: `function` of the input and whether the module trains."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 6)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Scales(NamedTuple):
    fine: torch.Tensor
    coarse: torch.Tensor


@dataclass
class Holder:
    fine: torch.Tensor


def pool(x):
    return F.max_pool2d(x, 2)


def summed(whole, x):
    return sum(y.mean() for y in whole(x))


def by_name(whole, x):
    maps = whole(x)
    return {f"{name}_{i}": y for i, (name, y) in enumerate(maps.items())}, next(iter(maps)) == "fine", len(maps)


def one_or_all(whole, x):
    y = whole(x)
    return sum(part.mean() for part in y) if isinstance(y, tuple | list) else y.mean()


def grows(whole, x):
    maps, names = [x], ["fine"]
    whole(maps, names)
    return OrderedDict(zip(names, maps, strict=True))


def replaced(whole, x):
    maps = {"fine": x}
    whole(maps)
    return maps["fine"] + maps["coarse"]


def extended(whole, x):
    return [y * 2 for y in whole([x, x + 1], ["a"])[0]]


def append_coarse(module, maps, names):
    maps.append(pool(maps[-1]))
    names.append("coarse")


def update(module, maps):
    maps.update(fine=module.linear(maps["fine"]), coarse=maps["fine"].mean())


def auxiliary(whole, x):
    y = whole(x)
    return x if y is None else x + y


CASES = {
    "list": (lambda m, x: [pool(x), m.linear(x)], summed),
    "tuple": (lambda m, x: (pool(x), x), one_or_all),
    "tensor": (lambda m, x: m.linear(x), one_or_all),
    "named_tuple": (lambda m, x: Scales(x, pool(x)), lambda whole, x: whole(x)._replace(fine=x)),
    "named_tuple_iterated": (lambda m, x: Scales(x, pool(x)), summed),
    "dict": (lambda m, x: {"fine": x, "coarse": pool(x)}, by_name),
    "ordered_dict": (lambda m, x: OrderedDict(fine=x, coarse=pool(x)), by_name),
    "ordered_dict_returned": (lambda m, x: OrderedDict(fine=x, coarse=pool(x)), lambda whole, x: whole(x)),
    "nested": (
        lambda m, x: {"a": [x, (pool(x), None)]},
        lambda whole, x: [y for y in whole(x)["a"][1] if y is not None],
    ),
    "one_or_two_by_mode": (lambda m, x: [x] if m.training else [x, pool(x)], summed),
    "none_in_evaluation": (lambda m, x: m.linear(x) if m.training else None, auxiliary),
    "none": (lambda m, x: None, auxiliary),
    "names": (lambda m, x: (["fine", "coarse"], [x, pool(x)]), lambda whole, x: dict(zip(*whole(x), strict=True))),
    "lists_in_place": (append_coarse, grows),
    "dict_in_place": (update, replaced),
    "generator": (lambda m, x: (f(x) for f in (pool, m.linear)), summed),
    "values": (lambda m, x: {"a": x}.values(), summed),
    "object": (lambda m, x: Holder(m.linear(x)), lambda whole, x: whole(x).fine),
    "takes_object": (lambda m, held: held.fine + 1, lambda whole, x: whole(Holder(x))),
    "takes_function": (lambda m, x, f: f(x), lambda whole, x: whole(x, pool)),
    "takes_lists": (lambda m, maps, names: (maps, names), extended),
    "shares_its_weight": (lambda m, x: [m.linear(x)], lambda whole, x: whole(x)[0] + whole.linear.weight.sum()),
}


@dataclass
class Case:
    """The function of a case, by name, so that it can be pickled."""

    name: str

    def __call__(self, *inputs):
        return CASES[self.name][0](*inputs)


def alike(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert type(one) is type(other)


@pytest.mark.parametrize("case", CASES)
def test_a_forward_goes_on_with_what_a_module_that_is_kept_whole_returns(case):
    net = trained(Around(Whole(Case(case)), CASES[case][1]))
    expected = copy.deepcopy(net)
    new, audit = converted(net, make_norm("bn_act"))
    assert len(audit.removed) == 1
    assert isinstance(new, torch.fx.GraphModule)
    x = torch.randn(4, 3, 6, 6)
    for each in (new, copy.deepcopy(new)):
        reference = copy.deepcopy(expected)
        for mode in (True, False, True):
            alike(each.train(mode)(x), reference.train(mode)(x))
    assert isinstance(new, GraphOfEachMode) is (case in ("one_or_two_by_mode", "none_in_evaluation"))


@pytest.mark.parametrize("case", ["list", "named_tuple", "ordered_dict", "ordered_dict_returned", "lists_in_place"])
def test_the_result_is_the_same_after_pickling(case):
    new, _ = converted(Around(Whole(Case(case)), CASES[case][1]), make_norm("frn"))
    x = torch.randn(4, 3, 6, 6)
    alike(pickle.loads(pickle.dumps(new))(x), new(x))  # noqa: S301


def of_torch(module, use):
    return pytest.param(module, use, id=type(module).__name__)


@pytest.mark.parametrize(
    ("module", "use"),
    [
        of_torch(nn.MaxPool2d(2, return_indices=True), lambda whole, x: [y.float() for y in whole(x)]),
        of_torch(nn.LSTM(6, 3, batch_first=True), lambda whole, x: list(whole(x[:, 0]))[1][0]),
        of_torch(nn.GRU(6, 3), lambda whole, x: one_or_all(whole, x[:, 0])),
        of_torch(
            nn.MultiheadAttention(6, 2),
            lambda whole, x: [y for y in whole(x[:, 0], x[:, 0], x[:, 0], need_weights=False) if y is not None],
        ),
    ],
)
def test_modules_of_torch_with_several_results_are_told_apart_from_tensors(module, use):
    net = trained(Around(module, use))
    expected = copy.deepcopy(net)
    new, _ = converted(net, make_norm("bn_act"))
    x = torch.randn(4, 3, 6, 6)
    alike(new.eval()(x), expected.eval()(x))


class OwnWay(nn.Module):
    """Returns a dict, and does what no trace may do: it counts, averages, draws, and works under no_grad."""

    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []
        self.register_buffer("mean", torch.zeros(4))
        self.centers = torch.zeros(4)

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        self.centers.add_(1)
        with torch.no_grad():
            return {"fine": x * random.random(), "coarse": pool(x) + torch.rand(1)}


def test_what_a_module_does_while_its_call_is_tried_is_undone_and_stays_its_own():
    net = Around(OwnWay(), lambda whole, x: list(whole(x).values()))
    before, states = copy.deepcopy(net.whole.state_dict()), (torch.get_rng_state(), random.getstate())
    new, _ = converted(net, make_norm("bn_act"))
    whole = new.whole
    assert (whole.calls, whole.log, whole.centers.tolist()) == (0, [], [0] * 4)
    assert all(torch.equal(t, before[name]) for name, t in whole.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    x = torch.randn(4, 3, 6, 6)
    one, other = new.eval()(x), new(x)
    assert not any(torch.equal(a, b) or a.requires_grad for a, b in zip(one, other, strict=True))
    assert (whole.calls, whole.log, whole.centers.tolist()) == (2, [1, 2], [2] * 4)
    assert whole.mean.abs().sum() > 0


def test_a_module_that_changes_its_arguments_and_draws_is_refused():
    def body(module, maps, names):
        append_coarse(module, maps, names)
        maps[0] = maps[0] * random.random()

    net = Around(Whole(body), grows)
    state = random.getstate()
    with pytest.raises(Untraceable, match=r"draws random numbers \(random\.Random\)"):
        converted(net, make_norm("bn_act"))
    assert random.getstate() == state
    assert isinstance(net.part[1], nn.BatchNorm2d)


def test_what_depends_on_the_mode_inside_a_module_makes_no_second_graph():
    drops = nn.Sequential(
        torchvision.ops.StochasticDepth(0.5, "row"), Whole(lambda m, x: F.dropout(x, 0.5, m.training))
    )
    net = Around(Whole(lambda m, x: [m.drops(x), torch.tensor(2.0) if m.training else x]), lambda whole, x: whole(x)[0])
    net.whole.drops = drops
    new, _ = converted(net, make_norm("bn_act"))
    assert not isinstance(new, GraphOfEachMode)
    assert not [name for name, _ in new.named_buffers() if "constant" in name]
    x = torch.randn(4, 3, 6, 6)
    assert not torch.equal(new.train()(x), new(x))
    assert torch.equal(new.eval()(x), new(x))


def test_a_number_that_a_module_returns_is_not_frozen():
    net = Around(Whole(lambda m, x: m.scale), lambda whole, x: x * whole(x))
    net.whole.scale = 2.0
    new, _ = converted(net, make_norm("bn_act"))
    x = torch.randn(4, 3, 6, 6)
    y = new.eval()(x)
    new.whole.scale = 6.0
    torch.testing.assert_close(new(x), 3 * y)


def test_a_forward_that_was_set_on_the_network_is_not_replaced_by_that_of_its_class():
    net = Around(Whole(lambda m, x: x), lambda whole, x: whole(x))
    plain = net.forward
    net.forward = lambda x: plain(x) * 2
    x = torch.randn(4, 3, 6, 6)
    expected = net.eval()(x)
    with pytest.raises(Untraceable, match="Around has a forward that was set on it"):
        converted(net, make_norm("bn_act"))
    torch.testing.assert_close(converted(net, make_norm("bn"))[0](x), expected)


def test_a_rewritten_network_keeps_the_numbers_and_text_that_others_read():
    net = Around(Whole(lambda m, x: x), lambda whole, x: whole(x))
    net.out_channels, net.part.kind, net.sizes = 4, "stem", {"a": [1, (2, None)]}
    net.helper = nn.ReLU().forward  # no number: it would be the old network's
    new, _ = converted(net, make_norm("bn_act"))
    for each in (new, copy.deepcopy(new), copy.deepcopy(copy.deepcopy(new))):
        assert (each.out_channels, each.part.kind, each.sizes) == (4, "stem", {"a": [1, (2, None)]})
        assert not hasattr(each, "helper")
