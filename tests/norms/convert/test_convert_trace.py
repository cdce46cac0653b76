"""What torch.fx does not record of a forward: refused, and the network left as it was, or done by the new one, too."""

import copy
import random

import numpy as np
import pytest
import torch
import torchvision
from parts.convert_parts import register_own_norms, trained
from torch import nn

from norms.convert import Changed, Left, convert_norms, converted
from norms.registry import make_norm


@pytest.fixture
def own_norms():
    register_own_norms()


class Traced(nn.Module):
    """A forward that has to be rewritten for a norm with an activation, with `body` at its end or around it."""

    def __init__(self, body=lambda net, forward, x: forward(x)):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body, self.calls, self.kept, self.log = body, 0, None, {"calls": []}
        self.register_buffer("mu", torch.full((4,), 2.0))
        self.rng, self.generator = np.random.default_rng(0), torch.Generator()

    def forward(self, x):
        return self.body(self, lambda x: torch.relu(self.part(x)), x)


def under(block, **options):
    def body(net, forward, x):
        with block(**options):
            return forward(x)

    return body


def globally(net, forward, x):
    torch.set_grad_enabled(False)
    return forward(x)


@pytest.mark.parametrize(
    "body",
    [
        under(torch.no_grad),
        under(torch.inference_mode),
        under(torch.set_grad_enabled, mode=False),
        under(torch.autocast, device_type="cpu", dtype=torch.bfloat16),
        under(torch.autocast, device_type="cpu", enabled=False),  # within the caller's own
        globally,
    ],
    ids=["no_grad", "inference_mode", "set_grad_enabled", "autocast", "no_autocast", "globally"],
)
@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad])
def test_a_block_that_a_rewritten_forward_would_lose_is_refused(own_norms, body, caller):
    net = nn.ModuleDict({"a": nn.Sequential(Traced(body))})["a"]
    with caller():
        with pytest.raises(ValueError, match=r"Sequential would lose .*torch\.no_grad, torch\.autocast.*\(in 0"):
            converted(net, make_norm("bn_act"))
        assert torch.is_grad_enabled() is (caller is torch.enable_grad)
        assert type(net[0].part[1]) is nn.BatchNorm2d
        assert converted(net, make_norm("ln"))[0] is net  # the forward stays


def test_a_block_stays_where_the_forward_stays(own_norms):
    net = Traced(lambda net, forward, x: under(torch.no_grad)(net, net.block, x))
    net.block = nn.Sequential(net.part[0], nn.BatchNorm2d(4), nn.ReLU())
    new, audit = converted(net, make_norm("bn_act"))
    assert new is net
    assert len(audit.removed) == 1
    assert not new(torch.randn(2, 3, 4, 4)).requires_grad


def counts(net, forward, x):
    net.calls += 1
    return forward(x) * net.calls


def keeps(net, forward, x):
    net.kept = x
    return forward(x)


def logs(net, forward, x):
    net.log["calls"].append(x)
    return forward(x)


def averages(net, forward, x):
    y = forward(x)
    net.mu.mul_(0.5).add_(y.detach().mean((0, 2, 3)))
    return y


def averages_data(net, forward, x):
    net.mu.data.mul_(0.5)
    return forward(x)


def touches(net, forward, x):
    net.mu.add_(net.calls)  # by nothing this time
    return forward(x)


def assigns(net, forward, x):
    net.mu = net.mu * 2
    return forward(x)


def freezes(net, forward, x):
    net.part[1].eval()
    return forward(x)


def hooks(net, forward, x):
    net.part.register_forward_hook(lambda *args: None)
    return forward(x)


CHANGES = [
    *(
        (counts, "calls"),
        (keeps, "kept"),
        (logs, "log.calls"),
        (averages, "mu"),
        (averages_data, "mu"),
        (touches, "mu"),
    ),
    *((assigns, "mu"), (freezes, r"part\.1\.training"), (hooks, r"part\._forward_hooks\.\d+")),
]


def held(net):
    """Everything that a network holds, as values."""
    tensors = {name: tensor.tolist() for name, tensor in net.state_dict().items()}
    hooks = {path: len(module._forward_hooks) for path, module in net.named_modules()}
    return tensors, net.calls, net.kept, copy.deepcopy(net.log), _modes(net), hooks, set(vars(net))


def _modes(net):
    return [module.training for module in net.modules()]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(("body", "name"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_forward_that_changes_the_network_is_refused_and_the_network_is_as_it_was(own_norms, body, name, mode):
    def in_one_mode(net, forward, x):
        return body(net, forward, x) if net.training is mode or body is freezes else forward(x)

    net = Traced(in_one_mode)
    before = held(net)
    with pytest.raises(ValueError, match=rf"the forward of Traced changes {name}, which .*module of its own"):
        converted(net, make_norm("bn_act"))
    assert held(net) == before
    assert type(net.part[1]) is nn.BatchNorm2d
    copy.deepcopy(net)


def test_the_network_is_as_it_was_when_its_trace_fails(own_norms):
    def fails(net, forward, x):
        averages_data(net, lambda x: x, counts(net, lambda x: x, x))
        torch.rand(1)
        return forward(x) if x.sum() > torch.ones(()) else x

    net = Traced(fails)
    before, state = held(net), torch.get_rng_state()
    with pytest.raises(ValueError, match="control flow"):
        converted(net, make_norm("bn_act"))
    assert held(net) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_that_leaves_no_trace_of_itself_is_converted(own_norms):
    def constant(net, forward, x):
        net.calls, net.log["a"] = 0, float("1.5")  # as it was
        return forward(x) * torch.tensor(3.0 if net.training else 5.0)

    net = trained(Traced(constant))
    net.mu[0], net.log["a"] = float("nan"), 1.5
    expected = copy.deepcopy(net)
    attributes = set(vars(net))
    new, _ = converted(net, make_norm("bn_act"))
    x = torch.randn(4, 3, 5, 5)
    for mode in (True, False):
        assert torch.allclose(new.train(mode)(x), expected.train(mode)(x), atol=1e-5)
    net = Traced(constant)
    net.log["a"] = 1.5
    net.part.append(nn.ReLU())  # the first one counts, so that this forward stays
    assert converted(net, make_norm("bn_act"))[0] is net
    assert set(vars(net)) == attributes


def test_an_update_in_place_that_the_graph_holds_is_done_in_each_forward(own_norms):
    def latest(net, forward, x):
        y = forward(x)
        net.mu.copy_(y.detach().mean((0, 2, 3)))
        return y

    net = trained(Traced(latest))
    expected, before = copy.deepcopy(net), net.mu.clone()
    new, _ = converted(net, make_norm("bn_act"))
    assert isinstance(new, torch.fx.GraphModule)
    assert torch.equal(new.mu, before)
    for mode in (True, False):
        x = torch.randn(4, 3, 5, 5)
        new.train(mode)(x)
        expected.train(mode)(x)
        assert torch.allclose(new.mu, expected.mu, atol=1e-5)
        assert new.mu.unique().numel() > 1


DRAWS = [
    ("torch", lambda net: torch.rand(1).item()),
    ("random.Random", lambda net: random.random()),
    ("RandomState", lambda net: np.random.rand()),
    (r"numpy\.random", lambda net: net.rng.random()),
    ("torch", lambda net: torch.rand(1, generator=net.generator).item()),
]


def states(net):
    return (
        *(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        *(net.rng.bit_generator.state, net.generator.get_state().tolist()),
    )


@pytest.mark.parametrize(("whose", "draw"), DRAWS, ids=["torch", "python", "numpy", "own_numpy", "own_torch"])
def test_random_numbers_that_would_be_frozen_are_refused_and_not_used_up(own_norms, whose, draw):
    def body(net, forward, x):
        return forward(x) if net.training and draw(net) < 0.5 else forward(x) * 2

    net = Traced(body)
    before = states(net)
    with pytest.raises(ValueError, match=rf"the forward of Traced draws random numbers \(.*{whose}.*same ever after"):
        converted(net, make_norm("bn_act"))
    assert states(net) == before


def test_random_numbers_that_depend_on_a_tensor_are_drawn_anew(own_norms):
    def body(net, forward, x):
        y = nn.functional.dropout(net.drop(forward(x)), 0.5, net.training)
        return y + torch.randn_like(y) if net.training else y

    net = Traced(body)
    net.drop = nn.Sequential(nn.Dropout(0.2), torchvision.ops.StochasticDepth(0.5, "row"))
    expected = copy.deepcopy(net)
    new, _ = converted(net, make_norm("bn_act"))
    x = torch.randn(4, 3, 5, 5)
    for seed in (0, 1):
        outputs = []
        for each in (new, expected):
            torch.manual_seed(seed)
            outputs.append(each.train()(x))
        assert torch.allclose(*outputs, atol=1e-5)
    assert torch.equal(new.eval()(x), new(x))


class Unfollowed(nn.Module):
    """What no trace may do, in a module that is kept whole."""

    def __init__(self):
        super().__init__()
        self.calls, self.linear = 0, nn.Linear(5, 5)

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            return self.linear(x) * random.random()


def test_a_module_that_is_kept_whole_does_what_a_trace_would_lose(own_norms):
    net = Traced(lambda net, forward, x: forward(x) + net.other(x).sum())
    net.other = Unfollowed()
    new, _ = converted(net, make_norm("bn_act"))
    assert isinstance(new, torch.fx.GraphModule)
    x = torch.randn(4, 3, 5, 5)
    assert not torch.equal(new.eval()(x), new(x))
    new(x).sum().backward()
    assert (new.other.calls, new.other.linear.weight.grad) == (3, None)


def test_densenets_dropout_is_drawn_anew():
    net = torchvision.models.densenet121(drop_rate=0.5)
    new, _ = converted(net, make_norm("frn"))
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(new.train()(x), new(x))
    assert torch.equal(new.eval()(x), new(x))


# --- norms with a forward of their own, hooks, functions, wrappers ----------------------------------------------------


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.BatchNorm2d):
    """Another class with the same forward."""


def with_its_own():
    norm = nn.GroupNorm(2, 4)
    norm.forward = lambda x: x
    return norm


@pytest.mark.parametrize("name", ["bn", "bn_act", "sees_weight"])
def test_a_norm_with_a_forward_of_its_own_is_left(own_norms, name):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Named(4), Doubled(4), with_its_own(), nn.ReLU())
    left = list(net[2:4])
    new, audit = converted(net, make_norm(name))
    assert [swapped.path for swapped in audit.swapped] == ["1"]
    reason = "has a forward of its own, which would be lost"
    assert audit.left == [Left("2", "Doubled", reason), Left("3", "GroupNorm", reason)]
    assert [new.get_submodule(path) for path in "23"] == left
    assert new(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["bn_act", "sees_weight"])
def test_hooks_do_not_see_the_trace_and_those_that_are_lost_are_named(own_norms, name):
    net, ran = Traced(), []
    for path in ("", "part", "part.0"):
        for kind in ("register_forward_hook", "register_full_backward_hook"):
            getattr(net.get_submodule(path), kind)(lambda module, *args, path=path: ran.append(path))
    new, audit = converted(net, make_norm(name))
    assert ran == []
    assert audit.unhooked == ["", "part"]
    new(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert ran == ["part.0", "part.0"]

    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    net.register_forward_hook(lambda *args: ran.append("kept"))
    net[1].register_forward_hook(lambda *args: None)
    new, audit = converted(net, make_norm("bn_act"))
    assert (new is net, audit.unhooked) == (True, ["1"])  # of the activation that the norm brings
    new(torch.randn(2, 4, 3, 3))
    assert ran[2:] == ["kept"]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.used = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        n = self.used
        x = torch.relu(self.norm(self.conv(x)))
        x = nn.functional.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, self.training)
        return nn.functional.group_norm(x, 2)


@pytest.mark.parametrize("name", ["bn_act", "sees_weight", "doubles"])
def test_what_normalizes_by_a_function_is_left(own_norms, name):
    net = nn.Sequential(Functional())
    expected = copy.deepcopy(net)
    new, audit = converted(net, make_norm(name))
    assert [swapped.path for swapped in audit.swapped] == ["0.norm"]
    assert [(left.path, left.old) for left in audit.left] == [
        *(("0", "batch_norm"), ("0", "group_norm"), ("0.used", "BatchNorm2d"))
    ]
    assert "never called as a module" in audit.left[-1].why
    assert not audit.complete
    x = torch.randn(4, 3, 5, 5)
    if name == "bn_act":
        assert torch.allclose(new(x), expected(x), atol=1e-5)
        torch.testing.assert_close(new.get_buffer("0.used.running_mean"), expected[0].used.running_mean)
    assert new.state_dict().keys() >= {"0.used.weight", "0.used.num_batches_tracked"}


def test_a_norm_that_is_not_called_is_left_where_the_forward_stays(own_norms):
    class Stays(Functional):
        def forward(self, x):
            return nn.functional.batch_norm(self.conv(x), self.used.running_mean, self.used.running_var)

    net = Stays()
    new, audit = converted(net, make_norm("bn_act"))
    assert new is net
    assert audit.swapped == []
    assert [left.path for left in audit.left] == ["", "norm", "used"]
    assert all("never called" in left.why for left in audit.left[1:])
    new(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_a_wrapped_network_is_refused_where_its_forward_must_be_read_and_else_converted(own_norms, wrap):
    x = torch.randn(2, 3, 4, 4)
    net = nn.Sequential(wrap(Traced()))
    net(x)
    with pytest.raises(
        ValueError, match=r"^0 is wrapped in (DataParallel|OptimizedModule).*convert the module inside and wrap"
    ):
        converted(net, make_norm("bn_act"))
    assert converted(net, make_norm("ln"))[0] is net
    inside = copy.deepcopy(net[0].module if isinstance(net[0], nn.DataParallel) else net[0]._orig_mod)
    assert type(inside.part[1]).__name__ == "LayerNorm"
    assert torch.allclose(net(x), inside(x), atol=1e-6)


def test_a_distributed_network_is_refused_for_every_norm():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)  # its own needs a group of processes
    wrapper.module = nn.Sequential(nn.BatchNorm2d(4))
    net = nn.Sequential(wrapper)
    with pytest.raises(ValueError, match=r"0 is a DistributedDataParallel, which .*convert the module inside and wrap"):
        convert_norms(net, make_norm("ln"))


def test_running_statistics_of_an_instance_norm_that_are_gone_are_named():
    tracked = nn.InstanceNorm2d(4, track_running_stats=True)
    net = nn.Sequential(tracked, nn.InstanceNorm2d(4))
    assert [changed for changed in convert_norms(net, make_norm("in")).changed if "running" in changed.what] == [
        Changed("0", "evaluates as it trains; the old norm evaluated with running statistics, which are gone")
    ]
