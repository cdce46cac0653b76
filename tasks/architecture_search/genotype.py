"""A genotype: which operation joins which states, for the normal and for the reduction cell.

A cell is a directed acyclic graph over states: 0 and 1 are the outputs of the two cells before it, 2 to 5 its nodes.
Node n is the sum of two operations, each on an earlier state, no state twice; the cell's output is the concatenation
of all four nodes. An edge j -> n of the search network stands at position `edge(n, j)` of the 14.

    derivation (Liu et al. 2019, section 2.4):  strength of an edge = max over operations but `none` of its mixing
    weight; every node keeps its two strongest edges, each with the operation of that maximum.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, computed_field, model_validator
from torch import Tensor

from norms.values import nearest

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The candidates of every edge, in the published order."""
CHOICES = OPERATIONS[1:]
"""The operations that a derived cell may contain."""
NODES, INPUTS = 4, 2
EDGES = sum(INPUTS + node for node in range(NODES))
CELLS = ("normal", "reduce")
CONCAT = tuple(range(INPUTS, INPUTS + NODES))

Gene = tuple[str, int]
"""(operation, the state that it reads)."""


def edge(node: int, state: int) -> int:
    """Position of the edge from `state` to the cell's node `node` (0 to 3) among the EDGES, which go node by node."""
    return sum(INPUTS + n for n in range(node)) + state


def _checked(genes: Any) -> tuple[Gene, ...]:
    """Two genes for each of the four nodes. Raises ValueError for anything else."""
    if not isinstance(genes, list | tuple) or len(genes) != 2 * NODES:
        given = f"{len(genes)} entries" if isinstance(genes, list | tuple) else repr(genes)
        raise ValueError(f"{NODES} nodes of two [operation, state] entries each are needed, given {given}")
    result: list[Gene] = []
    for position, gene in enumerate(genes):
        node = position // 2
        where = f"node {node}, entry {position % 2}"
        if not isinstance(gene, list | tuple) or len(gene) != 2:
            raise ValueError(f"{where}: [operation, state] is needed, given {gene!r}")
        operation, state = gene
        if operation == "none":
            raise ValueError(f'{where}: "none" stands in the search network only; allowed: {", ".join(CHOICES)}')
        if operation not in CHOICES:
            raise ValueError(
                f'{where}: unknown operation "{operation}"; allowed: {", ".join(CHOICES)}{nearest(operation, CHOICES)}'
            )
        if isinstance(state, bool) or not isinstance(state, int) or not 0 <= state < INPUTS + node:
            raise ValueError(f"{where}: state {state!r} does not exist there; allowed: 0 to {INPUTS + node - 1}")
        result.append((operation, state))
    for node in range(NODES):
        (_, first), (_, second) = result[2 * node : 2 * node + 2]
        if first == second:
            raise ValueError(f"node {node}: reads state {first} twice; its two entries need different states")
    return tuple(result)


Genes = Annotated[tuple[Gene, ...], BeforeValidator(_checked)]


class Genotype(BaseModel):
    """The two cells of a network.

    Attributes:
        normal: (operation, state) of the nodes 0, 0, 1, 1, 2, 2, 3, 3 of the cells that keep the size.
        reduce: the same for the two cells that halve it; there, operations on the states 0 and 1 have stride 2.

    A mapping may also hold `normal_concat` and `reduce_concat`, as published genotypes do; both must be [2, 3, 4, 5].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    normal: Genes
    reduce: Genes

    @model_validator(mode="before")
    @classmethod
    def _all_nodes_are_output(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for cell in CELLS:
            concat = given.get(f"{cell}_concat", CONCAT)
            if not isinstance(concat, list | tuple) or tuple(concat) != CONCAT:
                raise ValueError(f"{cell}_concat {concat!r}: in this space all nodes are output, {list(CONCAT)}")
        aside = {"label", *(f"{cell}_concat" for cell in CELLS)}
        return {key: value for key, value in given.items() if key not in aside}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def label(self) -> str:
        """As tables call it: a published genotype's name, else eight digits of its content's hash."""
        published = [name for name, other in PUBLISHED.items() if self == other]
        digest = hashlib.sha256(json.dumps([self.normal, self.reduce]).encode()).hexdigest()
        return published[0] if published else f"genotype {digest[:8]}"

    @property
    def skip_connections(self) -> int:
        """Skip connections among the 16 operations of both cells."""
        return sum(operation == "skip_connect" for operation, _ in (*self.normal, *self.reduce))

    @property
    def text(self) -> str:
        """JSON as it is written to a file, in the form in which genotypes are published; a line per cell."""
        lines = []
        for cell, genes in (("normal", self.normal), ("reduce", self.reduce)):
            lines += [f' "{cell}": {json.dumps(genes)}', f' "{cell}_concat": {json.dumps(CONCAT)}']
        return "{\n" + ",\n".join(lines) + "\n}"


def read_genotype(path: str | Path) -> Genotype:
    """The genotype in a JSON file.

    Raises:
        ValueError: no such file, not JSON, or not a genotype of this space; one line per mistake, each with the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        near = nearest(str(path), PUBLISHED)
        raise ValueError(f'genotype "{path}": {error.strerror}; a file or {", ".join(PUBLISHED)}{near}') from error
    except ValueError as error:  # not UTF-8, not JSON
        raise ValueError(f'genotype "{path}": not a JSON file ({error})') from error
    except RecursionError as error:
        raise ValueError(f'genotype "{path}": nested too deeply') from error
    try:
        return Genotype.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join(f'genotype "{path}": {line}' for line in mistakes(error))) from error


def mistakes(error: ValidationError) -> list[str]:
    """One line per mistake: where it is, and what is wrong."""
    lines = []
    for e in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in e["loc"])
        lines.append(f"{where}: {e['msg']}".removeprefix(": ").replace("Value error, ", ""))
    return lines


def derive(normal: Tensor, reduce: Tensor) -> Genotype:
    """The genotype of mixing weights (EDGES, len(OPERATIONS)) of both kinds of cells; see the module's header.

    Equally strong edges go to the earlier state, equally strong operations to the earlier name. A node's stronger edge
    comes first.
    """

    def genes(weights: Tensor) -> list[Gene]:
        strongest = weights.detach().cpu().double()[:, 1:]  # without `none`
        if strongest.shape != (EDGES, len(CHOICES)):
            raise ValueError(f"mixing weights ({EDGES}, {len(OPERATIONS)}) are needed, given {tuple(weights.shape)}")
        rows = strongest.tolist()
        chosen: list[Gene] = []
        for node in range(NODES):
            by_state = {state: rows[edge(node, state)] for state in range(INPUTS + node)}
            best = sorted(by_state, key=lambda state: -max(by_state[state]))[:2]
            chosen += [(CHOICES[by_state[state].index(max(by_state[state]))], state) for state in best]
        return chosen

    return Genotype(normal=tuple(genes(normal)), reduce=tuple(genes(reduce)))


def random_genotype(generator: torch.Generator) -> Genotype:
    """A genotype drawn uniformly: for every node two different states, then an operation for each."""

    def genes() -> list[Gene]:
        drawn: list[Gene] = []
        for node in range(NODES):
            states = sorted(torch.randperm(INPUTS + node, generator=generator)[:2].tolist())
            kinds = torch.randint(len(CHOICES), (2,), generator=generator).tolist()
            drawn += [(CHOICES[kind], state) for kind, state in zip(kinds, states, strict=True)]
        return drawn

    normal = genes()
    return Genotype(normal=tuple(normal), reduce=tuple(genes()))


PUBLISHED: dict[str, Genotype] = {
    "DARTS_V1": Genotype(
        normal=(
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("skip_connect", 2),
        ),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("avg_pool_3x3", 0),
        ),
    ),
    "DARTS_V2": Genotype(
        normal=(
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0),
            ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1),
            ("skip_connect", 0),
            ("skip_connect", 0),
            ("dil_conv_3x3", 2),
        ),
        reduce=(
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("skip_connect", 2),
            ("skip_connect", 2),
            ("max_pool_3x3", 1),
        ),
    ),
}
"""The architectures that first- and second-order DARTS found on CIFAR-10, as published with the paper's code."""
