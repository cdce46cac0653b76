"""norms/kernels/native.c, compiled: four loops over memory, for a CPU.

The library is built when the project is installed (pyproject.toml), without torch's headers, and called by ctypes. It is
not there without a C compiler; then, and for whatever `serves` refuses, norms.kernels computes the same in operations
of torch. NORMSUITE_KERNELS=torch leaves it out on purpose.

Tables are float64 and contiguous, (K, C): row n % K is that of sample n. Inputs lie in memory as `layout` says, so that
one pass goes straight over it. Nothing here has a gradient: norms.kernels.moments, affine and grouping do that.

Axes: N sample, C channel, P position, K row of a table, G group.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from norms.channels import ordinary

SWITCH = "NORMSUITE_KERNELS"
"""An environment variable: "native" (or unset) or "torch"."""

VERSION = 1
"""Of the calls in native.c. A library of another one, from an earlier checkout for example, is not used."""

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_POINTER, _SIZE, _CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_VIEW = [_CODE, _CODE, *[_SIZE] * 4]  # type, layout, N, C, P, K
_CALLS = {
    "moments": [*_VIEW, *[_POINTER] * 3, _CODE],
    "affine": [*_VIEW, *[_POINTER] * 5, _CODE],
    "sums": [*_VIEW, *[_POINTER] * 8, _CODE],
    "blend": [*_VIEW, *[_POINTER] * 9, _CODE],
    "normalize": [*_VIEW, _SIZE, ctypes.c_double, *[_POINTER] * 3, _CODE, _CODE, *[_POINTER] * 2, _CODE],
    "normalize_backward": [*_VIEW, _SIZE, *[_POINTER] * 3, _CODE, *[_POINTER] * 4, _CODE],
    "rows_forward": [*_VIEW[:-1], _CODE, _CODE, ctypes.c_double, *[_POINTER] * 4, _CODE],
    "rows_backward": [*_VIEW[:-1], _CODE, _CODE, ctypes.c_double, *[_POINTER] * 6, _CODE],
}


def load(path: str | Path) -> ctypes.CDLL:
    """The compiled library in a file.

    Raises:
        OSError: it can not be loaded, or is of another version; the text says which.
    """
    library = ctypes.CDLL(str(path))
    try:
        found = library.normsuite_version()
        for name, arguments in _CALLS.items():
            getattr(library, f"normsuite_{name}").argtypes = arguments
    except AttributeError as error:
        raise OSError(f"{path}: {error}") from None
    if found != VERSION:
        raise OSError(f"{path} is of version {found}, and {VERSION} is needed")
    return library


def _find() -> ctypes.CDLL | None:
    wish = os.environ.get(SWITCH) or "native"
    if wish not in ("native", "torch"):
        raise ValueError(f'{SWITCH}="{wish}": "native" or "torch"')
    if wish == "torch":
        return None
    files = [Path(__file__).parent / f"_native{end}" for end in importlib.machinery.EXTENSION_SUFFIXES]
    there = [file for file in files if file.exists()]
    try:
        if there:
            return load(there[0])
        problem = "it was not built"
    except OSError as error:
        problem = str(error)
    warnings.warn(
        f"norms.kernels: operations of torch take the place of the native library ({problem}); with a C compiler, "
        "install the project again to have it: pip install --editable .",
        stacklevel=2,
    )
    return None


_library = _find()


def kernels() -> str:
    """Which kernels serve on a CPU: "native" or "torch"."""
    return "torch" if _library is None else "native"


def layout(x: Tensor) -> int | None:
    """How x (N, C, *) lies in memory: 0 contiguous, 1 channels innermost, None otherwise."""
    if x.is_contiguous():
        return 0
    return 1 if x.movedim(1, -1).is_contiguous() else None


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy where `layout` does not know how it lies."""
    return x if layout(x) is not None else x.contiguous()


def serves(*tensors: Tensor) -> bool:
    """Whether the library computes with these: ordinary tensors of a CPU of one known type, not empty."""
    x = tensors[0]
    return (
        _library is not None
        and x.device.type == "cpu"
        and x.dtype in TYPES
        and ordinary(x)
        and x.numel() > 0
        and all(t.dtype == x.dtype for t in tensors[1:])
    )


def moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C), over positions and the samples that are alike modulo K."""
    mean, var = x.new_empty(2, rows, x.shape[1], dtype=torch.float64).unbind()
    _call("moments", *_view(x, rows), x, mean, var)
    return mean, var


def affine(x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None) -> Tensor:
    """scale * x + shift, at least `floor`; tables (K, C). As x."""
    y = torch.empty_like(x)
    _call("affine", *_view(x, len(scale)), x, scale, shift, floor, y)
    return y


def sums(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, floor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums (K, C) of dy * x and of dy, and with a floor of the dy that it stopped, which are not in the others."""
    room = x.new_empty(2 if floor is None else 3, *scale.shape, dtype=torch.float64)
    _call(
        "sums", *_view(x, len(scale)), like(dy, x), x, scale, shift, floor, *room, *(() if len(room) == 3 else (None,))
    )
    return room[0], room[1], None if floor is None else room[2]


def blend(
    dy: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None = None,
    floor: Tensor | None = None,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The gradient of x: scale * dy, where the floor did not stop it, and that of moments. As x.

    Args:
        dy: of the affine map's output, and scale, shift (which only a floor needs) and floor as the map had them.
        moments: the mean of x and the gradients of its mean and its biased variance, (K, C).
    """
    dx = torch.empty_like(x)
    if dy is not None:
        dy = like(dy, x)
    table = scale if scale is not None else moments[0]  # type: ignore[index]
    _call("blend", *_view(x, len(table)), dy, x, scale, shift, floor, *(moments or (None, None, None)), dx)
    return dx


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    rows: int,
    eps: float,
    given: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """y as x, and (3, K, G): mean, biased variance and 1 / sqrt(variance + eps) of G groups of a sample's values.

    Args:
        weight: (C,) in float32 or float64, and bias likewise; or both None.
        given: mean and variance (K, G) to take; None: those of x.
    """
    stats = x.new_empty(3, rows, groups, dtype=torch.float64)
    if given is not None:
        stats[0], stats[1] = given
    wide = weight is not None and weight.dtype == torch.float64
    y = torch.empty_like(x)
    _call("normalize", *_view(x, rows), groups, eps, x, weight, bias, wide, given is not None, stats, y)
    return y, stats


def normalize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, wanted: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (None if it is not wanted), weight and bias of `normalize`, whose moments were those of x."""
    dx = torch.empty_like(x) if wanted else None
    d_weight, d_bias = (None, None) if weight is None else (torch.empty_like(weight), torch.empty_like(weight))
    rows, groups = stats.shape[1:]
    wide = weight is not None and weight.dtype == torch.float64
    view = _view(x, rows)
    _call("normalize_backward", *view, groups, like(dy, x), x, weight, wide, stats, d_weight, d_bias, dx)
    return dx, d_weight, d_bias


def rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, unbiased: bool) -> Tensor:
    """x normalized over the channels at each position. As x.

    Args:
        weight: (C,) in float32, float64 for x in float64, and bias likewise; or both None.
        centred: the mean is subtracted; False: it is taken for 0 (root mean square).
        unbiased: the variance divides by C - 1; False: by C.
    """
    y = torch.empty_like(x)
    _call("rows_forward", *_view(x, 0)[:-1], centred, unbiased, eps, x, weight, bias, y)
    return y


def rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    centred: bool,
    unbiased: bool,
    wanted: bool,
    parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (None if it is not wanted), weight and bias (None without `parameters`) of `rows`."""
    dx = torch.empty_like(x) if wanted else None
    d_weight, d_bias = None, None
    if weight is not None and parameters:
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    _call("rows_backward", *_view(x, 0)[:-1], centred, unbiased, eps, like(dy, x), x, weight, d_weight, d_bias, dx)
    return dx, d_weight, d_bias


def _view(x: Tensor, rows: int) -> tuple[int, ...]:
    last = 0 if x.is_contiguous() else 1
    return TYPES[x.dtype], last, x.shape[0], x.shape[1], math.prod(x.shape[2:]), rows


def like(dy: Tensor, x: Tensor) -> Tensor:
    """dy as x lies in memory; a copy where it lies otherwise."""
    if dy.dtype != x.dtype:
        dy = dy.to(x.dtype)
    if dy.stride() == x.stride():
        return dy
    if x.is_contiguous():
        return dy.contiguous()
    return dy.movedim(1, -1).contiguous().movedim(-1, 1)


def _call(name: str, *arguments: Tensor | float | None) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if getattr(_library, f"normsuite_{name}")(*given, torch.get_num_threads()):
        raise MemoryError(f"norms.kernels: no memory for the tables of {name}")
