"""The fast norm of docs/your-norm.md is the plain one of that page, at every norm batch, by every check."""

import copy
import re

import pytest
import torch

import norms
from norms.conformance import check_norm
from norms.kernels import by_moments
from norms.registry import make_norm
from norms.situation import situation
from suite.environment import ROOT

PAGE = (ROOT / "docs" / "your-norm.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(my_\w*norm\.py)`:\n\n```python\n(.*?)```$", PAGE, re.DOTALL | re.MULTILINE))
(RULE,) = re.findall(r"```python\n(from norms.kernels import by_moments\n.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def both(tmp_path):
    """The fast norm and the plain one, with the same parameters, not the first ones."""
    for name in ("my_fast_norm.py", "my_batch_norm.py"):
        (tmp_path / name).write_text(FILES[name])
        norms.load_plugin(tmp_path / name)
    fast, plain = make_norm("rms_fast")(6), make_norm("rms_batch")(6)
    with torch.no_grad():
        fast.weight.uniform_(0.5, 2)
        fast.bias.uniform_(-1, 1)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def trained(norm, x, slices):
    x = x.detach().requires_grad_()
    with situation(norm, slices=slices):
        y = norm(x)
    factor = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return [y, *torch.autograd.grad((y * factor).sum(), (x, norm.weight, norm.bias)), *norm.buffers()]


def test_every_check_of_it_is_fine(both):
    """`slices_at_once` among them: norm batches together are norm batches one by one."""
    for options in ({}, {"eps": 0.01, "momentum": 0.5}):
        assert [check.fact for check in check_norm("rms_fast", **options) if check.false] == []


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_norm_batches_together_are_those_of_the_plain_norm_one_by_one(both, slices, channels_last):
    x = torch.randn(8, 6, 5, 3) + 2
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    for step in range(3):
        found, expected = (trained(norm, x + step, slices) for norm in both)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[0].stride() == x.stride()
    for norm in both:
        norm.eval()
    torch.testing.assert_close(both[0](x), both[1](x))


def test_it_is_called_once_for_all_norm_batches_and_the_plain_one_for_each(both):
    calls = []
    for norm in both:
        own = type(norm).forward
        # situation hides the class's forward where it calls it per slice
        norm.__class__ = type(norm.__class__.__name__, (type(norm),), {})
        norm.__class__.forward = lambda self, x, own=own: calls.append(len(x)) or own(self, x)
        with situation(norm, slices=4):
            norm(torch.randn(8, 6, 2))
    assert calls == [8, 2, 2, 2, 2]


def test_the_rule_of_the_page_is_the_same_norm(both):
    names = {"by_moments": by_moments}
    exec(RULE, names)  # the page's block
    fast, x = both[0], torch.randn(8, 6, 5, 3, requires_grad=True)
    other = copy.deepcopy(fast)
    with situation(fast, slices=2), situation(other, slices=2):
        own, by_rule = fast(x), names["forward"](other, x)
    torch.testing.assert_close(by_rule, own)
    found = [torch.autograd.grad(y.exp().sum(), (x, n.weight, n.bias)) for y, n in ((own, fast), (by_rule, other))]
    torch.testing.assert_close(*found)
