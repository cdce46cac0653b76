"""What stands under a table, sentence by sentence, so that nobody has to trust a number without its circumstances."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from results import statistics as summary
from results.derived import LARGEST, SOURCE_ONLY
from results.escape import cut
from results.frame import BASELINE, ENVIRONMENT, HELD_OUT, METHOD, NORM_BATCH
from results.metrics import GAIN, Metric, domain_of
from results.rows import distinct, plain_records, value_text
from results.tables.pivot import LONGEST_VALUE, Pivot
from results.tables.table import Cell, Row, Table

FLOAT_NOISE = 1e-3
"""Changes of logits, at most, that rounding in another order explains."""


def pivot_caption(pivot: Pivot, df: pd.DataFrame, rows: Sequence[Row], shown: Iterable[Metric]) -> tuple[str, ...]:
    """The sentences under a table of a pivot's cells: spread, seeds, holes, marks, tests, common options, evidence.

    Args:
        pivot: the table's.
        df: the single runs behind it.
        rows: the table's.
        shown: the metrics that the table shows.
    """
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    lines = [_values(pivot, rows)]
    lines += _several_runs(pivot, df, {metric.name: metric for metric in shown})
    count, total = pivot.holes()
    lines.append(
        f"Runs: {total}, of which {count['ok']} ok, {count['diverged']} diverged, {count['failed']} failed, "
        f"{count['skipped']} skipped, {count['missing']} missing."
    )
    pairs = list(itertools.product(pivot.rows, pivot.blocks))
    absent = sum(not pivot.asked(row, block) for row, block in pairs)
    if absent:
        lines.append(
            f"Left out, without a current record: {absent} of {len(pairs)} pairs of norm and setting (not asked for "
            "there, or not yet begun)."
        )
    lines += _marks(pivot, cells)
    if pivot.surplus:
        lines.append(
            f"{pivot.surplus} records of a seed and setting that another one fills are left out (newest counts)."
        )
    if pivot.fixed:
        lines.append("Common: " + ", ".join(f"{k}={cut(v, LONGEST_VALUE)}" for k, v in pivot.fixed) + ".")
    for deciding, implied in pivot.implied.items():
        for value in distinct(value for values in implied.values() for value in values):
            # null says that it is not used there
            used = {option: values[value] for option, values in implied.items() if values[value] is not None}
            if used:
                own = ", ".join(f"{o}={cut(value_text(o, given), LONGEST_VALUE)}" for o, given in used.items())
                lines.append(f"With {deciding}={cut(str(value), LONGEST_VALUE)}: {own}.")
    return (*lines, *workers(df), *chosen(pivot, df), *evidence(df))


def short_caption(pivot: Pivot, rows: Sequence[Row]) -> tuple[str, ...]:
    """The sentences of `pivot_caption` without which the numbers can not be read: spread, n, seeds, marks."""
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    return (_values(pivot, rows), *_marks(pivot, cells))


def _values(pivot: Pivot, rows: Sequence[Row]) -> str:
    """What a cell is the mean of."""
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    usual = Table("", "", (), tuple(rows)).usual_n
    seeds = sorted({seed for block in pivot.blocks for seed in pivot.seeds[block]})
    one = "one seed a cell" if any(pivot.domains.values()) else "one run a cell"
    spread = "mean ± sample standard deviation (n - 1)" if any(c.std is not None for c in cells) else one
    less = ", less the holes in footnotes" if any(c.holes for c in cells) else ""
    other = " unless given" if any(c.seeds != usual for c in cells) else ""
    if any(c.n for c in cells):
        return f"Values: {spread}; n = {usual}{other}{less}; {seed_list(seeds)}."
    return f"No run here has a value: the footnotes say why; {seed_list(seeds)}."


def _marks(pivot: Pivot, cells: Sequence[Cell]) -> list[str]:
    """What bold, underlined and † mean."""
    lines = []
    if any(c.best for c in cells):
        lines.append("Best mean bold, second underlined, in each group and column; cells with holes are not eligible.")
    if pivot.reference is not None and len(pivot.rows) > 1:
        lines += tests(pivot.labels[pivot.reference], cells)
    return lines


def _several_runs(pivot: Pivot, df: pd.DataFrame, shown: Mapping[str, Metric]) -> list[str]:
    """How the values that need several runs are made."""
    lines = []
    sets = dict.fromkeys(tuple(pivot.domains[block]) for block in pivot.blocks)
    texts = [f"{', '.join(domains)}: {len(domains)} run{'s' * (len(domains) > 1)}" for domains in sets if domains]
    if texts and not all(domain_of(name) for name in shown):
        worst = pivot.facts.worst
        end = "highest" if worst in shown and shown[worst].higher_is_better is False else "lowest"
        own = [f", {shown[worst].title} is their {end}"] if worst in shown else []
        largest = " and ".join(shown[name].title for name in LARGEST if name in shown)
        own += [f", {largest} their largest"] if largest else []
        lines.append(
            f"Each seed's value is the mean over the {domains_name(pivot)} ({'; '.join(texts)}){''.join(own)}; "
            "it needs all of these runs."
        )
    if GAIN in shown and any(pivot.applies(block, shown[GAIN]) for block in pivot.blocks):
        subject = pivot.facts.metric(pivot.facts.subject)
        lines.append(
            f"{shown[GAIN].title}: {subject.title} less that of the {_baseline(df)} run of the same norm, seed and "
            "options; a hole where that run is one."
        )
    return lines


def domains_name(pivot: Pivot) -> str:
    """The noun for the values that a task folds over: "domains", ..."""
    over = pivot.facts.folds_over
    return "held-out domains" if over == HELD_OUT else f"values of {cut(over, LONGEST_VALUE)}"


def _baseline(df: pd.DataFrame) -> str:
    """What the runs that gains are over have in common: their method, where the folder names them by their keys."""
    if BASELINE not in df.columns:
        return SOURCE_ONLY
    keys, column = {*df[BASELINE]} - {None, ""}, f"option.{METHOD}"
    methods = distinct(df[column][df["key"].isin(keys)].tolist()) if column in df.columns else []
    return cut(value_text(METHOD, methods[0]), LONGEST_VALUE) if len(methods) == 1 else "baseline"


def tests(reference: str, cells: Sequence[Cell]) -> list[str]:
    """What was tested against the reference, and what that can show."""
    pairs = [c.difference_n for c in cells if c.p is not None]
    untested = [c.difference_n for c in cells if c.p is None and c.difference_n]
    name = _test_name(pairs)
    if any(c.significant for c in cells):
        lines = [
            f"† differs from {reference}: {name} paired by seed, two-sided p < {summary.SIGNIFICANT}, "
            "not corrected for the number of comparisons; not tested where a run of either diverged or failed."
        ]
    elif not pairs:
        bad = untested and any(c.diverged or c.failed for c in cells)
        return [f"No test against {reference}: a run of either diverged or failed."] if bad else []
    elif 2 / 2 ** max(pairs) >= summary.SIGNIFICANT:
        floor = f"the exact sign-flip p can not fall below {2 / 2 ** max(pairs):.3g}"
        return [f"No significance marks: with {max(pairs)} paired seed{'s' * (max(pairs) > 1)} {floor}."]
    else:
        lines = [f"No cell differs from {reference} at p < {summary.SIGNIFICANT} ({name}, paired by seed)."]
    if 2 / 2 ** min(pairs) >= summary.SIGNIFICANT:
        needed = next(n for n in itertools.count(1) if 2 / 2**n < summary.SIGNIFICANT)
        lines.append(f"Fewer than {needed} pairs (here {min(pairs)} in some cells) can not reach that p.")
    return lines


def short_test(reference: str, cells: Sequence[Cell]) -> str:
    """The first of the sentences of `tests` in few words; "" where there is none."""
    pairs = [c.difference_n for c in cells if c.p is not None]
    if any(c.significant for c in cells):
        return f"† differs from {reference} ({_test_name(pairs)}, p < {summary.SIGNIFICANT}, uncorrected)."
    if pairs and 2 / 2 ** max(pairs) < summary.SIGNIFICANT:
        return f"No cell differs from {reference} at p < {summary.SIGNIFICANT} ({_test_name(pairs)})."
    if pairs:
        return f"Too few seeds to test against {reference}."
    return next(iter(tests(reference, cells)), "")


def _test_name(pairs: Sequence[int]) -> str:
    """The test behind the p values of cells with so many pairs each: exact, sampled, or which where."""
    most = summary.MOST_FLIPS
    sampled = f"with {summary.SAMPLED_FLIPS:,} sampled flips"
    if max(pairs, default=0) <= most:
        return "exact sign-flip test"
    if min(pairs) > most:
        return f"sign-flip test {sampled} (more than {most} pairs)"
    return f"sign-flip test (exact up to {most} pairs, {sampled} beyond)"


def workers(df: pd.DataFrame) -> list[str]:
    """Whose statistics those of runs with several workers are."""
    columns = {name: f"option.{name}" for name in ("workers", "sync_norms", NORM_BATCH)}
    if columns["workers"] not in df.columns:
        return []
    runs = plain_records(df, [c for c in columns.values() if c in df.columns])
    apart: dict[int, set[int]] = defaultdict(set)
    together: set[int] = set()
    for run in runs:
        count, batch = run[columns["workers"]], run.get(columns[NORM_BATCH])
        # of a norm that does not mix samples there is no norm batch
        if count is not None and count > 1 and batch is not None:
            if run.get(columns["sync_norms"]):
                together.add(int(count))
            else:
                apart[int(count)].add(int(batch))
    texts = [
        f"norm batch {', '.join(map(str, sorted(batches)))} on each of {count} workers"
        for count, batches in sorted(apart.items())
    ]
    texts += [f"statistics of all {count} workers" for count in sorted(together)]
    return [f"Workers: {'; '.join(texts)}."] if texts else []


def chosen(pivot: Pivot, df: pd.DataFrame) -> list[str]:
    """What was selected, by which seeds, and what each norm got."""
    story = df.attrs.get("selected", {}).get(pivot.task)
    if story is None:
        return []
    option = story["option"]
    got: dict[str, list[Any]] = {}
    for row in pivot.rows:
        part = df[(df["task"] == pivot.task) & (df["row"] == row)]
        got[pivot.labels[row]] = distinct(part[f"selected.{option}"].tolist())
    texts = [
        f"{label}: {'/'.join('nothing' if v is None else str(v) for v in values)}" for label, values in got.items()
    ]
    return [
        f"{option} selected per norm and setting by {story['metric']} on {seed_list(story['seeds'])}; reported on "
        f"{seed_list(story['reported'])}. Selected: {'; '.join(texts)}."
    ]


def evidence(df: pd.DataFrame) -> list[str]:
    """Evidence class, selection rule, what cells differ in, what was left out."""
    words = {column: _words(df, column) for column in ("data", "budget", "selection")}
    lines = [
        f"Evidence: {words['data']} data, {words['budget']} budget; reported checkpoint: {words['selection']}.",
    ]
    differing = []
    measured = df[df["status"].isin(["ok", "diverged"])]  # a skip has no surroundings
    for column in ENVIRONMENT:
        values = distinct(measured[column].tolist()) if column in df.columns else []
        if len(values) > 1:
            shown = [_short(str(v)) if column == "commit" else str(v) for v in values if v is not None]
            shown += ["not recorded"] if None in values else []
            differing.append(f"{column} ({', '.join(shown)})")
    if differing:
        lines.append(f"Cells differ in: {'; '.join(differing)}.")
    lines += _made_in_parts(measured)
    if "evidence.constant_output" in df.columns:
        constant = Counter(df["norm_label"][df["evidence.constant_output"].eq(True)].tolist())
        if constant:
            norms = ", ".join(f"{label} {n}" for label, n in sorted(constant.items()))
            lines.append(f"Runs whose network gives one constant output: {norms}.")
    if "composition_shift" in df.columns:
        mixing = sorted(set(df["norm_label"][df["composition_shift"] > FLOAT_NOISE]))
        if mixing:
            lines.append(
                f"In evaluation an image's logits depend on its batch mates (composition shift above {FLOAT_NOISE:g}): "
                f"{', '.join(mixing)}."
            )
    if "evidence.masking" in df.columns:
        pairs = zip(df["norm_label"], df["evidence.masking"], strict=True)
        signs = [(label, text) for label, text in pairs if isinstance(text, str)]
        masked = Counter(label for label, text in signs if text)
        if masked:
            runs = ", ".join(f"{label} {n}" for label, n in sorted(masked.items()))
            lines.append(f"Runs with signs of gradient masking: {runs}; for example: {max(t for _, t in signs)}.")
        elif signs:
            lines.append("No run shows one of the signs of gradient masking that its attacks can show.")
    tasks = set(df["task"])
    stale, data = (
        Counter({k: n for k, n in df.attrs.get(kind, {}).items() if k.partition(" / ")[0] in tasks})
        for kind in ("stale", "other_data")
    )
    for what, left in (("versions", stale - data), ("data", data)):
        if left:
            shown = [f"{place} {n}" for place, n in sorted(left.items())]
            lines.append(f"Left out, of other {what}: {left.total()} records ({', '.join(shown)}).")
    not_asked = sum(n for task, n in df.attrs.get("not_asked", {}).items() if task in tasks)
    if not_asked:
        lines.append(f"Left out, not asked for by the config: {not_asked} records.")
    if doubles := len(df.attrs.get("doubles", ())):
        runs = "1 more record of a run" if doubles == 1 else f"{doubles} more records of runs"
        lines.append(f"Left out, doubles: {runs} that {'has' if doubles == 1 else 'have'} one.")
    damaged = len(df.attrs.get("damaged", ()))
    if damaged:
        lines.append(f"{damaged} damaged record{'s' if damaged > 1 else ''} could not be read.")
    return lines


def _made_in_parts(measured: pd.DataFrame) -> list[str]:
    """How many runs were interrupted and went on elsewhere."""
    column = "environment.parts_differ"
    given = [text for text in measured[column] if isinstance(text, str) and text] if column in measured.columns else []
    if not given:
        return []
    names = sorted({name for text in given for name in text.split(", ")})
    runs = "1 run was" if len(given) == 1 else f"{len(given)} runs were"
    return [f"{runs} made in parts on different machines (their parts differ in {', '.join(names)})."]


def _short(commit: str) -> str:
    """The first nine digits, and what stands behind the hash ("+changes")."""
    digits, plus, rest = commit.partition("+")
    return digits[:9] + plus + rest


def _words(df: pd.DataFrame, column: str) -> str:
    given = [str(v) for v in distinct(df[column].tolist()) if v is not None and v != ""] if column in df.columns else []
    # a run over several domains may itself say "real and synthetic"
    return " and ".join(dict.fromkeys(part for value in given for part in value.split(" and "))) or "unrecorded"


def seed_list(seeds: Sequence[int]) -> str:
    """seed 3; seeds 0-4 for neighbours; seeds 0, 2, 5."""
    texts = [cut(str(seed), LONGEST_VALUE) for seed in seeds]
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {texts[0]}-{texts[-1]}"
    return f"seed{'s' if len(seeds) != 1 else ''} {', '.join(texts)}"
