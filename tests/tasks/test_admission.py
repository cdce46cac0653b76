"""tasks.admission: a task describes the network that hosts a norm, and each question is asked once."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from norms.registry import make_norm
from tasks import admission
from tasks.admission import Host, expected, refusal


class Net(nn.Module):
    """Refuses nothing; `built` counts how often it was asked for."""

    built = 0

    def __init__(self, norm, channels=4, device=None):
        super().__init__()
        type(self).built += 1
        self.norm = norm(channels, device=device)

    def forward(self, x):
        return self.norm(x)


def refuse_second_domain(net, images, slices, *, domains=1):
    if domains > 1:
        raise ValueError(f"{domains} domains of {len(images) // slices} images in {slices} norm batches")


HOST = Host("a task", Net, {"channels": 4}, (4, 8, 8), 6)


@pytest.fixture(autouse=True)
def nothing_answered(monkeypatch):
    monkeypatch.setattr(admission, "_ANSWERS", {})
    monkeypatch.setattr(Net, "built", 0)


def asked(norm, *hosts):
    for host in hosts:
        refusal(norm, norm.info, host)
    return Net.built


def test_equal_hosts_are_one_question():
    assert asked(make_norm("bn"), HOST, replace(HOST, network={"channels": 4}), replace(HOST, task="another")) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"network": {"channels": 8}, "shape": (8, 8, 8)},
        {"shape": (4, 4, 4)},
        {"norm_batch": 5},
        {"slices": 2},
        {"forward": refuse_second_domain},
    ],
)
def test_whatever_the_answer_depends_on_is_asked_anew(other):
    assert asked(make_norm("bn"), HOST, replace(HOST, **other)) == 2


def test_more_than_two_norm_batches_are_no_new_question():
    assert asked(make_norm("bn"), *(replace(HOST, slices=slices) for slices in (2, 3, 16))) == 1


def test_a_norm_with_other_options_is_asked_anew():
    assert asked(make_norm("gn", num_groups=2), HOST) == 1
    assert asked(make_norm("gn", num_groups=4), HOST) == 2


def test_the_reason_is_that_of_the_true_norm_batch_and_of_what_the_forward_is_told():
    norm, host = make_norm("bn"), replace(HOST, forward=refuse_second_domain, slices=9)
    assert refusal(norm, norm.info, host) is None
    reason = refusal(norm, norm.info, replace(host, told={"domains": 2}))
    assert reason == "2 domains of 6 images in 2 norm batches"


def test_a_need_that_the_task_can_not_serve_is_said_before_anything_is_built():
    norm = make_norm("tasknorm")
    assert refusal(norm, norm.info, HOST) == "needs context, which a task has not"
    assert refusal(make_norm("mbn"), make_norm("mbn").info, replace(HOST, slices=3)).startswith(
        "takes statistics from earlier iterations, and would take each of the 3 norm batches"
    )
    assert Net.built == 0


def test_a_network_without_any_effective_norm_is_a_reason():
    net = Net(make_norm("bn"))
    net.norm.equivalent_to = "none"
    with pytest.raises(ValueError, match="no activation follows any norm here"):
        admission.in_both_modes(net, torch.zeros(4, 4, 8, 8), 1)


def test_a_folder_is_assumed_to_have_some_shape_and_ten_classes():
    assert expected("folder:/nowhere", None) == ((3, 64, 64), 10)
    assert expected("folder:/nowhere", 4, (3, 224, 224)) == ((3, 224, 224), 4)
    assert expected("fashion_mnist_mini", 3)[1] == 3
