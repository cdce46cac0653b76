"""Genotypes as data: derivation by a literal rule, files and their mistakes, random draws, pictures."""

import itertools
import json

import matplotlib.image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.architecture_search.drawing import draw
from tasks.architecture_search.genotype import (
    CHOICES,
    EDGES,
    INPUTS,
    NODES,
    OPERATIONS,
    PUBLISHED,
    Genotype,
    derive,
    edge,
    random_genotype,
    read_genotype,
)


def node_genes(node):
    states = st.lists(st.integers(0, INPUTS + node - 1), min_size=2, max_size=2, unique=True)
    return states.flatmap(lambda pair: st.tuples(*(st.tuples(st.sampled_from(CHOICES), st.just(s)) for s in pair)))


cells = st.tuples(*(node_genes(node) for node in range(NODES))).map(lambda nodes: tuple(itertools.chain(*nodes)))
genotypes = st.builds(Genotype, normal=cells, reduce=cells)


def test_the_edges_are_numbered_node_by_node():
    assert [edge(n, s) for n in range(NODES) for s in range(INPUTS + n)] == list(range(EDGES)) == list(range(14))


# Derivation


@given(seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_derivation_is_the_literal_rule(seed):
    """Of each node's edges the two with the largest weight of any operation but none, each with that operation."""
    draw_ = torch.Generator().manual_seed(seed)
    weights = [torch.randn(EDGES, len(OPERATIONS), generator=draw_).softmax(1) for _ in range(2)]
    found = derive(*weights)
    for genes, table in ((found.normal, weights[0]), (found.reduce, weights[1])):
        at = 0
        for node in range(NODES):
            rows = table[at : at + INPUTS + node].tolist()
            at += INPUTS + node
            ranked = sorted(((max(row[1:]), state) for state, row in enumerate(rows)), reverse=True)[:2]
            expected = [(OPERATIONS[rows[s].index(strength)], s) for strength, s in ranked]
            assert list(genes[2 * node : 2 * node + 2]) == expected


def test_none_is_never_chosen_however_strong():
    weights = torch.full((EDGES, len(OPERATIONS)), 0.01)
    weights[:, 0] = 0.9
    weights[:, CHOICES.index("skip_connect") + 1] = 0.02
    found = derive(weights, weights)
    assert {name for name, _ in (*found.normal, *found.reduce)} == {"skip_connect"}
    assert found.skip_connections == 16


def test_ties_go_to_the_earlier_state_and_operation():
    weights = torch.full((EDGES, len(OPERATIONS)), 1 / len(OPERATIONS))
    expected = (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * NODES
    assert derive(weights, weights).normal == expected


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(14, 8\) are needed, given \(13, 8\)"):
        derive(torch.zeros(13, 8), torch.zeros(13, 8))


# Files


@given(genotype=genotypes)
@settings(max_examples=60, deadline=None)
def test_a_file_gives_back_what_was_written(genotype, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "genotype.json"
    file.write_text(genotype.text, encoding="utf-8")
    assert read_genotype(file) == genotype
    # and so does a record, in which the label stands beside the cells
    assert Genotype.model_validate(json.loads(genotype.model_dump_json())) == genotype
    assert len(genotype.label) == len("genotype 12345678")


GOOD = json.loads(PUBLISHED["DARTS_V2"].text)


def changed(cell="normal", position=None, gene=None, **keys):
    content = json.loads(json.dumps(GOOD)) | keys
    if position is not None:
        content[cell][position] = gene
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(position=2, gene=["sep_conv_3x4", 0]), r'normal: node 1, entry 0: unknown operation "sep_conv_3x4"'),
        (changed(position=2, gene=["sep_conv_3x4", 0]), r'did you mean "sep_conv_3x3"\?'),
        (changed("reduce", 7, ["none", 0]), r'reduce: node 3, entry 1: "none" stands in the search network only'),
        (changed(position=0, gene=["skip_connect", 2]), r"node 0, entry 0: state 2 does not exist there; .* 0 to 1"),
        (changed(position=7, gene=["skip_connect", -1]), r"state -1 does not exist there; allowed: 0 to 4"),
        (changed(position=7, gene=["skip_connect", "0"]), r"state '0' does not exist"),
        (changed(position=7, gene=["skip_connect", True]), r"state True does not exist"),
        (changed(position=1, gene=["dil_conv_3x3", 0]), r"node 0: reads state 0 twice"),
        (changed(position=1, gene="dil_conv_3x3"), r"\[operation, state\] is needed, given 'dil_conv_3x3'"),
        (changed(normal=GOOD["normal"][:6]), r"normal: 4 nodes of two .* are needed, given 6 entries"),
        (changed(normal=GOOD["normal"] + GOOD["normal"][:2]), r"given 10 entries"),
        (changed(normal={"a": 1}), r"normal: 4 nodes"),
        (changed(reduce_concat=[3, 4, 5]), r"reduce_concat \[3, 4, 5\]: in this space all nodes are output"),
        (changed(reduce_concat=7), r"reduce_concat 7"),
        ({"normal": GOOD["normal"]}, r"reduce: Field required"),
        (changed(extra=1), r"extra: Extra inputs"),
        ([], r"valid dictionary"),
        (None, r"valid dictionary"),
    ],
)
def test_a_file_that_is_no_genotype_says_what_and_where(content, message, tmp_path):
    file = tmp_path / "g.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_genotype(file)
    assert not isinstance(caught.value, ValidationError)
    assert all(line.startswith(f'genotype "{file}": ') for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not a JSON file"), (b"\xff\xfe\x00", "not a JSON file"), (b"[" * 100_000, "not a JSON file|too deeply")],
)
def test_a_file_that_is_not_json_is_named(content, message, tmp_path):
    (tmp_path / "g.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_genotype(tmp_path / "g.json")


def test_a_missing_file_names_the_published_genotypes(tmp_path):
    with pytest.raises(ValueError, match=r'"DARTS_V3": No such file.*DARTS_V1, DARTS_V2; did you mean "DARTS_V'):
        read_genotype("DARTS_V3")
    with pytest.raises(ValueError, match="Is a directory"):
        read_genotype(tmp_path)


def test_published_genotypes_are_called_by_their_names():
    assert [genotype.label for genotype in PUBLISHED.values()] == list(PUBLISHED) == ["DARTS_V1", "DARTS_V2"]
    assert PUBLISHED["DARTS_V2"].skip_connections == 5


# Random


def test_random_genotypes_repeat_themselves_and_are_uniform():
    drawn = [random_genotype(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert drawn[0] == random_genotype(torch.Generator().manual_seed(0))
    genes = [gene for g in drawn for gene in (*g.normal, *g.reduce)]
    count = {name: sum(name == other for other, _ in genes) for name in CHOICES}
    # 6400 draws of 7: mean 914, standard deviation 28
    assert all(abs(n - 6400 / 7) < 5 * 28 for n in count.values())
    last = [state for g in drawn for _, state in g.normal[6:]]
    # 800 of 5 states, two different ones each: mean 160
    assert all(abs(last.count(state) - 160) < 60 for state in range(5))


# Pictures


@given(genotype=genotypes)
@settings(max_examples=3, deadline=None)
def test_any_genotype_can_be_drawn_and_every_operation_is_named(genotype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawing")
    draw(genotype, [folder / "g.svg", folder / "g.png"])
    text = (folder / "g.svg").read_text(encoding="utf-8")
    for name in CHOICES:
        expected = sum(name == other for other, _ in (*genotype.normal, *genotype.reduce))
        assert text.count(f">{name}<") == expected
    assert all(text.count(f">{name}<") == 2 for name in ("c(k-2)", "c(k-1)", "c(k)", "0", "1", "2", "3"))
    height, width, _ = matplotlib.image.imread(folder / "g.png").shape
    assert height > 900
    assert width > 1100


def test_equal_genotypes_give_equal_files(tmp_path):
    for name in ("a", "b"):
        draw(PUBLISHED["DARTS_V1"], [tmp_path / f"{name}.svg", tmp_path / f"{name}.png"])
    for ending in ("svg", "png"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
