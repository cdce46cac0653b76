"""The factory of make_norm as a value: its fields, equality, copies and text, and the partial that it is."""

import copy
import functools
import inspect
import pickle

import pytest

from norms.factory import NormFactory
from norms.registry import make_norm, norm_info, norm_names, resolve_norm_options


@pytest.mark.parametrize("name", norm_names())
def test_a_factory_has_the_facts_the_class_and_all_options_of_its_norm(name):
    factory = make_norm(name)
    assert factory.info is norm_info(name)
    assert factory.options == resolve_norm_options(name, {})
    assert eval(repr(factory), {"make_norm": make_norm}).options == factory.options


def test_two_factories_are_equal_only_as_one_object_and_may_be_in_sets():
    one, two = make_norm("bgn", num_groups=4), make_norm("bgn", num_groups=4)
    assert one == one
    assert one != two
    assert {one, two, one} == {two, one}
    assert len({one.func, two.func}) == 2
    assert (one.info, one.build, one.options) == (two.info, two.build, two.options)


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])  # noqa: S301
def test_a_copy_of_a_factory_builds_the_same_layers(twin_of):
    factory = make_norm("gn", num_groups=4, eps=0.5)
    twin = twin_of(factory)
    assert isinstance(twin, NormFactory)
    assert (twin.info, twin.build, twin.options) == (factory.info, factory.build, factory.options)
    assert repr(twin(8)) == repr(factory(8))


def test_a_factory_can_not_be_changed():
    factory = make_norm("gn", num_groups=4)
    factory.options["num_groups"] = 2
    assert factory.options["num_groups"] == 4
    assert factory(8).num_groups == 4
    for field in ("info", "build", "options"):
        with pytest.raises(AttributeError):
            setattr(factory, field, None)


def test_a_factory_is_a_partial_that_binds_nothing_around_an_object_that_is_no_function():
    """timm accepts partials, takes them apart, and takes functions for norms with the activation in them."""
    factory = make_norm("gn", num_groups=4)
    assert isinstance(factory, functools.partial)
    assert (factory.args, factory.keywords) == ((), {})
    assert callable(factory.func)
    assert not inspect.isfunction(factory.func)
    assert not inspect.isclass(factory.func)
    assert factory.func.__name__ == "norms.gn"
