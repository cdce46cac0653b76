"""What a training loop says to a network: told to every norm, for the length of a block, whatever happens inside."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from norms import registry
from norms.protocol import Situation, norm_modules
from norms.registry import make_norm, norm_names, register
from norms.running import recalibrate
from norms.situation import after_update, hold, predict, situation


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """Norms that show what they were told; forgotten after the test."""
    norm_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Fake(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.register_buffer("mean", torch.zeros(num_channels))
            self.register_buffer("nothing", None)
            self.extra = {"calls": 0}
            self.told = []

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

        def forward(self, x, *, shift=0):
            self.told.append(replace(self.situation, domain=copy.copy(self.situation.domain)))
            mean = x.mean(dim=(0, 2, 3))
            if self.training:
                self.mean.lerp_(mean.detach(), 0.25)
                self.extra["calls"] += 1
            return x - (mean if self.training else self.mean).view(-1, 1, 1) + shift

    @register(name="fake", source="test", mixes_samples=True, keeps_stats=True)
    class Batch(Fake):
        pass

    @register(name="looks", source="test", mixes_samples=True, keeps_stats=True, needs={"second_look"})
    class Looks(Fake):
        progress = None

        def after_update(self, progress):
            self.progress = progress

    @register(name="alone", source="test", mixes_samples=False, keeps_stats=False)
    class Alone(Fake):
        pass


def a_net(*names):
    return nn.Sequential(*(make_norm(name)(3) for name in names))


def a_batch(n=4):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))


# --- situation --------------------------------------------------------------------------------------------------------


def test_every_norm_is_told_within_the_block_only():
    net = a_net("fake", "bn", "alone")
    with situation(net, domain=1, part="query", slices=2):
        assert {norm.situation for _, norm in norm_modules(net)} == {Situation(1, "query", 2)}
    assert {norm.situation for _, norm in norm_modules(net)} == {Situation()}


def test_nested_blocks_give_back_what_was_told_before():
    net = a_net("fake")
    with situation(net, domain=1, slices=2):
        with situation(net, domain=2):
            assert net[0].situation == Situation(2)
            net(a_batch(3))  # the outer slices do not count here
        assert net[0].situation == Situation(1, slices=2)
        with situation(net, slices=4):
            net(a_batch())
        assert len(net[0].told) == 1 + 4
        net(a_batch())
        assert len(net[0].told) == 1 + 4 + 2
    assert net[0].situation == Situation()
    net(a_batch(3))


def test_an_exception_inside_leaves_nothing_behind():
    net = a_net("fake", "bn")
    with pytest.raises(RuntimeError, match="mid"), situation(net, domain=1, slices=2):
        raise RuntimeError("mid")
    with pytest.raises(ValueError, match="does not split"), situation(net, slices=3):
        net(a_batch(4))
    assert {norm.situation for _, norm in norm_modules(net)} == {Situation()}
    assert "forward" not in net[0].__dict__
    net(a_batch(3))


@pytest.mark.parametrize(
    ("told", "message"),
    [({"part": "support"}, "part .support. is unknown; allowed: context, query"), ({"slices": 0}, "at least 1")],
)
def test_a_wrong_situation_is_refused(told, message):
    with pytest.raises(ValueError, match=message), situation(a_net("bn"), **told):
        pass


def test_a_batch_that_slices_do_not_divide_is_refused():
    for name in ("fake", "bn"):
        with pytest.raises(ValueError, match="batch of 4"), situation(net := a_net(name), slices=3):
            net(a_batch(4))


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_slice_by_slice_is_the_literal_loop(slices):
    net = a_net("fake", "fake")
    literal = copy.deepcopy(net)
    x, z = a_batch(6).requires_grad_(), a_batch(6).requires_grad_()
    with situation(net, slices=slices):
        y = net(x)
    # one norm after the other, as the layers of a network see a batch
    expected = z
    for norm in literal:
        parts = [norm(expected[k::slices]) for k in range(slices)]
        expected = torch.stack([parts[i % slices][i // slices] for i in range(6)])
    assert torch.equal(y, expected)
    for one, two in zip(net.buffers(), literal.buffers(), strict=True):
        assert torch.equal(one, two)
    weight = torch.arange(y.numel()).view(y.shape).float()
    grads = torch.autograd.grad((y * weight).sum(), x) + torch.autograd.grad((expected * weight).sum(), z)
    assert torch.equal(*grads)


def test_each_slice_is_told_its_own_domains_and_inputs_are_passed_on():
    net = a_net("fake")
    with situation(net, domain=torch.tensor([0, 1, 2, 3]), slices=2):
        y = net[0](a_batch(), shift=5)
    assert [t.domain.tolist() for t in net[0].told] == [[0, 2], [1, 3]]
    assert {t.slices for t in net[0].told} == {1}
    assert y.mean().item() == pytest.approx(5)


def test_the_mode_is_read_when_the_norm_is_called():
    net = a_net("fake").eval()
    with situation(net, slices=2):
        net(a_batch())
        assert len(net[0].told) == 1  # nothing mixes in evaluation
        net.train()
        net(a_batch())
        assert len(net[0].told) == 1 + 2


def test_norms_that_do_not_mix_samples_run_whole():
    net = a_net("alone")
    with situation(net, slices=2):
        net(a_batch())
    assert len(net[0].told) == 1


def test_a_copy_keeps_what_it_was_told_and_never_calls_the_original():
    net = a_net("fake")
    with situation(net, slices=2):
        inside = copy.deepcopy(net)
    copy.deepcopy(net)(a_batch(3))
    inside(a_batch())
    assert len(inside[0].told) == 2
    assert net[0].told == []


# --- hold -------------------------------------------------------------------------------------------------------------


def kept(net):
    return [(id(b), b.clone()) for b in net.buffers()], copy.deepcopy(net[0].extra)


def assert_kept(net, before):
    assert [id(b) for b in net.buffers()] == [i for i, _ in before[0]]
    assert all(torch.equal(b, value) for b, (_, value) in zip(net.buffers(), before[0], strict=True))
    assert net[0].extra == before[1]


@pytest.mark.parametrize("name", ["fake", "bn"])
def test_hold_gives_the_modes_output_and_keeps_everything(name):
    net = a_net("fake", name)
    net(a_batch() + 1)
    for mode in (True, False):
        net.train(mode)
        expected = copy.deepcopy(net)(a_batch())
        before = kept(net)
        with hold(net):
            assert torch.equal(net(a_batch()), expected)
            net(a_batch() + 9)
        assert_kept(net, before)


def test_hold_nests_and_survives_exceptions():
    net = a_net("fake", "bn")
    before = kept(net)

    def fail_inside():
        with hold(net):
            net(a_batch())
            inner = kept(net)
            with hold(net):
                net(a_batch())
            assert_kept(net, inner)
            net[0].register_buffer("made_inside", torch.zeros(1))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_inside()
    assert_kept(net, before)


def test_parameters_are_not_held():
    net = a_net("bn")
    with hold(net), torch.no_grad():
        net[0].weight.fill_(3)
    assert net[0].weight.eq(3).all()


def test_gradients_flow_out_of_hold():
    net = a_net("bn")
    x = a_batch().requires_grad_()
    with hold(net):
        y = net(x)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0


# --- after_update and predict -----------------------------------------------------------------------------------------


def test_a_second_look_is_taken_only_by_norms_that_ask_for_it():
    calls = []
    after_update(a_net("fake", "bn"), lambda: calls.append(1), 0.5)
    assert calls == []


def test_a_second_look_moves_only_the_norm_that_asked():
    net = nn.Sequential(make_norm("fake")(3), make_norm("looks")(3), nn.Dropout(0.5))
    net(a_batch())
    before, held = net[1].mean.clone(), kept(net[:1])
    generator = torch.get_rng_state()
    seen = []

    def again():
        with situation(net, domain=1, slices=2):  # as the step's own forward
            seen.append(net(a_batch() + 1))

    after_update(net, again, 0.25)
    assert net[1].progress == 0.25
    assert len(seen) == 1
    assert not seen[0].requires_grad
    assert [t.again for t in net[1].told] == [False, True, True]
    assert [t.again for t in net[0].told] == [False, False, False]
    assert not torch.equal(net[1].mean, before)
    assert_kept(net[:1], held)
    assert net[1].situation == Situation()
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_second_look_that_fails_leaves_nothing_behind():
    net = a_net("looks", "bn")

    def again():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        after_update(net, again, 1.0)
    assert net[0].situation == Situation()


def test_predict_is_the_evaluation_forward():
    net = a_net("bn")
    with pytest.raises(ValueError, match="evaluation mode"):
        predict(net, a_batch())
    assert torch.equal(predict(net.eval(), a_batch()), net(a_batch()))


@pytest.mark.parametrize("name", ["bn", "mbn", "cbn", "brn", "mabn", "online", "dsbn"])
def test_every_forward_inside_hold_starts_from_the_same_state(name):
    """Else the steps of an attack would enter each other's statistics."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, bias=False, dtype=torch.float64)
    norm = make_norm(name)(4, dtype=torch.float64)

    def forward(x):
        weight = norm.transform_weight(conv.weight) if hasattr(norm, "transform_weight") else conv.weight
        y = torch.nn.functional.conv2d(x, weight)
        with situation(norm, domain=0):
            return norm(y, weight=weight) if "conv_weight" in norm.norm_info.needs else norm(y)

    for i in range(12):
        forward(torch.randn(8, 3, 5, 5, dtype=torch.float64))
        after_update(norm, lambda: forward(torch.randn(8, 3, 5, 5, dtype=torch.float64)), (i + 1) / 12)
    x, other = torch.randn(2, 8, 3, 5, 5, dtype=torch.float64)
    with hold(norm):
        first, _, again = forward(x), forward(other + 3), forward(x)
        twin = copy.deepcopy(norm)
    assert torch.equal(first, again)
    # a copy made inside the block is not held, and the layer itself no longer
    for layer in (twin, norm):
        before = [b.clone() for b in layer.buffers()]
        with situation(layer, domain=0):
            layer(first, **({"weight": conv.weight} if name == "mabn" else {})) if name != "cbn" else None
        if name != "cbn":
            assert any(not torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_what_a_recalibration_inside_hold_estimates_lasts_for_the_block():
    norm = make_norm("bn")(3)
    norm(torch.randn(8, 3, 4, 4))
    kept = norm.running_mean.clone()
    x = torch.randn(16, 3, 4, 4) + 2
    with hold(norm):
        recalibrate(norm, [x[:8], x[8:]])
        norm.eval()(x)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    assert torch.equal(norm.running_mean, kept)


def test_a_compiled_network_is_held_and_combined_as_one_that_is_not():
    """A compiled network calls no hook that is registered after its first forward, unless something is done."""
    x = torch.randn(8, 3, 6, 6)

    def found(name, compiled, **given):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), make_norm(name, **given)(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if compiled:
            net.compile(backend="eager")
        with situation(net, domain=0 if given else None):
            outputs = [net(x)]
            with hold(net):
                outputs += [net(2 * x), net(3 * x), net(2 * x)]
            outputs.append(net.eval()(x))
        outputs.append(predict(net, x))
        return torch.stack(outputs)

    for name, given in (("online", {}), ("bne", {"num_domains": 2})):
        assert torch.allclose(found(name, True, **given), found(name, False, **given), atol=1e-6)
