"""What norms keep, over all that keep anything: resumed, copied, held and cloned by MAML it is as it has to be."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from norms.conformance.subject import same, state
from norms.protocol import norm_modules
from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from norms.situation import after_update, hold, situation
from tasks.few_shot.maml import _hand_back
from tasks.nets.blocks import conv_norm_act
from tasks.third_party import import_legacy

# 8 groups of 4 channels: bgn then belongs to a size of images, which it keeps beside its buffers
OPTIONS = {n: {"num_groups": 2} for n in norm_names() if "num_groups" in norm_option_defaults(n)}
OPTIONS["bgn"] = {"num_groups": 8}
OPTIONS["cbn"] = {"burn_in": 0.0}  # it remembers from the first update on

pytestmark = pytest.mark.usefixtures("one_thread")


def build(name, seed=0):
    """Two convolutions with their norms and a linear layer; all parameters, of norms too, off their start."""
    factory = make_norm(name, **OPTIONS.get(name, {}))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layers = [conv_norm_act(c, 4, 3, norm=factory, activation=nn.ReLU()) for c in (2, 4)]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net


KEEPING = [name for name in norm_names() if state(build(name))]


def loss_of(net, seed):
    """The loss on a batch of two domains, of 8 or 6 images by turns; where a norm asks for a context, the loss of
    queries after their context."""
    draw, n = torch.Generator().manual_seed(seed), 8 - 2 * (seed % 2)
    images, labels = torch.randn(n, 2, 4, 4, generator=draw) + 0.1 * seed, torch.arange(n) % 3
    asks = any("context" in norm.norm_info.needs for _, norm in norm_modules(net))
    for part in ("context", "query")[: 1 + asks]:
        with situation(net, domain=torch.arange(n) // (n // 2), part=part):
            logits = net(images)
        images = images.flip(0)
    return F.cross_entropy(logits, labels)


def train(net, steps, of=6):
    """Updates as tasks.step.train_step makes them, each with the batch of its number."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in steps:
        loss = loss_of(net, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after_update(net, lambda step=step: loss_of(net, step), (step + 1) / of)
    return net


def everything(net):
    return state(net) | {name: p.detach().clone() for name, p in net.named_parameters()}


def test_these_are_the_norms_that_keep_something():
    assert set(KEEPING) >= {n for n in norm_names() if norm_info(n).keeps_stats}


@pytest.mark.parametrize("name", KEEPING)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_was_not(name):
    whole, stopped = train(build(name), range(6)), train(build(name), range(3))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    resumed = build(name, seed=1)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert same(everything(train(resumed, range(3, 6))), everything(whole))


@pytest.mark.parametrize("name", KEEPING)
def test_a_deepcopy_has_the_same_future_and_leaves_the_original_alone(name):
    net = train(build(name), range(3))
    before, twin = everything(net), copy.deepcopy(net)
    train(twin, range(3, 6))
    assert same(everything(net), before)
    assert not same(everything(twin), before)
    assert same(everything(train(net, range(3, 6))), everything(twin))


@pytest.mark.parametrize("name", KEEPING)
def test_after_training_forwards_under_inference_mode_a_network_can_be_trained_and_loaded(name):
    net = build(name)
    start = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        loss_of(net, 0)
    net.load_state_dict(start)
    train(net, range(1))
    with torch.inference_mode():
        loss_of(net, 0)
    train(net, range(2))
    net.load_state_dict(start)
    assert same(everything(train(net, range(3))), everything(train(build(name), range(3))))


@pytest.mark.parametrize("name", ["bgn", "cbn", "tasknorm"])
def test_what_a_norm_keeps_beside_its_buffers_is_held_inside_a_transform_of_torch_func(name):
    net = train(build(name), range(3))
    before = everything(net)
    weights = {n: p.detach() for n, p in net.named_parameters()}

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, seed):
            with hold(self.net):
                return loss_of(self.net, seed)

    def loss(weights):
        return torch.func.functional_call(Loss(), {f"net.{n}": w for n, w in weights.items()}, (3,))

    gradients = torch.func.grad(loss)(weights)
    assert same(everything(net), before)
    net.zero_grad()
    loss_of(net, 3).backward()
    for n, p in net.named_parameters():
        torch.testing.assert_close(gradients[n], p.grad)


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_held_step_leaves_everything_as_it_was(name, steps, inside):
    """An architecture step is one whose backward comes after the block; `steps` before it of training."""
    net = train(build(name), range(steps))
    before, tensors = everything(net), [id(b) for b in net.buffers()]
    with hold(net):
        loss = loss_of(net, 3)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert all(p.grad is not None for p in net[0].conv.parameters())
    assert same(everything(net), before)
    assert [id(b) for b in net.buffers()] == tensors
    # nor does it show in what comes next
    unheld = train(build(name), range(steps))
    for each in (net, unheld):
        train(each, range(3, 6))
    assert same(everything(net), everything(unheld))


def cloned(net, rate):
    """As tasks.few_shot.maml clones a network."""
    library = import_legacy("learn2learn", "this test")
    return library.algorithms.MAML(net, lr=rate, first_order=True, allow_unused=True, allow_nograd=True).clone()


@pytest.mark.parametrize("name", KEEPING)
def test_adapting_a_clone_under_hold_leaves_the_network_as_it_was(name):
    net = train(build(name), range(3))
    before, learner = everything(net), cloned(net, rate=0.5)
    for seed in (3, 4):
        with hold(learner.module):
            loss = loss_of(learner.module, seed)
        learner.adapt(loss)
    _hand_back(learner.module, net)
    assert not torch.equal(learner.module[0].conv.weight, net[0].conv.weight)
    assert same(everything(net), before)


@pytest.mark.parametrize("name", KEEPING)
def test_an_inner_loop_hands_back_what_the_same_forwards_would_have_left(name):
    """At rate 0, where the weights of the clone stay those of the network."""
    net = train(build(name), range(3))
    before, twin, learner = everything(net), copy.deepcopy(net), cloned(net, rate=0.0)
    for seed in (3, 4):
        learner.adapt(loss_of(learner.module, seed))
        torch.autograd.grad(loss_of(twin, seed), list(twin.parameters()), allow_unused=True)
    loss = loss_of(learner.module, 5)
    _hand_back(learner.module, net)
    loss.backward()  # of the outer step, which comes last
    loss_of(twin, 5).backward()
    assert same(everything(net), everything(twin))
    assert not same(everything(net), before)
    assert not any(b.requires_grad for b in net.buffers())
