"""torch.func over every norm, where torch's own kernels go wrong: second derivatives, a late axis of buffers."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacfwd, jacrev, stack_module_state, vmap

from norms.registry import make_norm, norm_info, norm_names, norm_option_defaults
from norms.situation import situation

# of torch's own, when it first takes forward-mode derivatives
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

FUNCTIONAL = [name for name in norm_names() if norm_info(name).functional]
EXACT = [name for name in FUNCTIONAL if norm_info(name).exact_gradient]


def layer(name, channels=4, **options):
    allowed = {"num_groups": 2, "ghost_batch_size": 2, **options}
    options = {key: value for key, value in allowed.items() if key in norm_option_defaults(name)}
    fused = {"activation": nn.Sigmoid()} if "activation" in norm_info(name).needs else {}
    built = make_norm(name, **options)(channels, dtype=torch.float64, **fused)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_of_input_and_parameters_are_right_inside_transforms(name, training):
    norm, shape = layer(name), (3, 4, 2, 1)
    x, domains = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 1, 0])
    with situation(norm, domain=0, part="context"):
        norm(2 * x + 1)
    norm.train(training)
    names = [key for key, _ in norm.named_parameters()]
    points = [x, *(p.detach() for p in norm.parameters())]
    sizes = [p.numel() for p in points]

    def function(flat):
        inputs = [part.view(p.shape) for part, p in zip(flat.split(sizes), points, strict=True)]
        buffers = {key: b.clone() for key, b in norm.named_buffers()}
        y = functional_call(norm, (dict(zip(names, inputs[1:], strict=True)), buffers), (inputs[0],))
        return y.pow(3).sum()

    def gradient(flat):
        flat = flat.clone().requires_grad_()
        return torch.autograd.grad(function(flat), flat)[0]

    flat = torch.cat([p.flatten() for p in points])
    direction, step = torch.randn_like(flat), 1e-5
    for domain in (0, domains):
        with situation(norm, domain=domain, part="context"):
            difference = (gradient(flat + step * direction) - gradient(flat - step * direction)) / (2 * step)
            for outer in (jacfwd, jacrev):
                for inner in (jacfwd, jacrev):
                    found = outer(inner(function))(flat) @ direction
                    torch.testing.assert_close(found, difference, rtol=1e-5, atol=1e-5 * difference.abs().max().item())


@pytest.mark.parametrize("num_domains", [1, 2])
@pytest.mark.parametrize("name", [name for name in FUNCTIONAL if norm_info(name).keeps_stats])
def test_buffers_mapped_over_their_last_axis_are_those_of_a_loop(name, num_domains):
    layers = [layer(name, num_domains=num_domains) for _ in range(3)]
    loop, x = [copy.deepcopy(one) for one in layers], torch.randn(3, 6, 4, 3, 3, dtype=torch.float64)
    parameters, buffers = stack_module_state(layers)
    buffers = {key: b.movedim(0, -1).contiguous() for key, b in buffers.items()}
    with contextlib.ExitStack() as stack:
        for one in (layers[0], *loop):
            stack.enter_context(situation(one, domain=0, part="context"))
        call = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)), in_dims=(0, -1, 0))
        y = call(parameters, buffers, x)
        torch.testing.assert_close(y, torch.stack([one(t) for one, t in zip(loop, x, strict=True)]))
    for key, found in buffers.items():
        torch.testing.assert_close(found.movedim(-1, 0), torch.stack([one.get_buffer(key) for one in loop]))
