"""Episodes: counts, disjointness, order, identity by name, and what can not be drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import data as datasets
from tasks.base import NotPrepared
from tasks.data.episodes import EpisodeSampler, check_episodes, query_pool, variants_needed
from tasks.data.images import Split


def labels_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)) * 3, torch.tensor(counts))


@st.composite
def problems(draw):
    counts = draw(st.lists(st.integers(3, 9), min_size=2, max_size=8))
    way = draw(st.integers(2, len(counts)))
    shot = draw(st.integers(1, min(counts) - 1))
    queries = draw(st.integers(1, 12))
    return labels_of(counts), way, shot, queries, draw(st.integers(0, 999))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_an_episode_has_its_counts_and_no_query_is_a_support_or_drawn_twice(problem):
    labels, way, shot, queries, seed = problem
    variants = variants_needed(labels, shot, queries)
    sampler = EpisodeSampler(labels, way, shot, queries, variants)
    episode = sampler.draw(torch.Generator().manual_seed(seed))
    assert torch.bincount(episode.support_labels).tolist() == [shot] * way
    assert torch.bincount(episode.query_labels).tolist() == [queries] * way
    assert not set(episode.support.tolist()) & set(episode.query.tolist())
    assert len(set(episode.support.tolist())) == way * shot
    pairs = set(zip(episode.query.tolist(), episode.variant.tolist(), strict=True))
    assert len(pairs) == way * queries
    assert 0 <= int(episode.variant.min()) <= int(episode.variant.max()) < variants
    for index, own in ((episode.support, episode.support_labels), (episode.query, episode.query_labels)):
        classes = {(int(label), int(labels[i])) for i, label in zip(index, own, strict=True)}
        assert len(classes) == way
        assert len({true for _, true in classes}) == way


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_number_of_variants_is_the_smallest_that_serves(problem):
    labels, way, shot, queries, _ = problem
    variants = variants_needed(labels, shot, queries)
    check_episodes(labels, "test", way=way, shot=shot, queries=queries, variants=variants)
    if variants > 1:
        with pytest.raises(ValueError, match="exceed"):
            check_episodes(labels, "test", way=way, shot=shot, queries=queries, variants=variants - 1)


def test_the_order_of_queries_carries_no_labels():
    """Over many episodes every position has every label about equally often, and neighbours agree by chance."""
    sampler = EpisodeSampler(labels_of([8] * 6), 5, 1, 4)
    episodes = sampler.draw_many(400, torch.Generator().manual_seed(0))
    labels = torch.stack([episode.query_labels for episode in episodes])
    share = torch.stack([(labels == k).float().mean(0) for k in range(5)])
    assert float((share - 0.2).abs().max()) < 0.1  # five standard deviations
    same = (labels[:, 1:] == labels[:, :-1]).float().mean()
    assert abs(float(same) - 3 / 19) < 0.02


def test_equal_generators_draw_equal_episodes_and_others_do_not():
    sampler = EpisodeSampler(labels_of([8] * 6), 3, 2, 4)

    def drawn(seed):
        torch.rand(seed + 1)  # the global generator has no say
        return sampler.draw_many(3, torch.Generator().manual_seed(seed))

    fields = ("support", "support_labels", "query", "variant", "query_labels")
    for a, b in zip(drawn(1), drawn(1), strict=True):
        assert all(torch.equal(getattr(a, field), getattr(b, field)) for field in fields)
    assert not torch.equal(drawn(1)[0].query, drawn(2)[0].query)


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"way": 7}, "way 7 exceeds the 6 classes of the val part"),
        ({"shot": 5}, "shot 5 leaves no query: class 9 of the val part has 5 images, so shot is at most 4"),
        ({"queries": 5}, "shot 1 and queries 5 exceed the 5 images of class 9 of the val part"),
    ],
)
def test_what_can_not_be_drawn_is_named(given_options, message):
    labels = labels_of([8, 8, 8, 5, 8, 8])
    with pytest.raises(ValueError, match=message):
        check_episodes(labels, "val", **{"way": 3, "shot": 1, "queries": 4, **given_options})


def test_variants_of_a_query_are_drawn_once_and_differ():
    images = torch.randint(256, (4, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = Split(images, torch.arange(4))
    look_up = query_pool(part, 2, "affine", torch.Generator().manual_seed(1))
    first, second = (look_up(torch.tensor([3, 0]), torch.tensor([v, v])) for v in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(look_up(torch.tensor([3, 0]), torch.tensor([0, 0])), first)
    plain = query_pool(part, 1, "none", torch.Generator())
    assert torch.equal(plain(torch.tensor([2]), torch.tensor([0])), images[2:3])


def test_in_glyphs_support_and_queries_come_from_different_faces(tmp_path):
    data = datasets.load_disjoint("glyphs", tmp_path)
    sampler = EpisodeSampler(data.test.labels, 5, 5, 15, variants_needed(data.test.labels, 5, 15))
    for episode in sampler.draw_many(20, torch.Generator().manual_seed(0)):
        for label in range(5):
            faces = [
                set(data.test.groups[index[own == label]].tolist())
                for index, own in (
                    (episode.support, episode.support_labels),
                    (episode.query, episode.query_labels),
                )
            ]
            assert not faces[0] & faces[1]


def test_only_sets_whose_parts_share_no_class_serve(tmp_path):
    parts = [set(p.labels.tolist()) for d in [datasets.load_disjoint("glyphs", tmp_path)] for p in (d.train, d.test)]
    assert not parts[0] & parts[1]
    for name in ("fashion_mnist_mini", "cifar10"):
        with pytest.raises(ValueError, match="parts share classes; allowed: glyphs, omniglot, or a folder"):
            datasets.check_disjoint(name, tmp_path)
    with pytest.raises(NotPrepared, match="data prepare omniglot"):
        datasets.check_disjoint("omniglot", tmp_path)
    with pytest.raises(ValueError, match='did you mean "glyphs"'):
        datasets.check_disjoint("glyph", tmp_path)
