"""AutoAttack's four parts (Croce & Hein 2020, arXiv:2003.01690), made by torchattacks.

| part | attack | at paper scale |
| --- | --- | --- |
| apgd_ce | APGD on the cross entropy | 100 steps |
| apgd_t | APGD on the targeted DLR loss, one run per wrong class | 100 steps, 9 targets |
| fab_t | targeted FAB | 100 steps, 9 targets |
| square | Square, a black-box random search | 5,000 queries |

torchattacks' own AutoAttack has 10 steps by default, takes its seed from the clock, and shows each part only what the
parts before left over. Here every part gets a seed and all images that it is given. Within a part torchattacks draws
starts for the images that are still classified correctly, so an image's start may depend on the others of its batch.

Square halves the share of the image that its squares cover after 10, 50, 200, 500, 1,000, 2,000, 4,000, 6,000 and 8,000
queries. That is the schedule of a search of 10,000, and AutoAttack keeps it for its 5,000, which so end before the last
two halvings. torchattacks by default squeezes the whole schedule into the number of queries; here it is AutoAttack's,
for any number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from norms.situation import predict
from tasks.step import wide
from tasks.third_party import import_legacy

Part = Literal["apgd_ce", "apgd_t", "fab_t", "square"]
PARTS: tuple[Part, ...] = get_args(Part)
BLACK_BOX = "square"
MOST_TARGETS = 9
TARGETED_CLASSES = 4
"""The targeted DLR loss divides by a difference to the third and fourth largest logit."""


@dataclass(frozen=True)
class Scale:
    """The effort of each part.

    Args:
        apgd_steps, fab_steps: iterations.
        targets: wrong classes that the targeted parts try, the most likely first.
        square_queries: forwards of an image.
    """

    apgd_steps: int = 100
    fab_steps: int = 100
    targets: int = MOST_TARGETS
    square_queries: int = 5000


class _Target:
    """A network as a plain function, so that torchattacks can not change its modes."""

    training = False

    def __init__(self, net: nn.Module, device: torch.device):
        self.net, self.device = net, device

    def __call__(self, images: Tensor) -> Tensor:
        return wide(predict(self.net, images))

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0, device=self.device)  # it asks the first one for its device

    def eval(self) -> _Target:
        return self

    def train(self, mode: bool = True) -> _Target:
        return self


def attack(
    part: Part, net: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int, scale: Scale
) -> Tensor:
    """Examples of one part, (N, C, H, W) like `images`; call it inside `crafting(net, "eval")`.

    Args:
        part: one of PARTS.
        net: images in [0, 1] -> logits (N, K), in evaluation mode.
        images: correctly classified ones; of others the image itself may come back.
        labels: (N,).
        epsilon: in units of the images.
        seed: of torch's global generator, which torchattacks sets.
        scale: steps, targets, queries.

    Raises:
        ValueError: torchattacks is not installed.
    """
    library = import_legacy("torchattacks", "AutoAttack")
    target = _Target(net, images.device)
    common: dict[str, Any] = {"norm": "Linf", "eps": epsilon, "seed": seed, "n_restarts": 1}
    classes = scale.targets + 1  # torchattacks derives the number of targets from that of the classes
    if part == "apgd_ce":
        made = library.APGD(target, steps=scale.apgd_steps, loss="ce", **common)
    elif part == "apgd_t":
        made = library.APGDT(target, steps=scale.apgd_steps, n_classes=classes, **common)
    elif part == "fab_t":
        made = library.FAB(target, steps=scale.fab_steps, multi_targeted=True, n_classes=classes, **common)
    else:
        made = library.Square(target, n_queries=scale.square_queries, resc_schedule=False, **common)
    # FAB views images as vectors, which other memory formats do not allow
    examples: Tensor = made(images.contiguous(), labels)
    return examples.detach().contiguous(memory_format=_format_of(images))


def _format_of(images: Tensor) -> torch.memory_format:
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
