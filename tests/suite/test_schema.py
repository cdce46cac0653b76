"""suite.schema: what an editor takes and refuses is what planning takes and refuses."""

import json
import re
from pathlib import Path

import pytest
from parts.json_schema import valid

from norms.registry import norm_names
from suite.config import CONFIGS, read_config
from suite.schema import config_schema, described
from tasks import get_task, task_names

SCHEMA = config_schema()


def taken(config):
    return valid(config, SCHEMA, SCHEMA)


def grid(**options):
    return {"norms": ["bn"], "seeds": 0, "tasks": {"classification": options}}


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_taken(config):
    assert taken(read_config(config))


@pytest.mark.parametrize(
    "config",
    [
        grid(),
        grid(epochs=3, norm_batch_size=[2, 64], width=None),
        grid(betas=[0.9, 0.99]),
        grid(betas=[[0.9, 0.99], [0.8, 0.9]]),
        grid(dataset="folder:anything"),
        {"tasks": ["classification", "few_shot"], "norms": "bn", "seeds": "0-4, 7"},
        {"x-mine": {"a": [1]}, "tasks": {"classification": None}, "plugins": ["my_norm.py"], "threads": 2},
        {"tasks": {"classification": [{"epochs": 1}, {"norms": [{"gn": {"num_groups": [4, "auto"]}}, {"bn": None}]}]}},
        {"tasks": {"adversarial": {"autoattack": [["apgd_ce", "square"]]}}},
        {"tasks": {"architecture_search": {"retrain_norm": [{"gn": {"num_groups": 2}}, "bn", None]}}},
        {"tasks": {"domain_generalization": {"domains": ["a", "b", "c"], "held_out": ["a", "b"]}}},
    ],
    ids=json.dumps,
)
def test_what_planning_takes_is_taken(config):
    assert taken(config)


@pytest.mark.parametrize(
    "config",
    [
        grid(epoch=3),
        grid(epochs="3"),
        grid(epochs=0),
        grid(epochs=True),
        grid(epochs=[]),
        grid(epochs=[1, "2"]),
        grid(dataset="fashion_mnist_minni"),
        grid(betas=[0.9]),
        grid(schedule="cosin"),
        grid(learning_rate=0),
        grid(channels_last=1),
        {"norms": ["bnn"], "tasks": ["classification"]},
        {"norms": [{"gn": {"groups": 4}}], "tasks": ["classification"]},
        {"norms": [{"gn": {"num_groups": "four"}}], "tasks": ["classification"]},
        {"norms": [{"gn": {}, "bn": {}}], "tasks": ["classification"]},
        {"norms": [], "tasks": ["classification"]},
        {"seeds": -1, "tasks": ["classification"]},
        {"seeds": "0..4", "tasks": ["classification"]},
        {"tasks": {"clasification": {}}},
        {"tasks": ["clasification"]},
        {"task": {}, "tasks": ["classification"]},
        {"budget": "huge", "tasks": ["classification"]},
        {"threads": 0, "tasks": ["classification"]},
        {"norms": ["bn"]},
        ["bn"],
    ],
    ids=json.dumps,
)
def test_typical_mistakes_are_refused(config):
    assert not taken(config)


def test_every_norm_task_and_option_is_in_it_once_and_every_reference_leads_somewhere():
    definitions = SCHEMA["$defs"]
    assert {name.removeprefix("norm.") for name in definitions if name.startswith("norm.")} == set(norm_names())
    own = [name for name in task_names() if type(get_task(name)).__module__.startswith("tasks.")]
    assert len(own) == 6  # other tests register theirs in this process
    for name in own:
        options = get_task(name).options.model_fields
        assert set(definitions[f"task.{name}"]["properties"]) == {"norms", "seeds", *options}
    text = json.dumps(SCHEMA, allow_nan=False)
    assert set(re.findall(r'"#/\$defs/([^"]+)"', text)) == set(definitions)
    assert "https://" not in text.replace(SCHEMA["$schema"], "")


def test_options_carry_the_words_of_their_docstrings():
    options = SCHEMA["$defs"]["task.classification"]["properties"]
    assert [name for name, option in options.items() if "description" not in option and "$ref" not in option] == []
    assert options["batch_size"]["description"] == "images per update, of all workers."
    assert options["batch_size"]["default"] == 128
    assert "divisor of C" in SCHEMA["$defs"]["norm.gn"]["properties"]["num_groups"]["description"]


def test_described_reads_lists_of_names_and_lines_that_go_on():
    text = """Words.

    Attributes:
        a, b: both of
            them.
        c: one.

    More: no entry.
    """
    assert described(text) == {"a": "both of them.", "b": "both of them.", "c": "one."}
    assert described(None) == {}


def test_a_plugin_s_norm_is_known_after_it_is_loaded(tmp_path):
    from norms import load_plugin

    file = Path(tmp_path / "own.py")
    file.write_text(
        "import torch\nfrom norms.registry import register\n"
        '@register(name="schema_own", source="mine", mixes_samples=False, keeps_stats=False)\n'
        "class Own(torch.nn.Module):\n"
        '    """Mine.\n\n    Args:\n        scale: of everything.\n    """\n'
        "    def __init__(self, num_channels, *, scale: float = 1.0, affine: bool = True):\n"
        "        super().__init__()\n"
        "    def forward(self, x):\n        return x\n"
    )
    config = {"norms": [{"schema_own": {"scale": 2}}], "tasks": ["classification"]}
    assert not taken(config)
    load_plugin(file)
    schema = config_schema()
    assert valid(config, schema, schema)
    assert schema["$defs"]["norm.schema_own"]["properties"]["scale"]["description"] == "of everything."
