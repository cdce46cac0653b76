"""Every call of a library of norms/kernels/native.c over many shapes, in buffers of exactly their size.

    LD_PRELOAD=libasan.so python kernels_in_bounds.py LIBRARY

for a library that was built with -fsanitize=address,undefined: what reads or writes outside ends the process. numpy
alone is imported, since its buffers come from malloc, one by one. Outputs are filled with NaN before, so that what a
call leaves out is seen.

Axes: N sample, C channel, P position, K row of a table, G group.
"""

import ctypes
import itertools
import json
import sys
from collections import Counter

import numpy as np

CURVES = {0: 3, 1: 5}
"""Of native.c: kind -> numbers of a cell."""
TYPES = {0: np.float32, 1: np.float64, 2: np.uint16}
SHAPES = [
    *itertools.product((1, 3, 7), (1, 3, 13, 37), (1, 2, 7, 37)),  # 37: all lengths of vectors, and a rest
    *((2, 64, 4), (3, 64, 64), (2, 16, 49)),
    *((13, 2, 5), (64, 3, 4), (64, 6, 1), (33, 1, 2)),  # many samples of few values
    *((1, 520, 3), (2, 1030, 2)),  # more channels than one piece of work has
    *((2, 3, 1100), (1, 1, 1537), (3, 5, 700)),  # more positions than one
]


def filled(shape, kind, draw):
    """Values of a type of x; bfloat16 as the upper half of a float32."""
    values = draw.normal(1, 2, shape)
    return (
        values.astype(np.float32).view(np.uint32).__rshift__(16).astype(np.uint16)
        if kind == 2
        else values.astype(TYPES[kind])
    )


def unwritten(shape, kind=1):
    return np.full(shape, 0x7FC0, np.uint16) if kind == 2 else np.full(shape, np.nan, TYPES[kind])


def is_written(array):
    return bool(((array & 0x7FFF) <= 0x7F80).all() if array.dtype == np.uint16 else not np.isnan(array).any())


C_INT = tuple(map(ctypes.c_int, range(3)))


def passed(value):
    """As C takes it: sizes are int64, yes and no are int."""
    if isinstance(value, ctypes._SimpleCData | ctypes.Array):
        return value
    if value is None or isinstance(value, np.ndarray):
        return ctypes.c_void_p(None if value is None else value.ctypes.data)
    kinds = {bool: ctypes.c_int, int: ctypes.c_int64, float: ctypes.c_double}
    return kinds[type(value)](value)


class Calls:
    def __init__(self, path):
        self.library, self.counts = ctypes.CDLL(path), Counter()

    def __call__(self, name, view, *arguments, out, threads):
        """A call on x; `view`: type, layout, N, C, P and mostly K; `out`: the arrays that it has to fill."""
        head = [*map(ctypes.c_int, view[:2]), *map(ctypes.c_int64, view[2:])]
        function = getattr(self.library, f"normsuite_{name}")
        code = function(*head, *map(passed, arguments), ctypes.c_int(threads))
        assert code == 0, (name, view, code)
        assert all(is_written(array) for array in out), (name, view, arguments)
        self.counts[name] += 1

    def track(self, size, k, draw):
        """Running statistics are moved, in both of their types."""
        for number in (np.float32, np.float64):
            mean, var = (draw.normal(0, 1, (k, size)) for _ in range(2))
            running = [np.zeros(size, number), np.ones(size, number)]
            given = (number is np.float64, k, size, mean, var, 0.1, *running)
            self.library.normsuite_track(*map(passed, given))
            self.counts["track"] += 1


def by_channel(call, view, draw, threads):
    """The calls with tables (K, C)."""
    kind, _, n, c, p, k = view
    x, dy = filled((n, c, p), kind, draw), filled((n, c, p), kind, draw)
    scale, shift, floor, mean, d_mean, d_var = draw.normal(0, 1, (6, k, c))
    scale[:, ::2] = 0
    first, second = unwritten((k, c)), unwritten((k, c))
    call("moments", view, x, first, second, out=(first, second), threads=threads)
    for limit in (None, floor):
        y = unwritten((n, c, p), kind)
        call("affine", view, x, scale, shift, limit, y, out=(y,), threads=threads)
        product, total, below = (unwritten((k, c)) for _ in range(3))
        room = (product, total) if limit is None else (product, total, below)
        given = (*room, *[None] * (3 - len(room)))
        call("sums", view, dy, x, scale, shift, limit, *given, out=room, threads=threads)
        for moments in ((mean, d_mean, d_var), (None, None, None)):
            dx = unwritten((n, c, p), kind)
            call("blend", view, dy, x, scale, shift, limit, *moments, dx, out=(dx,), threads=threads)
    dx = unwritten((n, c, p), kind)
    call("blend", view, None, x, None, None, None, mean, d_mean, d_var, dx, out=(dx,), threads=threads)


def by_group(call, view, groups, draw, threads):
    """The fused calls, (K, G)."""
    kind, _, n, c, p, k = view
    x, dy = filled((n, c, p), kind, draw), filled((n, c, p), kind, draw)
    for affine, wide, fixed in ((True, kind == 1, False), (False, False, False), (True, True, True)):
        number = np.float64 if wide else np.float32
        weight, bias = (draw.normal(1, 1, c).astype(number) if affine else None for _ in range(2))
        stats, y = unwritten((4, k, groups)), unwritten((n, c, p), kind)
        if fixed:
            stats[:2] = 0.5
        # the unbiased variance of a single value is NaN
        out = (stats[:3], y)
        pooled = C_INT[0 if fixed else (groups + k) % 3]
        given = (groups, pooled, 1e-5, x, weight, bias, wide, fixed, stats, y)
        call("normalize", view, *given, out=out, threads=threads)
        for of_x, of_weight in ((True, affine), (False, True), (True, False)):
            dx = unwritten((n, c, p), kind) if of_x else None
            d_weight, d_bias = (np.full(c, np.nan, number) if affine and of_weight else None for _ in range(2))
            out = [array for array in (d_weight, d_bias, dx) if array is not None]
            arguments = (groups, pooled, dy, x, weight, wide, fixed, stats, d_weight, d_bias, dx)
            call("normalize_backward", view, *arguments, out=out, threads=threads)


def by_curve(call, view, draw, threads):
    """Maps that are no lines, of tables (K, C): their values, sums and the gradient of x."""
    kind, _, n, c, p, k = view
    x, dy = filled((n, c, p), kind, draw), filled((n, c, p), kind, draw)
    for curve, numbers in CURVES.items():
        tables = [draw.uniform(0.5, 2, (k, c)) for _ in range(numbers)]
        pointers = (ctypes.c_void_p * numbers)(*(table.ctypes.data for table in tables))
        y, sums = unwritten((n, c, p), kind), unwritten((numbers, k, c))
        call("curve", view, C_INT[curve], None, x, pointers, *[None] * 4, y, out=(y,), threads=threads)
        call("curve", view, C_INT[curve], dy, x, pointers, sums, *[None] * 4, out=(sums,), threads=threads)
        for given in ([None] * 3, [draw.normal(0, 1, (k, c)) for _ in range(3)]):
            dx = unwritten((n, c, p), kind)
            call("curve", view, C_INT[curve], dy, x, pointers, None, *given, dx, out=(dx,), threads=threads)


def by_position(call, view, draw, threads):
    """Normalization over the channels of a position."""
    kind, _, n, c, p, _ = view
    x, dy = filled((n, c, p), kind, draw), filled((n, c, p), kind, draw)
    number = np.float64 if kind == 1 else np.float32
    for centred, unbiased in ((True, False), (True, c > 1), (False, False)):
        for affine in (True, False):
            weight, bias = (draw.normal(1, 1, c).astype(number) if affine else None for _ in range(2))
            y = unwritten((n, c, p), kind)
            head = (centred, unbiased, 1e-5)
            call("rows_forward", view[:5], *head, x, weight, bias, y, out=(y,), threads=threads)
            for of_x, of_weight in ((True, affine), (False, affine), (True, False)):
                dx = unwritten((n, c, p), kind) if of_x else None
                d_weight, d_bias = (np.full(c, np.nan, number) if of_weight else None for _ in range(2))
                out = [array for array in (d_weight, d_bias, dx) if array is not None]
                arguments = (*head, dy, x, weight, d_weight, d_bias, dx)
                call("rows_backward", view[:5], *arguments, out=out, threads=threads)


def numbers_of_groups(c, p):
    """Those of whole channels, and those that cut channels, whose runs are long or short."""
    return sorted(
        {g for g in (1, 2, 3, 7, c, 2 * c, c * p // 2, c * p // 4, c * p // 8, c * p) if g and c * p % g == 0}
    )


def main():
    call, draw = Calls(sys.argv[1]), np.random.default_rng(0)
    for size, k in itertools.product((1, 3, 13, 64), (1, 3)):
        call.track(size, k, draw)
    for (n, c, p), kind, last, threads in itertools.product(SHAPES, TYPES, (0, 1), (1, 3)):
        for k in sorted({1, 2, 3, n} & {*range(1, n + 1)}):
            view = (kind, last, n, c, p, k)
            by_channel(call, view, draw, threads)
            by_curve(call, view, draw, threads)
            if k == 1:
                by_position(call, view, draw, threads)
            for groups in numbers_of_groups(c, p):
                by_group(call, view, groups, draw, threads)
    print(json.dumps(call.counts))


if __name__ == "__main__":
    main()
