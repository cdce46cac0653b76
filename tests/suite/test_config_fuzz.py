"""Whatever text a config holds: a plan, or a few lines of what is wrong. No traceback, no hang, no growth."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import suite.planning as planning
from suite.config import LONGEST_LINE, MOST_LINES, PlanError
from suite.planning import Plan, plan

CONFIGS = {
    file.name: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
}
TINY = """\
x-common: &common {dataset: fashion_mnist_mini, model: resnet8, max_steps: 2}
norms: [bn, {gn: {num_groups: [2, 4]}}]
seeds: 0-2
tasks:
  classification:
    - {<<: *common, learning_rate: [0.1, 1e-2], norm_batch_size: [2, null]}
    - {<<: *common, batch_size: 32, seeds: [7], norms: [ln]}
  domain_adaptation: {source: [mnist, uci], target: [mnist, uci], method: [dann, source_only]}
  architecture_search: [{retrain_norm: {gn: {num_groups: 2}}}, {genotype: DARTS_V1}]
"""
TEXTS = [*CONFIGS.values(), *[TINY] * 6]
TOKENS = [
    *("yes", "on", "010", "0o10", "0x1F", "1e3", "1e999", "-0.0", ".inf", ".nan", "1_000", "1:30", "2001-01-01"),
    *("true", "null", "~", "-1", "0", "3", "9" * 19, "9" * 309, "1e-320", '""', "'x'", "bn", "gn", "folder:x", "far"),
    *("[]", "{}", "[[]]", "[3, 4]", "[[1], [2]]", "{a: 1}", "{3: 4}", "{null: x}", "[null]", "[true, 3]", "0-99999"),
    *(": ", "- ", ", ", "\n", "\n  ", "\t", "#", "&a ", "*a", "*common", "&common ", "<<: ", "? ", "---\n", "...\n"),
    *("!!bool x", "!!int ''", "!!timestamp x", "!!map [a]", "!!set {a}", "!!str ", "!!python/name:os ", "!x ", "! "),
    *("[", "]", "{", "}", '"', "'", "|", ">", "%YAML 1.1\n", "@", "`", "\0", "\x85", "\u2028", "\ufeff", "é", "🙂"),
    *("norms: ", "seeds: ", "tasks: ", "classification: ", "dataset: ", "x" * 300, "[" * 80, "{a: " * 80),
]
mutations = st.lists(
    st.tuples(
        st.sampled_from(["insert", "word", "delete", "repeat", "swap", "cut"]),
        st.floats(0, 1),
        st.integers(0, 30),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=4,
)


def mutated(text, changes):
    for kind, where, length, token in changes:
        at = int(where * len(text))
        end = at + length
        if kind == "insert":
            text = text[:at] + token + text[at:]
        elif kind == "word":  # the whole value that stands there
            start = max(text.rfind(sign, 0, at) for sign in " [{,") + 1
            stop = min((i for sign in ",]}\n" if (i := text.find(sign, at)) >= 0), default=len(text))
            text = text[:start] + token + text[stop:]
        elif kind == "delete":
            text = text[:at] + text[end:]
        elif kind == "repeat":
            text = text[:end] + text[at:end] * 2 + text[end:]
        elif kind == "swap":
            text = text[:at] + text[end : end + length] + text[at:end] + text[end + length :]
        else:
            text = text[:at]
    return text


scalars = st.sampled_from(TOKENS) | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
names = st.sampled_from(
    [
        *("norms", "seeds", "tasks", "threads", "budget", "x-a", "<<", "classification", "few_shot", "bn", "gn", "bgn"),
        *("dataset", "num_groups", "eps", "epochs", "norm_batch_size", "learning_rate", "model", "shot", "method", "3"),
    ]
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(names | scalars, inner, max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=10,
)
generated = st.lists(st.tuples(names, values), max_size=5).map(lambda items: "".join(f"{k}: {v}\n" for k, v in items))
texts = st.builds(mutated, st.sampled_from(TEXTS), mutations) | generated


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """planned(text): a plan, or its lines. Norms are not tried: that is not what a text can break."""
    folder = tmp_path_factory.mktemp("fuzz")

    def call(text):
        file = folder / "c.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        start = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning.Trials, "why_not", lambda *given: None)
            try:
                result = plan(file, data_dir=folder, without_data=True)
            except PlanError as error:
                result = error.lines
        assert time.monotonic() - start < 20
        return result

    return call


def check(planned, text):
    result = planned(text)
    if isinstance(result, Plan):
        assert result.runs
        assert len({spec.key for spec in result.runs}) == len(result.runs)
        return
    assert 1 <= len(result) <= MOST_LINES
    for line in result:
        assert len(line) <= LONGEST_LINE
        assert len(line.splitlines()) == 1


fuzz = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], print_blob=True
)


@settings(fuzz, max_examples=250)
@given(text=texts)
def test_any_text_is_a_plan_or_a_few_lines(planned, text):
    check(planned, text)


@pytest.mark.slow
@settings(fuzz, max_examples=20_000)
@given(text=texts)
def test_any_text_is_a_plan_or_a_few_lines_at_length(planned, text):
    check(planned, text)


def test_the_texts_that_are_mutated_are_plans(planned):
    for text in TEXTS:
        assert isinstance(planned(text), Plan)
