"""The network of a finished run, from its weights: what `run --keep-weights` leaves as `weights.pt` in a run's folder.

Such a file, and a checkpoint, is one of torch.save that holds tensors and plain values alone, with one more member,
`normsuite.json`: of a checkpoint where the run stood, of weights the run's spec and what else its network is built
from. So `torch.load("weights.pt", weights_only=True)` is the state_dict, and the file is enough by itself. Reading one
executes nothing in it, and takes no more memory than the file has bytes, a few times over.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "weights.pt"
MEMBER = "normsuite.json"
KEPT_FORMAT = 1
LARGEST_NOTE = 2**20  # bytes of the member


def load_network(folder: str | Path) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network that a run has trained, on the CPU in evaluation mode, and what prepares images for it.

        net, prepare = tasks.load_network("runs/quick/runs/classification/bn/<key>")
        logits = norms.predict(net, prepare(images))  # images: (N, C, H, W), on the scale 0 to 255

    A run with the option `precision: bfloat16` was evaluated under `torch.autocast`; here that is the caller's choice.

    Args:
        folder: of the run, or the file itself.

    Raises:
        ValueError: there are no weights; the file is none of ours, or damaged; the run's norm or task is not here, or
            here in another version.
    """
    import torch

    from norms.generators import forked_generators

    file = _weights_file(Path(folder))
    try:
        note = note_in(file)
        if note["format"] != KEPT_FORMAT:
            raise ValueError(f"of format {note['format']!r:.40}; {KEPT_FORMAT} is read here")
        spec, facts = note["spec"], note["facts"]
        task, norm, version = (str(spec[name]) for name in ("task", "norm", "task_version"))
        norm_options, task_options, facts = dict(spec["norm_options"]), dict(spec["task_options"]), dict(facts)
        norms = {norm: str(spec["norm_version"]), **_further_norms(task_options)}
        weights = dict(tensors_in(file))
    except Exception as error:  # of zip, of json, of torch: each has its own
        raise ValueError(f'"{file}": not the weights of a run ({_one_line(error)})') from error
    build = _builder(file, task, version, norms, norm, _parts(spec))
    try:
        with forked_generators(torch.device("cpu")):
            net, prepare = build(norm_options, task_options, facts)
        net.load_state_dict(weights)
    except Exception as error:
        raise ValueError(f'"{file}": does not fit what is built here for it: {_one_line(error)}') from error
    return net.eval(), prepare


def note_in(file: Path) -> Any:
    """The member of ours, without torch. Raises OSError, KeyError, ValueError, RecursionError or one of zipfile's."""
    with zipfile.ZipFile(_regular(file)) as archive:
        info = archive.getinfo(member(archive))
        if info.file_size > LARGEST_NOTE:
            raise ValueError(f"its note has {info.file_size} bytes")
        return json.loads(archive.read(info))


def tensors_in(file: Path) -> Any:
    """The weights in a file of torch.save, on the CPU, every byte checked. Raises as `note_in` and as torch.load."""
    import torch

    with zipfile.ZipFile(_regular(file)) as archive:
        # torch compresses nothing: what is, or lies over another, could grow beyond the file
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise ValueError("its members overlap")
        if damaged := archive.testzip():
            raise ValueError(f'"{damaged}" is damaged')
    return torch.load(file, map_location="cpu", weights_only=True)


def member(archive: zipfile.ZipFile) -> str:
    """The name of our member: torch reads archives only where everything is in one folder."""
    return f"{archive.namelist()[0].partition('/')[0]}/{MEMBER}"


def _weights_file(folder: Path) -> Path:
    if not folder.is_dir():
        if os.path.lexists(folder):
            return folder
        raise ValueError(f'"{folder}" is not there; the folder of a run is needed, OUT/runs/TASK/NORM/KEY')
    file = folder / WEIGHTS
    if os.path.lexists(file):
        return file
    if (folder / "record.json").exists():
        raise ValueError(
            f'"{folder}" has no {WEIGHTS}: a run keeps its weights with --keep-weights, once it is ok. A run that is '
            "done is not made again: give another --out, too"
        )
    raise ValueError(f'"{folder}" has no {WEIGHTS}; the folder of a run is needed, OUT/runs/TASK/NORM/KEY')


def _builder(
    file: Path, name: str, version: str, norms: Mapping[str, str], norm: str, parts: Mapping[str, str]
) -> Callable[..., Any]:
    """(norm_options, task_options, facts) -> what Task.network gives, if all versions are those of the run."""
    from norms.registry import make_norm, norm_info
    from tasks import get_task, task_version

    asked = [(f'task "{name}"', version, lambda: task_version(name))]
    asked += [(f'norm "{n}"', v, lambda n=n: str(norm_info(n).version)) for n, v in norms.items()]  # type: ignore[misc]
    asked += [(part, v, lambda part=part: _part_version(part)) for part, v in parts.items()]  # type: ignore[misc]
    for what, made, here in asked:
        try:
            found = here()
        except ValueError as error:
            raise ValueError(
                f'"{file}": {what} of the run is not here: {error}; a plugin\'s is after norms.load_plugin(FILE)'
            ) from error
        if found != made:
            raise ValueError(f'"{file}": made with version {made} of {what}, here is {found}: make the run again')
    task: Any = get_task(name)
    if not hasattr(task, "network"):
        raise ValueError(f'"{file}": task "{name}" does not say how its network is built: it has no method `network`')
    return lambda norm_options, task_options, facts: task.network(
        make_norm(norm, **norm_options), task.options.model_validate(task_options), facts
    )


def _further_norms(task_options: Mapping[str, Any]) -> dict[str, str]:
    """name -> version of the norms that task options name (tasks.options.NormChoice)."""
    choices = [v for v in task_options.values() if isinstance(v, Mapping) and {"name", "version"} <= v.keys()]
    return {str(choice["name"]): str(choice["version"]) for choice in choices}


def _parts(spec: Mapping[str, Any]) -> dict[str, str]:
    """'model "mine"' -> version of what a plugin registered (results.record.RunSpec.parts)."""
    found = {}
    for option, part in dict(spec.get("parts", {})).items():
        name, _, version = str(part).rpartition("@")
        found[f'{option.rpartition("_")[2]} "{name}"'] = version
    return found


def _part_version(part: str) -> str:
    from norms import plugins

    kind, _, name = part.partition(" ")
    plugin = plugins.plugin_of(kind, name.strip('"'))
    if plugin is None:
        raise ValueError("no plugin has registered it")
    return plugin.version


def _regular(file: Path) -> Path:
    """`file` itself, which is no link, folder or device. Raises OSError."""
    if not stat.S_ISREG(os.lstat(file).st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(file))
    return file


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
