"""One task's runs, arranged: rows (norm and options) x blocks (settings) x seeds, and the cell of any of them.

A block is one combination of the task options that vary. Runs without a norm batch (their norm does not mix samples)
stand in the block of every norm batch.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import pandas as pd

from results import statistics as summary
from results.derived import with_derived
from results.escape import cut
from results.facts import task_facts
from results.frame import ENDED, NORM_BATCH
from results.metrics import Metric, domain_of
from results.rows import Run, distinct, natural, option_columns, plain_records, value_text
from results.tables.table import Cell, OptionTexts

Block = tuple[Any, ...]
BATCH_COLUMN = f"option.{NORM_BATCH}"
REASON_LENGTH = 160
LONGEST_VALUE = 60
"""Characters of an option's value that are printed; CSV has all."""
REFERENCE = "bn"
"""The norm that others are compared with, unless another one is named."""
OUTCOME = Metric("outcome", "outcome", description="How runs ended, where none of a task ended well.")


class Pivot:
    """One task's current runs.

    Args:
        df: a frame of `results.load` that holds one task.
        reference: label or name of the norm that others are compared with; without such a norm nothing is compared.
        always: an `option.<name>` column that counts as varying even with a single value.

    Attributes:
        task: its name.
        facts: what is known of the task (results.facts).
        varying: the option columns with more than one value (and those that are always shown), in order; a block
            holds their values.
        blocks: every block, in natural order.
        rows: identities of rows, the reference first, then by label.
        labels, norms: a row's printed label and its norm's name.
        runs: (row, block) -> seed -> run.
        repeats: (row, block without the norm batch) whose runs stand in every norm batch.
        seeds: block -> every seed that any row has there.
        of_domains: the metrics of single held-out domains, for each of which a run stands behind a folded one.
        domains: block -> the held-out domains that its runs are folded from; none where they are single runs.
        metrics: the measured metrics in the vocabulary's order.
        fixed: (option, value) of the options with one value.
        implied: the varying options that another one (of facts.deciding) decides: one value for each of its values,
            whatever else varies; the deciding option -> the implied one -> value of the one -> value of the other.
        surplus: runs that a newer one of the same row, block and seed replaced.
    """

    def __init__(self, df: pd.DataFrame, reference: str, always: str | None = None):
        self.task = str(df["task"].iloc[0])
        self.facts = task_facts(df, self.task)
        names = self.facts.in_order(self.facts.present)
        self.metrics = [self.facts.metric(name) for name in names]
        options = option_columns(df)
        # without any entry it is of another task
        ends = [c for c in map(str, df.columns) if c.startswith(ENDED) and df[c].notna().any()]
        self.of_domains = [c.removeprefix(ENDED) for c in ends if c.startswith(f"{ENDED}{self.facts.subject}/")]
        records = plain_records(df, [*FIELDS, *options, *names, *ends])
        others = [o for o in options if o != BATCH_COLUMN]
        # per setting: another norm that an option names may mix samples where the row's own does not
        mixing = {(r["row"], *(r[o] for o in others)) for r in records if r.get(BATCH_COLUMN) is not None}
        for r in records:
            alone = (r["row"], *(r[o] for o in others)) not in mixing
            r["repeats"] = bool(r["repeats"]) and BATCH_COLUMN in options and alone
        values = {o: distinct(r[o] for r in records if o != BATCH_COLUMN or not r["repeats"]) for o in options}
        shown = {f"option.{name}" for name in self.facts.always_shown} | {always}
        self.varying = [o for o in options if len(values[o]) > 1 or o in shown]
        self.fixed: OptionTexts = tuple(
            (name, value_text(name, values[o][0]))
            for o in options
            if o not in self.varying and values[o] and values[o][0] is not None
            for name in [o.removeprefix("option.")]
        )
        self.surplus = int(df.attrs.get("surplus", {}).get(self.task, 0))
        self._arrange(records)
        self.implied = self._implied()
        self._name(records, reference)

    def _arrange(self, records: list[Run]) -> None:
        place = self.varying.index(BATCH_COLUMN) if BATCH_COLUMN in self.varying else None
        batches: dict[Block, set[Any]] = defaultdict(set)  # norm batches by the rest of the block
        for r in records:
            if not r["repeats"] and place is not None:
                batches[without(tuple(r[o] for o in self.varying), place)].add(r[BATCH_COLUMN])
        anywhere = set().union(*batches.values())
        self.runs: dict[tuple[str, Block], dict[int, Run]] = defaultdict(dict)
        self.repeats: set[tuple[str, Block]] = set()
        for r in sorted(records, key=lambda r: (r["finished"], str(r["key"]))):
            block = tuple(r[o] for o in self.varying)
            homes = {block}
            if r["repeats"] and place is not None:
                rest = without(block, place)
                homes = {(*rest[:place], v, *rest[place:]) for v in batches.get(rest) or anywhere}
                self.repeats.add((r["row"], rest))
            self.surplus += any(r["seed"] in self.runs[r["row"], home] for home in homes)
            for home in homes:
                self.runs[r["row"], home][r["seed"]] = r
        self.blocks = sorted({block for _, block in self.runs}, key=lambda b: tuple(natural(v) for v in b))
        seeds: dict[Block, set[int]] = defaultdict(set)
        domains: dict[Block, set[str]] = defaultdict(set)
        for (_, block), runs in self.runs.items():
            seeds[block] |= runs.keys()
            domains[block] |= {domain_of(name) for r in runs.values() for name in self._parts(r)}
        self.seeds = {block: sorted(found) for block, found in seeds.items()}
        self.domains = {block: sorted(found, key=natural) for block, found in domains.items()}

    def _implied(self) -> dict[str, dict[str, dict[Any, Any]]]:
        """deciding option -> implied option -> value of the one -> value of the other."""
        columns = {f"option.{name}": name for name in self.facts.deciding}
        found: dict[str, dict[str, dict[Any, Any]]] = {}
        taken = {*columns, *(f"option.{name}" for name in self.facts.always_shown)}
        for column, name in columns.items():
            if column not in self.varying:
                continue
            place, found[name] = self.varying.index(column), {}
            for i, option in enumerate(self.varying):
                pairs = {(block[place], block[i]) for block in self.blocks}
                if option not in taken and len(pairs) == len(dict(pairs)):
                    found[name][option.removeprefix("option.")] = dict(pairs)
                    taken.add(option)
        return found

    def _name(self, records: list[Run], reference: str) -> None:
        newest: dict[str, Run] = {}
        for r in sorted(records, key=lambda r: (r["finished"], str(r["key"]))):
            newest[r["row"]] = r
        self.norms = {row: str(r["norm"]) for row, r in newest.items()}
        self.labels = {row: str(r["norm_label"] or row) for row, r in newest.items()}
        by_label: dict[str, list[str]] = defaultdict(list)
        for row, label in self.labels.items():
            by_label[label].append(row)
        for label, rows in by_label.items():
            if len(rows) > 1:  # two rows that people call by one name: the identity tells them apart
                self.labels.update({row: label if row == label else f"{label} [{row}]" for row in rows})
        named = [row for row in newest if self.labels[row] == reference]
        named = named or [row for row in newest if self.norms[row] == reference]
        self.reference = named[0] if len(named) == 1 else None
        self.rows = sorted(newest, key=lambda row: (row != self.reference, natural(self.labels[row]), row))

    @functools.cached_property
    def kinds(self) -> dict[Block, set[str]]:
        """block -> kinds of data ("real", "synthetic") of its runs."""
        found: dict[Block, set[str]] = {block: set() for block in self.blocks}
        for (_, block), runs in self.runs.items():
            found[block] |= {str(run["data"]) for run in runs.values() if run["data"]}
        return found

    def repeated(self, row: str, block: Block) -> bool:
        """Whether the runs here stand in every norm batch."""
        place = self.varying.index(BATCH_COLUMN) if BATCH_COLUMN in self.varying else None
        return (row, without(block, place)) in self.repeats

    def sweeps(self, option: str) -> bool:
        """Whether this option takes two values anywhere while all others stay."""
        if f"option.{option}" not in self.varying:
            return False
        place = self.varying.index(f"option.{option}")
        return len({without(block, place) for block in self.blocks}) < len(self.blocks)

    def asked(self, row: str, block: Block) -> bool:
        """Whether a run of this row left a record here; such a row has a cell, which may be a hole.

        Plans are not stored, records are, those of skipped and failed runs among them.
        """
        return (row, block) in self.runs

    def applies(self, block: Block, metric: Metric) -> bool:
        """Whether some run of a block can have this metric. Source-only runs have no gain; runs of one data set
        have no domains of another."""
        runs = (r for row in self.rows for r in self.runs.get((row, block), {}).values())
        return any(ended(r, metric.name) is not None for r in runs)

    def values(self, row: str, block: Block, metric: Metric) -> dict[int, float]:
        """seed -> value, of the runs that ended well and hold one."""
        runs = self.runs.get((row, block), {})
        found = {seed: r.get(metric.name) for seed, r in runs.items() if ended(r, metric.name) == "ok"}
        return {seed: float(v) for seed, v in found.items() if v is not None}

    def cell(self, row: str, block: Block, metric: Metric) -> Cell:
        """The cell of a row, block and metric, compared with the reference, not yet marked."""
        runs = self.runs.get((row, block), {})
        own = self.values(row, block, metric)
        ends = {seed: ended(r, metric.name) for seed, r in runs.items()}
        count = Counter(ends.values())
        mean, std, n, ci95 = summary.summarize(own.values())
        told = ("failed", "skipped", "missing", *(["diverged"] if metric == OUTCOME else []))
        whys = {_why(runs[seed], end) for seed, end in ends.items() if end in told}
        reason = "; ".join(sorted(whys - {""}))
        same = {str(r["equals"] or "") for r in runs.values() if r["status"] == "ok"}
        equals = same.pop() if len(same) == 1 else ""
        cell = Cell(
            mean=mean,
            std=std,
            n=n,
            ci95=ci95,
            diverged=count["diverged"],
            failed=count["failed"],
            skipped=count["skipped"],
            missing=len(self.seeds[block]) - len(runs) + count["missing"],
            unmeasured=count["ok"] - n,
            repeated=self.repeated(row, block),
            equals="" if equals == self.norms[row] else equals,
            reason=cut(reason, REASON_LENGTH),
            keys=tuple(str(runs[seed]["key"]) for seed in sorted(runs)),
        )
        if self.reference in (None, row):
            return cell
        against = self.runs.get((str(self.reference), block), {})
        both = (*runs.values(), *against.values())
        whole = not any(ended(r, metric.name) in ("diverged", "failed") for r in both)
        return summary.compare(cell, own, self.values(str(self.reference), block, metric), metric, whole)

    def holes(self) -> tuple[dict[str, int], int]:
        """The number of runs by status (missing ones included) and of runs asked for; repeated runs count once.

        Of a folded row each of its runs counts.
        """
        count = dict.fromkeys((*STATUSES, "missing"), 0)
        seen = set()
        place = self.varying.index(BATCH_COLUMN) if BATCH_COLUMN in self.varying else None
        for row in self.rows:
            for block in self.blocks:
                if not self.asked(row, block):
                    continue
                where = without(block, place) if self.repeated(row, block) else block
                runs = self.runs.get((row, block), {})
                folded = len(self.domains[block]) or 1
                for seed in self.seeds[block]:
                    if (row, where, seed) not in seen:
                        seen.add((row, where, seed))
                        run = runs.get(seed)
                        ends = ["missing"] * folded if run is None else self._parts(run).values() or [run["status"]]
                        for end in ends:
                            count[end] += 1
        return count, sum(count.values())

    def _parts(self, run: Run) -> dict[str, str]:
        """Metric of a domain -> how its run ended, of the runs that this one is folded from; empty for a single run."""
        return {name: end for name in self.of_domains for end in [ended(run, name)] if end is not None}


def every_pivot(df: pd.DataFrame, reference: str = REFERENCE) -> list[Pivot]:
    """The arranged runs of each task of a frame, with the metrics that need several runs. df: of `results.load`."""
    whole = with_derived(df)
    return [Pivot(whole[whole["task"] == task], reference) for task in distinct(whole["task"])] if len(whole) else []


STATUSES = ("ok", "diverged", "failed", "skipped")
FIELDS = ("norm", "norm_label", "row", "seed", "status", "reason", "key", "equals", "data", "finished", "repeats")


def ended(run: Run, metric: str) -> str | None:
    """The status of one metric in a run: the run's, unless the metric has its own."""
    status: str | None = run.get(f"{ENDED}{metric}", run["status"])
    return status


def _why(run: Run, end: str | None) -> str:
    """The run's reason, if it is about this end."""
    return str(run["reason"] or "") if run["status"] in (end, "ok") else ""


def without(block: Block, place: int | None) -> Block:
    """A block less one of its values."""
    return block if place is None else (*block[:place], *block[place + 1 :])
