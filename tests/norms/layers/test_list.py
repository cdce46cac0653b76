"""norms.layers.LAYERS against the registry and the folder, and the order of norms that follows from it."""

from pathlib import Path

import pytest
from torch import nn

from norms import layers, registry
from norms.layers import LAYERS
from norms.registry import norm_info, norm_names, register

FOLDER = Path(layers.__file__).parent
FILES = {file.stem for file in FOLDER.glob("*.py")} - {"__init__"}


def registered():
    """name -> the file of norms/layers that registers it."""
    norm_names()
    files = {name: Path(entry.file) for name, entry in registry._REGISTRY.items()}
    return {name: file.stem for name, file in files.items() if file.parent == FOLDER}


def test_the_list_names_every_registered_layer_with_its_file_and_no_other():
    assert {name: file for name, (file, _) in LAYERS.items()} == registered()


def test_every_file_of_the_folder_is_in_the_list():
    assert {file for file, _ in LAYERS.values()} == FILES


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_in_the_file_of_its_name_or_of_its_family(name):
    file, line = LAYERS[name]
    assert name.startswith(file) or (name, file) == ("in", "instance_norm")
    assert 0 < len(line) < 100
    assert "\n" not in line


def test_the_list_is_the_order_of_norms_for_every_order_of_registration(monkeypatch):
    @register(name="first", source="test", mixes_samples=False, keeps_stats=False)
    class First(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()

    norm_names()
    monkeypatch.setattr(registry, "_REGISTRY", dict(reversed(registry._REGISTRY.items())))
    assert next(iter(registry._REGISTRY)) == "first"
    assert norm_names() == [*LAYERS, "first"]
    assert norm_names(without={"domain"}) == [n for n in norm_names() if "domain" not in norm_info(n).needs]
