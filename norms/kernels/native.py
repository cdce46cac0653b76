"""norms/kernels/native.c, compiled: four loops over memory, for a CPU.

The library is built when the project is installed (pyproject.toml), without torch's headers, and called by ctypes. It
is not there without a C compiler, nor for an x86 without AVX2; then, and for whatever `ready` refuses, norms.kernels
computes the same in operations of torch. NORMSUITE_KERNELS=torch leaves it out on purpose.

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
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from norms.channels import transformed
from norms.values import nearest

SWITCH = "NORMSUITE_KERNELS"
"""Environment variable: "native" (or unset) or "torch". A process that finds no library it can use says so once and
sets it to "torch", so that the processes it starts neither look nor warn again."""

VERSION = 2
"""Of the calls in native.c. A library of another one, from an earlier checkout for example, is not used."""

GATE, DIVIDE = 0, 1
"""Curves: x * sigmoid(k0 x) * k1 + k2, and x / max(k2, k0 x + k1) * k3 + k4."""

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

_POINTER, _SIZE, _CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_VIEW = [_CODE, _CODE, *[_SIZE] * 4]  # type, layout, N, C, P, K
_CALLS = {
    "moments": [*_VIEW, *[_POINTER] * 3, _CODE],
    "affine": [*_VIEW, *[_POINTER] * 5, _CODE],
    "sums": [*_VIEW, *[_POINTER] * 8, _CODE],
    "blend": [*_VIEW, *[_POINTER] * 9, _CODE],
    "normalize": [*_VIEW, _SIZE, _CODE, ctypes.c_double, *[_POINTER] * 3, _CODE, _CODE, *[_POINTER] * 2, _CODE],
    "track": [_CODE, _SIZE, _SIZE, *[_POINTER] * 2, ctypes.c_double, *[_POINTER] * 2],
    "normalize_backward": [*_VIEW, _SIZE, _CODE, *[_POINTER] * 3, _CODE, _CODE, *[_POINTER] * 4, _CODE],
    "curve": [*_VIEW, _CODE, *[_POINTER] * 8, _CODE],
    "rows_forward": [*_VIEW[:-1], _CODE, _CODE, ctypes.c_double, *[_POINTER] * 4, _CODE],
    "rows_backward": [*_VIEW[:-1], _CODE, _CODE, ctypes.c_double, *[_POINTER] * 6, _CODE],
}


def load(path: str | Path) -> ctypes.CDLL:
    """The compiled library in a file.

    Raises:
        OSError: it can not be loaded, is of another version, or this processor can not run it; the text says which.
    """
    library = _opened(str(path))
    try:
        found, supported = library.normsuite_version(), library.normsuite_supported()
        for name, arguments in _CALLS.items():
            getattr(library, f"normsuite_{name}").argtypes = arguments
    except AttributeError as error:
        raise OSError(f"{path}: {error}") from None
    if found != VERSION:
        raise OSError(f"{path} is of version {found}, and {VERSION} is needed")
    if not supported:
        raise OSError(f"{path} needs a processor with AVX2 and FMA")
    return library


def _opened(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        if "GOMP_" not in str(error):
            raise
    # This torch has brought another OpenMP than GCC's, or none.
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(path)


def _find() -> ctypes.CDLL | None:
    wish = os.environ.get(SWITCH) or "native"
    if wish not in (allowed := ("native", "torch")):
        raise ValueError(f'{SWITCH}: unknown kernels "{wish}"; kernels: native, torch{nearest(wish, allowed)}')
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
    os.environ[SWITCH] = "torch"
    return None


_library = _find()
_functions = {name: getattr(_library, f"normsuite_{name}") for name in _CALLS if _library is not None}


def kernels() -> str:
    """Which kernels serve on a CPU: "native" or "torch"."""
    return "torch" if _library is None else "native"


def layout(x: Tensor) -> int | None:
    """How x (N, C, *) lies in memory: 0 contiguous, 1 channels innermost, None otherwise."""
    if x.is_contiguous():
        return 0
    if x.dim() == 4:
        return 1 if x.is_contiguous(memory_format=torch.channels_last) else None
    return 1 if x.movedim(1, -1).is_contiguous() else None


def ready(x: Tensor) -> Tensor | None:
    """x (N, C, *) as the library reads it, a copy where it lies in another way; None where the library does not serve.

    It serves ordinary tensors of a CPU of a known type that are not empty, outside compilation and torch.func.
    """
    if (
        _library is None
        or torch.compiler.is_compiling()
        or type(x) not in (Tensor, Parameter)
        or not x.is_cpu
        or x.dtype not in TYPES
        or not x.numel()
        or x.is_neg()  # the imaginary part of a conjugate: its memory holds the negatives
        or transformed()
    ):
        return None
    return x if layout(x) is not None else x.contiguous()


def moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (K, C), over positions and the samples that are alike modulo K."""
    mean, var = (x.new_empty(rows, x.shape[1], dtype=torch.float64) for _ in range(2))
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
    product, total = torch.empty_like(scale), torch.empty_like(scale)
    below = None if floor is None else torch.empty_like(scale)
    _call("sums", *_view(x, len(scale)), like(dy, x), x, scale, shift, floor, product, total, below)
    return product, total, below


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


def curve(kind: int, x: Tensor, *tables: Tensor) -> Tensor:
    """A map of each value by the numbers k0, k1, ... of its cell that is no line. As x.

    Args:
        kind: GATE or DIVIDE.
        tables: (K, C) each.
    """
    y = torch.empty_like(x)
    _call("curve", *_view(x, len(tables[0])), kind, None, x, _all(tables), None, None, None, None, y)
    return y


def curve_sums(kind: int, dy: Tensor, x: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the tables."""
    sums = x.new_empty(len(tables), *tables[0].shape, dtype=torch.float64)
    _call("curve", *_view(x, len(tables[0])), kind, like(dy, x), x, _all(tables), sums, None, None, None, None)
    return sums.unbind()


def curve_blend(
    kind: int, dy: Tensor, x: Tensor, *tables: Tensor, moments: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """The gradient of x, and that of moments: see `blend`."""
    dx = torch.empty_like(x)
    view = _view(x, len(tables[0]))
    _call("curve", *view, kind, like(dy, x), x, _all(tables), None, *(moments or (None, None, None)), dx)
    return dx


def _all(tables: tuple[Tensor, ...]) -> Any:
    """An array of pointers."""
    return (_POINTER * len(tables))(*(t.data_ptr() for t in tables))


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    rows: int,
    eps: float,
    given: tuple[Tensor, Tensor] | tuple[float, float] | None = None,
    pooled: int = 0,
) -> tuple[Tensor, Tensor]:
    """y as x, and of G groups of a sample's values (4, K, G): mean, variance, 1 / sqrt(variance + eps) and the unbiased
    variance.

    Args:
        weight: (C,) in float32 or float64, and bias likewise; or both None.
        given: mean and variance (K, G) to take, or one number each; None: those of x.
        pooled: one deviation for all groups of a row: 0 no, 1 from the groups' means, 2 from the mean of all.
    """
    stats = x.new_empty(4, rows, groups, dtype=torch.float64)
    if given is not None:
        stats[0], stats[1] = given
    wide = weight is not None and weight.dtype == torch.float64
    y = torch.empty_like(x)
    _call("normalize", *_view(x, rows), groups, pooled, eps, x, weight, bias, wide, given is not None, stats, y)
    return y, stats


def normalize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, wanted: tuple[bool, bool], fixed: bool, pooled: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias of `normalize`.

    Args:
        stats: as `normalize` gave them.
        wanted: whether that of x, and those of weight and bias, are; the others are None.
        fixed: the statistics were given and are not those of x.
        pooled: as there.
    """
    dx = torch.empty_like(x) if wanted[0] else None
    d_weight, d_bias = None, None
    if weight is not None and wanted[1]:
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    rows, groups = stats.shape[1:]
    wide = weight is not None and weight.dtype == torch.float64
    view, dy = _view(x, rows), like(dy, x)
    _call("normalize_backward", *view, groups, pooled, dy, x, weight, wide, fixed, stats, d_weight, d_bias, dx)
    return dx, d_weight, d_bias


def track(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> bool:
    """Move running statistics (C,), in place, by those of K norm batches (K, C), one after the other.

    One that is not finite in the type of the running statistics leaves them as they are.

    Returns:
        Whether the library serves; if not, nothing was done.
    """
    running = (running_mean, running_var)
    served = (
        ready(running_mean) is not None  # first: not while compiling, which knows no is_inference
        and all(t.is_contiguous() and not t.is_inference() for t in running)
        and running_mean.dtype == running_var.dtype != torch.bfloat16
        and type(mean) is Tensor
        and mean.is_cpu
        and mean.dtype == torch.float64
    )
    if served:
        mean, var = mean.contiguous(), var.contiguous()
        pointers = [t.data_ptr() for t in (mean, var)], [t.data_ptr() for t in running]
        wide = running_mean.dtype == torch.float64
        _functions["track"](wide, len(mean), running_mean.numel(), *pointers[0], momentum, *pointers[1])
        torch.autograd.graph.increment_version(running)  # which torch can not know of
    return served


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
    dy = dy.resolve_neg()  # as in `ready`
    if dy.stride() == x.stride():
        return dy
    if x.is_contiguous():
        return dy.contiguous()
    return dy.movedim(1, -1).contiguous().movedim(-1, 1)


def _call(name: str, *arguments: Any) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if _functions[name](*given, torch.get_num_threads()):
        raise MemoryError(f"norms.kernels: no memory for the tables of {name}")
