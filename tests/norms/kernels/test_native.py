"""The compiled library: when it serves, what becomes of a wrong one, its index code, and that threads change no bit."""

import _ctypes
import ctypes
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import nn

import norms
from norms.kernels import affine, moments, native

ROOT = Path(norms.__file__).resolve().parent
WITHOUT = "operations of torch take the place of the native library"


def literal(x):
    """Mean and biased variance (N, C), in float64."""
    values = x.detach().double().reshape(*x.shape[:2], math.prod(x.shape[2:]))
    mean = values.mean(2)
    return mean, (values - mean[..., None]).square().mean(2)


# Which serves


class Own(torch.Tensor):
    """A user's subclass."""


def crossed(shape):
    """Neither contiguous nor with its channels innermost."""
    return torch.randn(*shape[:2], *reversed(shape[2:])).transpose(2, 3)


SHAPE = (4, 3, 5, 7)
KNOWN = {
    "float32": torch.randn(SHAPE),
    "float64": torch.randn(SHAPE, dtype=torch.float64),
    "bfloat16": torch.randn(SHAPE).bfloat16(),
    "channels last": torch.randn(SHAPE).to(memory_format=torch.channels_last),
    "an offset": torch.randn(5, *SHAPE[1:])[1:],
    "a parameter": nn.Parameter(torch.randn(SHAPE)),
    "no positions": torch.randn(4, 3),
    "5 axes": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "one sample, channel and position": torch.randn(1, 1, 1, 1),
    "crossed": crossed(SHAPE),
    "every other channel": torch.randn(4, 6, 5, 7)[:, ::2],
    "one value for all": torch.randn(1, 3, 1, 1).expand(SHAPE),
}
REFUSED = {
    "float16": torch.randn(SHAPE).half(),
    "a subclass": torch.randn(SHAPE).as_subclass(Own),
    "negatives in memory": torch._neg_view(torch.randn(SHAPE)),
    **{f"empty: {shape}": torch.randn(shape) for shape in ((0, 3, 5, 7), (4, 0, 5, 7))},
}


def agree(x):
    """moments and affine of x, their values and the gradient, against the literal ones."""
    x = x.detach().requires_grad_()
    mean, var = moments(x)
    scale, shift = torch.randn(2, *mean.shape, dtype=torch.float64)
    y = affine(x, scale, shift)
    (dx,) = torch.autograd.grad(y.double().sum(), x)
    want_mean, want_var = literal(x)
    around = (*scale.shape, *[1] * (x.dim() - 2))
    plain = x.detach().double()
    want = plain.as_subclass(torch.Tensor) * scale.view(around) + shift.view(around)
    rough = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(x.dtype, 1e-5)
    torch.testing.assert_close(mean.double(), want_mean, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(var.double(), want_var, atol=1e-5, rtol=1e-5, check_dtype=False)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(y.double().as_subclass(torch.Tensor), want, atol=2 * rough, rtol=2 * rough)
    slope = scale.view(around).expand(x.shape)
    torch.testing.assert_close(dx.double().as_subclass(torch.Tensor), slope, atol=rough, rtol=rough)


@pytest.mark.parametrize("kind", KNOWN)
def test_any_layout_of_a_known_type_is_read_rightly(kind):
    if native.kernels() == "native":
        assert native.ready(KNOWN[kind]) is not None
    agree(KNOWN[kind])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_library_does_not_know_goes_to_torch_with_right_values(kind):
    assert native.ready(REFUSED[kind]) is None
    agree(REFUSED[kind])


def test_a_tensor_without_memory_has_moments_and_maps_of_the_right_shapes():
    x = torch.empty(SHAPE, device="meta")
    mean, var = moments(x, 2)
    y = affine(x, mean, var)
    assert (mean.shape, var.shape, y.shape) == ((2, 3), (2, 3), SHAPE)
    assert {t.device.type for t in (mean, var, y)} == {"meta"}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 36, 18])  # within a vector, in the rest behind the last one
def test_nan_and_inf_stay_in_their_channel_and_pass_through_a_map(bad, last, place):
    x = torch.randn(2, 37, 37, 1)
    x[1, place, place] = bad
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, var = moments(x)
    touched = torch.zeros(2, 37, dtype=torch.bool)
    touched[1, place] = True
    assert torch.equal(~mean.isfinite(), touched)
    assert torch.equal(var.isnan(), touched)
    ones = torch.ones(37)
    for floor, below in ((None, -float("inf")), (0 * ones, 0.0)):
        y = affine(x, ones, 0 * ones, floor)
        assert torch.equal(y.isfinite(), x.isfinite() | (x < below))
        torch.testing.assert_close(y[1, place, place, 0].item(), torch.tensor(bad).clamp(below).item(), equal_nan=True)


# Its index code


def offsets(last, shape, row, column, segment):
    """Where a segment of a cell begins and ends, how many segments a cell has, and how long one is."""
    out = (ctypes.c_int64 * 4)()
    library = native.load(next(f for end in EXTENSION_SUFFIXES if (f := ROOT / "kernels" / f"_native{end}").exists()))
    library.normsuite_offsets(int(last), *map(ctypes.c_int64, (*shape, row, column, segment)), out)
    return tuple(out)


@pytest.mark.program("gcc")
@pytest.mark.parametrize(
    "shape",
    [(3, 70_001, 70_003), (2**33 + 1, 3, 2), (2, 3, 2**33 + 5), (2, 2**32 + 3, 5), (1, 2**31, 1), (1, 1, 2**31)],
)
@pytest.mark.parametrize("last", [False, True])
def test_offsets_of_more_values_than_32_bits_count_are_exact(shape, last):
    n, c, p = shape
    stride = c if last else 1
    for row, column in itertools.product({0, n // 2, n - 1}, {0, c // 2, c - 1}):
        first = row * c * p + (column if last else column * p)
        *_, segments, length = offsets(last, shape, row, column, 0)
        assert (segments - 1) * length < p <= segments * length
        for segment in {0, segments // 2, segments - 1}:
            begin = first + segment * length * stride
            end = first + (min((segment + 1) * length, p) - 1) * stride
            assert offsets(last, shape, row, column, segment) == (begin, end, segments, length)
    *_, segments, _ = offsets(last, shape, 0, 0, 0)
    assert offsets(last, shape, n - 1, c - 1, segments - 1)[1] == n * c * p - 1


# Threads


def everything(x, dy):
    """All numbers that the calls of the library give of x and dy."""
    n, c = x.shape[:2]
    found = []
    for rows in (1, 2, n):
        mean, var = native.moments(x, rows)
        scale, shift, floor = var.rsqrt(), -mean * var.rsqrt(), 0.1 * mean
        found += [mean, var, native.affine(x, scale, shift), native.affine(x, scale, shift, floor)]
        found += [*native.sums(dy, x, scale, shift)[:2], *native.sums(dy, x, scale, shift, floor)]
        found += [native.blend(dy, x, scale, shift, floor, (mean, scale, var)), native.blend(dy, x, scale)]
        for groups in (1, 2, c, 7 * c):
            weight, bias = torch.linspace(-1, 2, c), torch.linspace(1, 0, c)
            y, stats = native.normalize(x, weight, bias, groups, rows, 1e-5)
            found += [y, stats, *native.normalize_backward(dy, x, weight, stats, (True, True), False, 0)]
    return found


@pytest.mark.native
@pytest.mark.program("gcc")
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_the_number_of_threads_changes_no_bit(dtype, last, one_thread):
    draw = torch.Generator().manual_seed(0)
    # 49 positions are runs of 7; of the first shape a channel of a sample is cut, the second has more threads than rows
    for shape in ((6, 16, 28, 28), (2, 3, 210, 210), (64, 20, 7, 7)):
        layout = torch.channels_last if last else torch.contiguous_format
        x, dy = (torch.randn(shape, generator=draw).to(dtype).to(memory_format=layout) for _ in range(2))
        by_threads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_threads.append(everything(x + 3, dy))
        for one, *others in zip(*by_threads, strict=True):
            assert all(torch.equal(one, other) for other in others)


# Wrong libraries, and the switch


def test_a_file_that_is_no_library_of_ours_is_refused_by_its_name_and_reason(tmp_path):
    file = tmp_path / "_native.so"
    file.write_text("no library")
    with pytest.raises(OSError, match=r"_native\.so"):
        native.load(file)
    with pytest.raises(OSError, match=r"_native\.so"):
        native.load(tmp_path / "elsewhere" / "_native.so")
    with pytest.raises(OSError, match=r"_ctypes.*normsuite_version"):
        native.load(_ctypes.__file__)


@pytest.mark.program("gcc")
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    with pytest.raises(OSError, match=f"is of version {native.VERSION - 1}, and {native.VERSION} is needed"):
        offsets(False, (1, 1, 1), 0, 0, 0)


def test_openmp_of_the_compiler_is_loaded_where_torch_brings_none(monkeypatch):
    asked = []

    def opened(name, mode=ctypes.DEFAULT_MODE):
        asked.append((name, mode == ctypes.RTLD_GLOBAL))
        if len(asked) == 1:
            raise OSError(f"{name}: undefined symbol: GOMP_parallel")
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", opened)
    with pytest.raises(OSError, match=r"libgomp\.so\.1: cannot open"):
        native.load("ours.so")
    assert asked == [("ours.so", False), ("libgomp.so.1", True)]


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of norms that has no library."""
    shutil.copytree(ROOT, tmp_path / "norms", ignore=shutil.ignore_patterns("__pycache__", "_native*"))
    return tmp_path


CODE = """
import subprocess, sys, torch
from norms.kernels import moments, native
x = torch.arange(24.0).reshape(2, 3, 2, 2)
print(native.__file__, native.kernels(), moments(x, 1)[0].tolist(), flush=True)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


def run(folder, **switch):
    environment = {k: v for k, v in os.environ.items() if k != native.SWITCH} | {"PYTHONPATH": str(folder), **switch}
    command = [sys.executable, "-c", CODE, CODE]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("text", [None, "no library"])
def test_without_a_library_torch_serves_with_one_warning_for_a_process_and_those_it_starts(elsewhere, text):
    if text is not None:
        (elsewhere / "norms" / "kernels" / f"_native{EXTENSION_SUFFIXES[0]}").write_text(text)
    done = run(elsewhere)
    line = f"{elsewhere / 'norms' / 'kernels' / 'native.py'} torch [[7.5, 11.5, 15.5]]"
    assert done.stdout.splitlines() == [line, line], done.stderr
    assert done.stderr.count(WITHOUT) == 1
    assert ("it was not built" in done.stderr) == (text is None)


def test_the_switch_leaves_the_library_out_silently(elsewhere):
    done = run(elsewhere, NORMSUITE_KERNELS="torch")
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["torch", "torch"]
    assert done.stderr == ""


def test_a_wrong_value_of_the_switch_is_refused_with_what_is_allowed(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "nativ")
    with pytest.raises(
        ValueError, match=r'NORMSUITE_KERNELS: .*"nativ"; kernels: native, torch; did you mean "native"'
    ):
        native._find()


def test_the_switch_can_be_off_or_empty(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv(native.SWITCH, "torch")
        assert native._find() is None
        if native.kernels() == "native":
            for unset in ("", "native"):
                monkeypatch.setenv(native.SWITCH, unset)
                assert native._find() is not None


# Bounds


@pytest.mark.slow
@pytest.mark.program("gcc")
def test_no_call_leaves_its_buffers_or_does_what_c_does_not_define(tmp_path):
    """Small pieces, so that little inputs are cut as large ones are."""
    library = tmp_path / "checked.so"
    build = "gcc -O1 -g -std=gnu11 -fPIC -shared -fopenmp -Wno-psabi -DFEW=16 -DSEGMENT=512"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    source = ROOT / "kernels" / "native.c"
    subprocess.run([*build.split(), *checks, str(source), "-o", str(library), "-lm"], check=True)
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    script = Path(__file__).resolve().parents[2] / "parts" / "kernels_in_bounds.py"
    settings = {"LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(script), str(library)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert set(json.loads(done.stdout)) == set(native._CALLS), "a new call needs a line in parts/kernels_in_bounds.py"
