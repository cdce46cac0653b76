"""The commands that measure a layer or a model: check, convert-report, bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from results.escape import cut
from suite.checking import check_lines, check_one_task, norms_to_check
from suite.cli import completing
from suite.cli.app import AsJson, DataDir, Plugins, app, as_options, parse_options
from suite.console import documented, painted, print_document, print_lines
from suite.launch.devices import check_device
from suite.plugins import load_plugins


@app.command()
def check(
    norms: Annotated[
        list[str] | None,
        typer.Argument(
            help="Norms to check, as gn or 'gn(num_groups=4)'.  [default: those of the plugins, else all]",
            autocompletion=completing.norm,
        ),
    ] = None,
    all_norms: Annotated[bool, typer.Option("--all", help="Every registered norm, plugins' included.")] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the one norm, such as num_groups=4 (repeatable)."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="Check this task instead, by small runs; --option is then one of the task.",
            autocompletion=completing.task,
        ),
    ] = None,
    norm: Annotated[
        str | None,
        typer.Option(
            "--norm",
            help="With --task: the norm of its runs, as bn or 'gn(num_groups=4)'.  [default: bn]",
            autocompletion=completing.norm,
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A Python file with a function reference(x, weight, bias, ...), to compare the one norm with."
        ),
    ] = None,
    as_json: AsJson = False,
    device: Annotated[
        str, typer.Option(help="Where the layers are measured: cpu, cuda, ...", autocompletion=completing.devices)
    ] = "cpu",
    plugin: Plugins = None,
    data_dir: DataDir = Path("data"),
) -> int:
    """Measure what norms (or, with --task, a task) promise; exit 1 when a fact is false.

    Under each false fact stands what usually causes it. A note: what a plugin's norm does not keep outside this suite.

    The file of --like is executed. Its reference(x, weight, bias, ...) gives the training output, and evaluation(x,
    running_mean, running_var, weight, bias, ...), where it is there, that of evaluation: a float64 tensor of the shape
    of x (N, C, H, W). Arguments are passed by name: x, any parameter, buffer or option of the norm, and domain (N,),
    conv_weight and activation where the norm needs them.
    """
    import torch

    from norms.conformance import check_like, check_norm
    from norms.conformance.like import load_formula
    from norms.registry import norm_info, norm_label, resolve_norm_options
    from suite.as_json import facts
    from suite.naming import both

    given = parse_options(options)
    if task is not None:
        for option, value in (("norms", norms), ("--all", all_norms), ("--like", like)):
            if value:
                raise ValueError(f"--task checks one task; {option} is for norms")
        if device != "cpu":
            raise ValueError(f'--device "{cut(device, 40)}": a task is checked on the cpu')
        return check_one_task(task, given, norm, plugin, data_dir, as_json)
    if norm is not None:
        raise ValueError("--norm is for --task; norms to check are named without it")
    with documented(as_json):
        chosen = norms_to_check(norms, all_norms, plugin)
        if len(chosen) != 1 and (given or like):
            option, those = "--option" if given else "--like", ", ".join(norms or ()) or f"{len(chosen)} norms"
            raise ValueError(f"{option} is for one norm; given {those}")
        with as_options():
            check_device(device)
        formula = None if like is None else load_formula(like)
        chosen = [(name, both(name, own, given)) for name, own in chosen]
    torch.set_num_threads(1)  # on inputs this small a second one costs more than it computes
    found, false = [], []
    for name, options_given in chosen:
        with torch.device(device), documented(as_json):
            checks = check_like(name, formula, **options_given) if formula else []
            checks += [c for c in check_norm(name, **options_given) if c not in checks]
        label = norm_label(name, options_given)
        used = {key: value for key, value in resolve_norm_options(name, options_given).items() if key in options_given}
        found.append({"norm": name, "options": used, "source": norm_info(name).source, "facts": facts(checks)})
        if not as_json:
            print_lines(map(painted, check_lines(f"{label}: {norm_info(name).source}", checks)))
            sys.stdout.flush()
        false += [f"{label}: {c.fact}: declared {c.declared}, measured {c.measured}" for c in checks if c.false]
    for line in false:
        print(f"false: {line}", file=sys.stderr)
    if as_json:
        print_document({"norms": found, "false": len(false)})
    else:
        print(f"{len(chosen)} norms checked, {len(false)} false facts")
    return 1 if false else 0


@app.command("convert-report")
def convert_report(
    model: Annotated[
        str,
        typer.Argument(help="A model of torchvision (classification, segmentation, detection, video), or timm:NAME."),
    ],
    norm: Annotated[
        str, typer.Argument(help="The norm to put in, as gn or 'gn(num_groups=8)'.", autocompletion=completing.norm)
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the norm, such as num_groups=8 (repeatable)."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="PATH", help="A norm of the model that stays (repeatable).")
    ] = None,
    plugin: Plugins = None,
) -> int:
    """Put a norm into an existing model, and show what was swapped and what was not; exit 1 when a norm is left.

    The model has random weights. It is forwarded once in both modes, on torch's meta device where model and norm can be
    (nothing is computed then), else on the CPU. A model whose norms are all channels-last (ViT, Swin) is refused. A
    detector is converted in parts where the norm needs more than x. A norm that stays because of --keep is left, too.
    """
    from norms.registry import make_norm, norm_label
    from suite.foreign import conversion_lines, convert_model
    from suite.naming import both, named_norm

    load_plugins(plugin)
    name, own = named_norm(norm)
    given = both(name, own, parse_options(options))
    factory, label = make_norm(name, **given), norm_label(name, given)
    conversion = convert_model(model, factory, label, keep or ())
    print_lines(conversion_lines(conversion, model, label))
    return 0 if conversion.complete else 1


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which benchmarks.  [default: all]")] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="Write them into this page of Markdown, too, each as soon as it is measured, with command, commit, "
            "machine and date; other benchmarks on it stay."
        ),
    ] = None,
) -> None:
    """Timings as ratios: layers, training steps, checkpoints, the loop, images read, the allocator, scale."""
    from norms.kernels.native import kernels
    from norms.values import nearest
    from suite.bench.timings import BENCHMARKS

    unknown = [name for name in names or () if name not in BENCHMARKS]
    if unknown:
        lines = [
            f'unknown benchmark "{n}"; benchmarks: {", ".join(BENCHMARKS)}{nearest(n, BENCHMARKS)}' for n in unknown
        ]
        raise ValueError("\n".join(lines))
    print(f"kernels: {kernels()}", flush=True)
    for name in names or BENCHMARKS:
        lines = []
        for line in BENCHMARKS[name]():
            print(line, flush=True)
            lines.append(line)
        if page is not None:
            from suite.bench.page import write_benchmark

            write_benchmark(page, name, lines)
