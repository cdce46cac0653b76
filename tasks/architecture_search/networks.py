"""The two networks of DARTS: the one that is searched, with every operation on every edge, and the derived one.

Both are a 3x3 stem with a norm, then cells, global average pooling and a linear classifier. The cells at one and two
thirds of the depth are reduction cells: they halve the maps and double the channels (Liu et al. 2019, section 3.1).

Axis letters: N samples, C channels of the first cell, H and W space, K classes, P droppable paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from norms.factory import NormFactory
from norms.generators import forked_generators
from tasks.architecture_search.genotype import CONCAT, EDGES, INPUTS, NODES, OPERATIONS, Genotype, derive, edge
from tasks.architecture_search.operations import Device, FactorizedReduce, MixedOperation, ReLUConvNorm, operation
from tasks.nets.blocks import conv_norm_act
from tasks.nets.init import initialize

STEM_MULTIPLIER = 3
LEAST_CELLS = 3
AUXILIARY_SIDE = 8
"""Side of the smallest map that the auxiliary head can take: 2x2 after its pooling, 1x1 after its last convolution."""

Draw = Callable[[str], torch.Generator]
MixingWeights = Sequence[Sequence[Tensor]]
"""EDGES x len(OPERATIONS) scalars."""


@dataclass(frozen=True)
class Place:
    """A cell's place: its channels, those of its inputs, and whether it and the cell before it are reductions."""

    before_last: int
    last: int
    channels: int
    reduction: bool
    after_reduction: bool


def places(channels: int, cells: int) -> list[Place]:
    """The cells of a network, from the stem on.

    Raises:
        ValueError: fewer than three cells, or no channel.
    """
    if channels < 1:
        raise ValueError(f"{channels} channels: at least 1 is needed")
    if cells < LEAST_CELLS:
        raise ValueError(
            f"{cells} cells: at least {LEAST_CELLS} are needed, since reduction cells stand at one and two thirds and "
            "a normal cell must be left"
        )
    found: list[Place] = []
    before_last = last = STEM_MULTIPLIER * channels
    after_reduction = False
    for index in range(cells):
        reduction = index in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduction else 1
        found.append(Place(before_last, last, channels, reduction, after_reduction))
        before_last, last, after_reduction = last, len(CONCAT) * channels, reduction
    return found


def check_size(shape: tuple[int, ...], auxiliary: bool = False) -> None:
    """ValueError where images (C, H, W) can not be halved twice, or leave too little for an auxiliary head."""
    if any(side % 4 for side in shape[1:]):
        raise ValueError(f"images of {shape[1]}x{shape[2]}: two reduction cells need sides that 4 divides")
    if auxiliary and min(shape[1:]) < 4 * AUXILIARY_SIDE:
        raise ValueError(
            f"images of {shape[1]}x{shape[2]}: the auxiliary head needs sides of {4 * AUXILIARY_SIDE} or more; "
            "set its weight to 0"
        )


class _Preprocessed(nn.Module):
    """Base of both kinds of cells: brings their two inputs to (N, C, H, W) of one size."""

    def __init__(self, place: Place, *, norm: NormFactory, affine: bool, device: Device):
        super().__init__()
        first = FactorizedReduce if place.after_reduction else ReLUConvNorm
        self.preprocess0 = first(place.before_last, place.channels, norm=norm, affine=affine, device=device)
        self.preprocess1 = ReLUConvNorm(place.last, place.channels, norm=norm, affine=affine, device=device)
        self.reduction = place.reduction

    def stride(self, state: int) -> int:
        """Of an operation on this state."""
        return 2 if self.reduction and state < INPUTS else 1


class SearchCell(_Preprocessed):
    """Every node is the sum of mixed operations on all earlier states."""

    def __init__(self, place: Place, *, norm: NormFactory, device: Device):
        super().__init__(place, norm=norm, affine=False, device=device)
        self.edges = nn.ModuleList(
            MixedOperation(place.channels, self.stride(state), norm=norm, device=device)
            for node in range(NODES)
            for state in range(INPUTS + node)
        )
        self.relu = nn.ReLU()

    def forward(self, before_last: Tensor, last: Tensor, weights: MixingWeights) -> Tensor:
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        positive: list[Tensor] = []
        for node in range(NODES):
            positive += [self.relu(state) for state in states[len(positive) :]]
            at = edge(node, 0)
            terms = [
                self.edges[at + s](*pair, weights[at + s]) for s, pair in enumerate(zip(states, positive, strict=True))
            ]
            states.append(sum(terms[1:], terms[0]))
        return torch.cat([states[s] for s in CONCAT], dim=1)


class DerivedCell(_Preprocessed):
    """Every node is the sum of the two operations that the genotype names."""

    def __init__(self, genotype: Genotype, place: Place, *, norm: NormFactory, device: Device):
        super().__init__(place, norm=norm, affine=True, device=device)
        genes = genotype.reduce if place.reduction else genotype.normal
        self.states = [state for _, state in genes]
        self.operations = nn.ModuleList(
            operation(name, place.channels, self.stride(state), norm=norm, affine=True, device=device)
            for name, state in genes
        )
        self.droppable = [not isinstance(module, nn.Identity) for module in self.operations]

    def forward(self, before_last: Tensor, last: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """keep: one factor (N, 1, 1, 1) per droppable operation, or None."""
        states = [self.preprocess0(before_last), self.preprocess1(last)]
        factors = iter(keep or ())
        for node in range(NODES):
            terms = []
            for at in (2 * node, 2 * node + 1):
                y = self.operations[at](states[self.states[at]])
                terms.append(y * next(factors) if keep is not None and self.droppable[at] else y)
            states.append(terms[0] + terms[1])
        return torch.cat([states[s] for s in CONCAT], dim=1)


class _Backbone(nn.Module):
    """Stem and classifier around cells."""

    def __init__(self, channels: int, in_channels: int, last: int, num_classes: int, norm: NormFactory, device: Device):
        super().__init__()
        self.stem = conv_norm_act(in_channels, STEM_MULTIPLIER * channels, 3, norm=norm, activation=None, device=device)
        self.head = nn.Linear(last, num_classes, device=device)

    def classify(self, x: Tensor) -> Tensor:
        return self.head(x.mean(dim=(2, 3)))


class Architecture(nn.Module):
    """The architecture's parameters: `normal` and `reduce`, (EDGES, len(OPERATIONS)) each, near 0 at the start."""

    def __init__(self, device: Device = None):
        super().__init__()
        self.normal = nn.Parameter(torch.zeros(EDGES, len(OPERATIONS), device=device))
        self.reduce = nn.Parameter(torch.zeros(EDGES, len(OPERATIONS), device=device))

    @torch.no_grad()
    def draw(self, generator: Draw) -> None:
        """Normal with standard deviation 0.001, as published, each from generator("architecture/<name>")."""
        for name, parameter in self.named_parameters():
            parameter.copy_(1e-3 * torch.randn(parameter.shape, generator=generator(f"architecture/{name}")))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Mixing weights of normal and reduction cells: the softmax over the operations of each edge."""
        return self.normal.softmax(dim=1), self.reduce.softmax(dim=1)

    def genotype(self) -> Genotype:
        return derive(*self())


class SearchBody(_Backbone):
    """The search network without its architecture: forward(x, mixing weights) -> logits (N, K)."""

    def __init__(
        self,
        channels: int,
        cells: int,
        *,
        norm: NormFactory,
        in_channels: int,
        num_classes: int,
        device: Device = None,
    ):
        row = places(channels, cells)
        super().__init__(channels, in_channels, len(CONCAT) * row[-1].channels, num_classes, norm, device)
        self.cells = nn.ModuleList(SearchCell(place, norm=norm, device=device) for place in row)

    def forward(self, x: Tensor, mixing: tuple[Tensor, Tensor]) -> Tensor:
        # cut into scalars once per forward: the cells of one kind share them, and so their gradients' accumulation
        normal, reduce = ([row.unbind() for row in weights.unbind()] for weights in mixing)
        before_last = last = self.stem(x)
        for cell in self.cells:
            before_last, last = last, cell(before_last, last, reduce if cell.reduction else normal)
        return self.classify(last)


class SearchNetwork(nn.Module):
    """Weights (`body`) and architecture; forward(x) -> logits (N, K) with the architecture as it is.

    Args:
        channels: C, of the first cell; the stem has 3 C.
        cells: at least 3.
        norm: a factory from `make_norm`; only the stem's norm has an affine.
        in_channels: channels of the images.
        num_classes: K.
        device: of the parameters; on "meta" nothing is initialized.
        generator: purpose -> CPU generator (RunContext.generator), for weights by name and the architecture; None
            leaves the constructors' own weights and an architecture of zeros.

    Raises:
        ValueError: cells or channels that the space can not build, what the norm refuses.
    """

    def __init__(
        self,
        channels: int,
        cells: int,
        *,
        norm: NormFactory,
        in_channels: int,
        num_classes: int,
        device: Device = None,
        generator: Draw | None = None,
    ):
        super().__init__()
        with forked_generators(torch.device(device or "cpu")):
            self.body = SearchBody(
                channels, cells, norm=norm, in_channels=in_channels, num_classes=num_classes, device=device
            )
            self.architecture = Architecture(device)
        if generator is not None:
            initialize(self.body, generator)
            self.architecture.draw(generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.architecture())


class AuxiliaryHead(nn.Module):
    """A second classifier on the maps after two thirds of the cells: (N, C, H, W), H and W at least 8 -> (N, K).

    8x8 maps, which 32x32 images give, are the published case; larger ones are averaged at the end.

    Differences from the published code: there the first activation works in place, so that in training the network
    goes on with rectified maps. A cell, which begins with that activation itself, does not notice. But of exactly three
    cells the head watches the last, and the classifier pools rectified maps in training and the maps as they are in
    evaluation. Here it pools the maps as they are in both.
    """

    def __init__(self, channels: int, num_classes: int, *, norm: NormFactory, device: Device):
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.first = conv_norm_act(channels, 128, 1, norm=norm, activation=nn.ReLU(), device=device)
        self.second = conv_norm_act(128, 768, 2, norm=norm, activation=nn.ReLU(), padding=0, device=device)
        self.head = nn.Linear(768, num_classes, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.pool(x.relu()))).mean(dim=(2, 3)))


class DerivedNetwork(_Backbone):
    """The network of a genotype: (N, C, H, W) -> logits (N, K).

    Args:
        genotype: its two cells.
        channels: of the first cell; the stem has three times as many.
        cells: at least 3.
        norm: a factory from `make_norm`.
        in_channels: channels of the images.
        num_classes: K.
        auxiliary: add an `AuxiliaryHead`, for training only.
        device: of the parameters; on "meta" nothing is initialized.
        generator: purpose -> CPU generator, for weights by name; None leaves the constructors' own.

    Raises:
        ValueError: cells or channels that the space can not build, what the norm refuses.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int,
        cells: int,
        *,
        norm: NormFactory,
        in_channels: int,
        num_classes: int,
        auxiliary: bool = False,
        device: Device = None,
        generator: Draw | None = None,
    ):
        row = places(channels, cells)
        with forked_generators(torch.device(device or "cpu")):
            super().__init__(channels, in_channels, len(CONCAT) * row[-1].channels, num_classes, norm, device)
            self.cells = nn.ModuleList(DerivedCell(genotype, place, norm=norm, device=device) for place in row)
            self.watched = 2 * cells // 3
            seen = len(CONCAT) * row[self.watched].channels
            self.auxiliary = AuxiliaryHead(seen, num_classes, norm=norm, device=device) if auxiliary else None
        if generator is not None:
            initialize(self, generator)

    @property
    def num_paths(self) -> int:
        """P: the operations that drop-path may drop, all but identities."""
        return sum(sum(cell.droppable) for cell in self.cells)  # type: ignore[misc, arg-type]

    def parameters_without_auxiliary(self) -> int:
        """The number of learned values as papers count them: without the auxiliary head of training."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("auxiliary."))

    def logits(self, x: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """Logits (N, K) of the classifier and, where there is one and the network is in training, the auxiliary head.

        Args:
            x: (N, C, H, W).
            keep: factors (P, N, 1, 1, 1) of the droppable paths (`drop_path_factors`), or None.
        """
        found: list[Tensor] = self(x, keep, every=True)  # by a call, since calls are what `compile` compiles
        return found

    def forward(self, x: Tensor, keep: Tensor | None = None, every: bool = False) -> Tensor | list[Tensor]:
        """The classifier's logits; with `every` those of `logits`."""
        before_last = last = self.stem(x)
        found: list[Tensor] = []
        at = 0
        for index, cell in enumerate(self.cells):
            count = sum(cell.droppable)  # type: ignore[arg-type]
            factors = None if keep is None else keep[at : at + count].unbind()
            at += count
            before_last, last = last, cell(before_last, last, factors)
            if index == self.watched and self.auxiliary is not None and self.training:
                found.append(self.auxiliary(last))
        found.insert(0, self.classify(last))
        return found if every else found[0]


def drop_path_factors(paths: int, samples: int, probability: float, generator: torch.Generator) -> Tensor:
    """The factors of drop-path: 0 with `probability`, else 1 / (1 - probability), per path and sample.

    Drawn on the generator's device; (paths, samples, 1, 1, 1).
    """
    keep = 1 - probability
    drawn = torch.rand(paths, samples, 1, 1, 1, generator=generator, device=generator.device) < keep
    return drawn.float() / keep
