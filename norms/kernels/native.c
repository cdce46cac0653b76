/* Loops over memory for normalization layers: norms/kernels/native.py calls them and says what they compute.
 *
 * x (N, C, *) lies in memory in one of two ways. "side": a sample's channel is a run of values (contiguous). "last": the
 * channels of a position are a run of values (channels_last). Everything here sees a table of rows and columns, in which
 * each cell is a set of values that share their coefficients:
 *
 *     side  row = sample, column = channel or a run of its positions; the cell's values lie side by side
 *     last  row = sample or a run of its positions, column = channel; the cell's values lie `stride` apart
 *
 * Sums: float32 within a block of at most BLOCK values per cell, around a value that is near their mean, and float64
 * from there on, in an order that does not depend on the number of threads. Offsets are int64.
 * Sizes are at least 1: native.py gives nothing else.
 *
 * The file includes itself, once per type of x: float, double, bfloat16 (as its 16 bits). T is the type in memory, A that
 * of the arithmetic, V a vector of A.
 */
#ifndef T

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 2 /* of the calls below; norms/kernels/native.py asks for the same */
#define BLOCK 64
#define RUN 128 /* positions that are normalized over their channels at once, where those lie side by side */
#ifndef SEGMENT        /* tests build it with less, so that small inputs are cut, too */
#define SEGMENT 131072 /* values that one piece of work reads, about */
#endif
#ifndef FEW
#define FEW 16384 /* values below which a second thread costs more than it brings */
#endif
#define SCATTERED 512 /* values side by side below which going from sample to sample is slow */
#define SHORT 8       /* values of a cell below which cells of one sample would cost more than the values */

#define LOOP __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))
/* Sums beside each other stay in registers only where their loop is unrolled, which no level of -O promises. */
#define UNROLL _Pragma("GCC unroll 8")

/* Reads ahead where a block is gone through column by column, which the processor does not foresee. */
#define FETCH(p) __builtin_prefetch(p)

typedef int64_t I;

int normsuite_version(void) { return VERSION; }

/* Whether this processor has what the rest is compiled for: asked by code that needs none of it. Every x86 since 2013
 * has; a second copy of the loops for older ones would double the time of compilation. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
int normsuite_supported(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#pragma GCC target("avx2,fma")
#else
int normsuite_supported(void) { return 1; }
#endif

INLINE I least(I a, I b) { return a < b ? a : b; }
INLINE I most(I a, I b) { return a > b ? a : b; }

static I common(I a, I b) {
    while (b) {
        I rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* How a table lies in memory, and how its work is cut into pieces. */
typedef struct {
    I rows, cols, count; /* count: values of a cell */
    I stride;            /* between two values of a cell: 1 in "side" */
    I row;               /* offset of row 0 to row 1 */
    int last;
    I segment, segments; /* values of a cell in one piece, pieces of a cell */
    I strip, strips;     /* columns in one piece, pieces of a row */
    int threads;
} Table;

/* Values of cell 0 to the first one of (row, column, segment). */
INLINE I offset(const Table *t, I row, I col, I segment) {
    return row * t->row + (t->last ? col : col * t->count) + segment * t->segment * t->stride;
}

INLINE I values_in(const Table *t, I segment) { return least(t->segment, t->count - segment * t->segment); }

static Table table(int last, I rows, I cols, I count, I stride, I row, int threads) {
    Table t = {rows, cols, count, stride, row, last, 0, 0, 0, 0, 1};
    t.strip = least(most(cols, 1), last ? 512 : most(FEW / most(count, 1), 1));
    t.strips = (cols + t.strip - 1) / t.strip;
    t.segment = last ? most(SEGMENT / t.strip, 256) : SEGMENT;
    t.segments = most((count + t.segment - 1) / t.segment, 1);
    I enough = rows * cols * count / FEW;
    t.threads = (int)(enough < threads ? enough : threads);
    if (t.threads < 1) t.threads = 1;
    return t;
}

/* The offset of a cell's segment in a table of this shape, and that of its last value: for tests of large sizes. */
void normsuite_offsets(int last, I n, I c, I p, I row, I col, I segment, I *out) {
    Table t = last ? table(1, n, c, p, c, p * c, 1) : table(0, n, c, p, 1, c * p, 1);
    out[0] = offset(&t, row, col, segment);
    out[1] = out[0] + (values_in(&t, segment) - 1) * t.stride;
    out[2] = t.segments;
    out[3] = t.segment;
}

/* y = (x - centre) * scale + shift without a difference of large numbers, from scale * x + shift. */
typedef struct {
    double centre, scale, shift;
} Line;

/* Weights and biases are read, and their gradients written, in their own type. */
INLINE double at(const void *p, int type, I i) { return type ? ((const double *)p)[i] : (double)((const float *)p)[i]; }
INLINE void put(void *p, int type, I i, double v) {
    if (type)
        ((double *)p)[i] = v;
    else
        ((float *)p)[i] = (float)v;
}

typedef uint16_t bfloat16;
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

INLINE float load_one_b16(const bfloat16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
INLINE void store_one_b16(bfloat16 *p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *p = v != v ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
}
INLINE Floats load_b16(const bfloat16 *p) {
    Halves h;
    memcpy(&h, p, 16);
    Words w = __builtin_convertvector(h, Words) << 16;
    return (Floats)w;
}
INLINE void store_b16(bfloat16 *p, Floats v) {
    Words w = (Words)v;
    Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    Words bad = (Words)(v != v);
    Halves h = __builtin_convertvector((rounded & ~bad) | (bad & 0x7fc0), Halves);
    memcpy(p, &h, 16);
}
INLINE float load_one_f32(const float *p) { return *p; }
INLINE void store_one_f32(float *p, float v) { *p = v; }
INLINE Floats load_f32(const float *p) {
    Floats v;
    memcpy(&v, p, 32);
    return v;
}
INLINE void store_f32(float *p, Floats v) { memcpy(p, &v, 32); }
INLINE double load_one_f64(const double *p) { return *p; }
INLINE void store_one_f64(double *p, double v) { *p = v; }
INLINE Doubles load_f64(const double *p) {
    Doubles v;
    memcpy(&v, p, 32);
    return v;
}
INLINE void store_f64(double *p, Doubles v) { memcpy(p, &v, 32); }

/* e to the power of v, v at most 0 or nan: Cephes' polynomial, to 1e-7 of the value down to the smallest float. */
INLINE Floats exp_f32(Floats v) {
    Floats lowest = (Floats){0} - 105.0f; /* gives 0 */
    Words low = (Words)(v < lowest);
    v = (Floats)((low & (Words)lowest) | (~low & (Words)v));
    Floats whole = v * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the last bits are the rounded number */
    Ints n = (Ints)whole - 0x4b400000;
    whole -= 12582912.0f;
    Floats r = v - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats q = r * 1.9875691500e-4f + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    q = q * r * r + r + 1.0f;
    Ints half = n >> 1; /* 2^n in two factors, since 2^-149 is none of the normal numbers */
    return q * (Floats)((half + 127) << 23) * (Floats)((n - half + 127) << 23);
}
INLINE Floats exp_b16(Floats v) { return exp_f32(v); }
INLINE Doubles exp_f64(Doubles v) {
    UNROLL
    for (int l = 0; l < 4; l++) v[l] = exp(v[l]);
    return v;
}

/* Maps of a value by numbers k0, k1, ... of its cell that are no lines; their names and numbers are native.py's, too. */
#define GATE 0   /* k1 * x * sigmoid(k0 * x) + k2 */
#define DIVIDE 1 /* k3 * x / max(k2, k0 * x + k1) + k4 */
#define NUMBERS(curve) ((curve) == GATE ? 3 : 5)
#define MOST 5
#define VALUES 0 /* what a loop over a curve is for */
#define SLOPES 1
#define SUMS 2

/* The sum of each vector's lanes, as the lanes of one. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif
#ifdef SHUFFLE
#define HALVES4(a, b) (SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7))
#define PAIRS4(a, b) (SHUFFLE(a, b, 0, 4, 2, 6) + SHUFFLE(a, b, 1, 5, 3, 7))
#define HALVES8(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#define QUARTERS8(a, b) (SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define PAIRS8(a, b) (SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
INLINE Floats lanes_of_f32(const Floats *v) {
    Floats a = HALVES8(v[0], v[4]), b = HALVES8(v[1], v[5]), c = HALVES8(v[2], v[6]), d = HALVES8(v[3], v[7]);
    Floats e = QUARTERS8(a, c), f = QUARTERS8(b, d);
    return PAIRS8(e, f);
}
INLINE Doubles lanes_of_f64(const Doubles *v) {
    Doubles a = HALVES4(v[0], v[2]), b = HALVES4(v[1], v[3]);
    return PAIRS4(a, b);
}
#else
INLINE Floats lanes_of_f32(const Floats *v) {
    Floats sums = {0};
    for (int i = 0; i < 8; i++)
        UNROLL
        for (int l = 0; l < 8; l++) sums[i] += v[i][l];
    return sums;
}
INLINE Doubles lanes_of_f64(const Doubles *v) {
    Doubles sums = {0};
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int l = 0; l < 4; l++) sums[i] += v[i][l];
    return sums;
}
#endif
#define lanes_of_b16 lanes_of_f32

/* sums[l] += v[l]; half a vector at a time, since compilers widen a whole one lane by lane */
typedef float Half __attribute__((vector_size(16)));
INLINE void add_wide_f32(double *sums, Floats v) {
    Half half[2];
    memcpy(half, &v, 32);
    store_f64(sums, load_f64(sums) + __builtin_convertvector(half[0], Doubles));
    store_f64(sums + 4, load_f64(sums + 4) + __builtin_convertvector(half[1], Doubles));
}
INLINE void add_wide_f64(double *sums, Doubles v) { store_f64(sums, load_f64(sums) + v); }
#define add_wide_b16 add_wide_f32

#define root_f32 sqrtf
#define root_f64 sqrt
#define root_b16 sqrtf

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, SUFFIX)

#define T float
#define A float
#define V Floats
#define SUFFIX f32
#include "native.c"
#undef T
#undef A
#undef V
#undef SUFFIX
#define T double
#define A double
#define V Doubles
#define SUFFIX f64
#include "native.c"
#undef T
#undef A
#undef V
#undef SUFFIX
#define T bfloat16
#define A float
#define V Floats
#define SUFFIX b16
#include "native.c"
#undef T
#undef A
#undef V
#undef SUFFIX

/* type: 0 float, 1 double, 2 bfloat16 */
#define CALL(type, f, ...) \
    ((type) == 0 ? f##_f32(__VA_ARGS__) : (type) == 1 ? f##_f64(__VA_ARGS__) : f##_b16(__VA_ARGS__))

int normsuite_moments(int type, int last, I n, I c, I p, I k, const void *x, double *mean, double *var, int threads) {
    return CALL(type, moments, last, n, c, p, k, x, mean, var, threads);
}
int normsuite_affine(int type, int last, I n, I c, I p, I k, const void *x, const double *scale, const double *shift,
                     const double *floor, void *y, int threads) {
    return CALL(type, affine, last, n, c, p, k, x, scale, shift, floor, y, threads);
}
int normsuite_sums(int type, int last, I n, I c, I p, I k, const void *dy, const void *x, const double *scale,
                   const double *shift, const double *floor, double *product, double *total, double *below, int threads) {
    return CALL(type, sums, last, n, c, p, k, dy, x, scale, shift, floor, product, total, below, threads);
}
int normsuite_blend(int type, int last, I n, I c, I p, I k, const void *dy, const void *x, const double *scale,
                    const double *shift, const double *floor, const double *mean, const double *d_mean,
                    const double *d_var, void *dx, int threads) {
    return CALL(type, blend, last, n, c, p, k, dy, x, scale, shift, floor, mean, d_mean, d_var, dx, threads);
}
int normsuite_normalize(int type, int last, I n, I c, I p, I k, I g, int pooled, double eps, const void *x,
                        const void *weight, const void *bias, int wide, int given, double *stats, void *y, int threads) {
    return CALL(type, normalize, last, n, c, p, k, g, pooled, eps, x, weight, bias, wide, given, stats, y, threads);
}
int normsuite_normalize_backward(int type, int last, I n, I c, I p, I k, I g, int pooled, const void *dy, const void *x,
                                 const void *weight, int wide, int fixed, const double *stats, void *d_weight,
                                 void *d_bias, void *dx, int threads) {
    return CALL(type, normalize_backward, last, n, c, p, k, g, pooled, dy, x, weight, wide, fixed, stats, d_weight, d_bias, dx,
                threads);
}

int normsuite_rows_forward(int type, int last, I n, I c, I p, int centred, int unbiased, double eps, const void *x,
                           const void *weight, const void *bias, void *y, int threads) {
    return CALL(type, rows_forward, last, n, c, p, centred, unbiased, eps, x, weight, bias, y, threads);
}
int normsuite_rows_backward(int type, int last, I n, I c, I p, int centred, int unbiased, double eps, const void *dy,
                            const void *x, const void *weight, void *d_weight, void *d_bias, void *dx, int threads) {
    return CALL(type, rows_backward, last, n, c, p, centred, unbiased, eps, dy, x, weight, d_weight, d_bias, dx, threads);
}

/* Running statistics (size) are moved by those of k norm batches (k, size), one after the other; one that is not finite
 * in their type leaves them alone. */
void normsuite_track(int wide, I k, I size, const double *mean, const double *var, double momentum, void *running_mean,
                     void *running_var) {
    double most_of_type = wide ? __DBL_MAX__ : __FLT_MAX__;
    for (I i = 0; i < size; i++) {
        double m = at(running_mean, wide, i), v = at(running_var, wide, i);
        for (I j = i; j < k * size; j += size) {
            if (!(var[j] <= most_of_type)) continue;
            m += momentum * (mean[j] - m), v += momentum * (var[j] - v);
        }
        put(running_mean, wide, i, m), put(running_var, wide, i, v);
    }
}
int normsuite_curve(int type, int last, I n, I c, I p, I k, int curve, const void *dy, const void *x,
                    const double *const *tables, double *sums, const double *mean, const double *d_mean,
                    const double *d_var, void *out, int threads) {
    return CALL(type, curve, last, n, c, p, k, curve, dy, x, tables, sums, mean, d_mean, d_var, out, threads);
}

#else /* what follows is compiled once per type */

#define W ((I)(sizeof(V) / sizeof(A))) /* lanes of a vector */
#define SIDEWAYS 4                    /* vectors that are summed beside each other */
#define LOAD NAME(load)
#define STORE NAME(store)
#define LOAD1 NAME(load_one)
#define STORE1 NAME(store_one)
#define ROOT NAME(root)
#define ALL(v) ((V){0} + (v))
#define MASK __typeof__((V){0} <= (V){0})
#define PICK(mask, a, b) ((V)(((mask) & (MASK)(a)) | (~(mask) & (MASK)(b))))

/* What is computed of a value: (x - centre) * scale + shift, and where that is not above `floor`, `floor`. */
typedef struct {
    A *centre, *scale, *shift, *floor;
} NAME(Lines);

INLINE A NAME(lanes)(V v) {
    A sums[W];
    memcpy(sums, &v, sizeof(V));
    UNROLL
    for (I half = W / 2; half; half /= 2)
        UNROLL
        for (I l = 0; l < half; l++) sums[l] += sums[l + half];
    return sums[0];
}

/* Sums of x - near and of its square. */
INLINE void NAME(add_moments)(const T *x, I n, A near, double *first, double *second) {
    V m = ALL(near), a = {0}, b = {0}, c = {0}, d = {0};
    I i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        V u = LOAD(x + i) - m, v = LOAD(x + i + W) - m;
        a += u, b += v, c += u * u, d += v * v;
    }
    A sum = NAME(lanes)(a + b), square = NAME(lanes)(c + d);
    for (; i < n; i++) {
        A u = LOAD1(x + i) - near;
        sum += u, square += u * u;
    }
    *first += sum, *second += square;
}

/* Mean and centred sum of squares of n values side by side. */
LOOP static void NAME(side_moments)(const T *x, I n, double *mean, double *squares) {
    I some = least(n, 8 * BLOCK);
    double first = 0, second = 0, unused = 0;
    NAME(add_moments)(x, some, 0, &first, &unused);
    A near = (A)(first / (double)some);
    first = 0;
    for (I i = 0; i < n; i += 8 * BLOCK) NAME(add_moments)(x + i, least(8 * BLOCK, n - i), near, &first, &second);
    double rest = first / (double)n;
    *mean = near + rest;
    second -= first * rest;
    *squares = second > 0 ? second : second != second ? second : 0;
}

INLINE void NAME(add_to)(double *sums, const V *v, int vectors) {
    UNROLL
    for (int j = 0; j < vectors; j++) NAME(add_wide)(sums + j * W, v[j]);
}

INLINE void NAME(last_sum_few)(const T *x, I n, I stride, A *near, const int vectors) {
    V a[SIDEWAYS];
    UNROLL
    for (int j = 0; j < vectors; j++) a[j] = (V){0};
    for (I i = 0; i < n; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) a[j] += LOAD(x + i * stride + j * W);
    UNROLL
    for (int j = 0; j < vectors; j++) {
        V m = a[j] / (A)n;
        memcpy(near + j * W, &m, sizeof(V));
    }
}

INLINE void NAME(last_moments_few)(const T *x, I n, I stride, const A *near, double *first, double *second,
                                   const int vectors) {
    V a[SIDEWAYS], b[SIDEWAYS], m[SIDEWAYS];
    UNROLL
    for (int j = 0; j < vectors; j++) {
        a[j] = b[j] = (V){0};
        memcpy(&m[j], near + j * W, sizeof(V));
    }
    for (I i = 0; i < n; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) {
            if (j * W * (I)sizeof(T) % 64 == 0) FETCH(x + (i + n) * stride + j * W);
            V u = LOAD(x + i * stride + j * W) - m[j];
            a[j] += u, b[j] += u * u;
        }
    NAME(add_to)(first, a, vectors);
    NAME(add_to)(second, b, vectors);
}

/* The same of each of `cols` columns, at most 512, of n values that lie `stride` apart. */
LOOP static void NAME(last_moments)(const T *x, I n, I cols, I stride, double *mean, double *squares) {
    A near[512];
    double first[512], second[512];
    memset(first, 0, (size_t)cols * sizeof(double));
    memset(second, 0, (size_t)cols * sizeof(double));
    I block = most(8, least(BLOCK, 8192 / most(cols, 1)));
    for (I i = 0; i < n; i += block) {
        I k = least(block, n - i);
        const T *v = x + i * stride;
        I c = 0;
        if (i == 0) {
            for (; c + SIDEWAYS * W <= cols; c += SIDEWAYS * W) NAME(last_sum_few)(v + c, k, stride, near + c, SIDEWAYS);
            for (; c + W <= cols; c += W) NAME(last_sum_few)(v + c, k, stride, near + c, 1);
            for (; c < cols; c++) {
                A sum = 0;
                for (I j = 0; j < k; j++) sum += LOAD1(v + j * stride + c);
                near[c] = sum / (A)k;
            }
            c = 0;
        }
        for (; c + SIDEWAYS * W <= cols; c += SIDEWAYS * W)
            NAME(last_moments_few)(v + c, k, stride, near + c, first + c, second + c, SIDEWAYS);
        for (; c + W <= cols; c += W) NAME(last_moments_few)(v + c, k, stride, near + c, first + c, second + c, 1);
        for (; c < cols; c++) {
            A sum = 0, square = 0;
            for (I j = 0; j < k; j++) {
                A u = LOAD1(v + j * stride + c) - near[c];
                sum += u, square += u * u;
            }
            first[c] += sum, second[c] += square;
        }
    }
    for (I c = 0; c < cols; c++) {
        double rest = first[c] / (double)n, left = second[c] - first[c] * rest;
        mean[c] = near[c] + rest;
        squares[c] = left > 0 ? left : left != left ? left : 0;
    }
}

/* y = line(x), n values with one line. */
LOOP static void NAME(side_line)(const T *x, T *y, I n, A centre, A scale, A shift) {
    I i = 0;
    for (; i + W <= n; i += W) STORE(y + i, (LOAD(x + i) - centre) * scale + shift);
    for (; i < n; i++) STORE1(y + i, (LOAD1(x + i) - centre) * scale + shift);
}

LOOP static void NAME(side_floor)(const T *x, T *y, I n, A centre, A scale, A shift, A floor) {
    I i = 0;
    for (; i + W <= n; i += W) {
        V z = (LOAD(x + i) - centre) * scale + shift;
        STORE(y + i, PICK(z <= ALL(floor), ALL(floor), z));
    }
    for (; i < n; i++) {
        A z = (LOAD1(x + i) - centre) * scale + shift;
        STORE1(y + i, z <= floor ? floor : z);
    }
}

LOOP static void NAME(last_line)(const T *x, T *y, I n, I cols, I stride, NAME(Lines) by) {
    for (I i = 0; i < n; i++) {
        const T *v = x + i * stride;
        T *w = y + i * stride;
        I c = 0;
        for (; c + W <= cols; c += W) {
            V m, s, d;
            memcpy(&m, by.centre + c, sizeof(V));
            memcpy(&s, by.scale + c, sizeof(V));
            memcpy(&d, by.shift + c, sizeof(V));
            STORE(w + c, (LOAD(v + c) - m) * s + d);
        }
        for (; c < cols; c++) STORE1(w + c, (LOAD1(v + c) - by.centre[c]) * by.scale[c] + by.shift[c]);
    }
}

LOOP static void NAME(last_floor)(const T *x, T *y, I n, I cols, I stride, NAME(Lines) by) {
    for (I i = 0; i < n; i++) {
        const T *v = x + i * stride;
        T *w = y + i * stride;
        I c = 0;
        for (; c + W <= cols; c += W) {
            V m, s, d, f;
            memcpy(&m, by.centre + c, sizeof(V));
            memcpy(&s, by.scale + c, sizeof(V));
            memcpy(&d, by.shift + c, sizeof(V));
            memcpy(&f, by.floor + c, sizeof(V));
            V z = (LOAD(v + c) - m) * s + d;
            STORE(w + c, PICK(z <= f, f, z));
        }
        for (; c < cols; c++) {
            A z = (LOAD1(v + c) - by.centre[c]) * by.scale[c] + by.shift[c];
            STORE1(w + c, z <= by.floor[c] ? by.floor[c] : z);
        }
    }
}

/* Sums of dy * (x - centre) and of dy; with a floor of those dy whose line is above it, and `below` of the others. */
LOOP static void NAME(side_sums)(const T *dy, const T *x, I n, A centre, double *product, double *total) {
    double first = 0, second = 0;
    for (I i = 0; i < n;) {
        I end = least(n, i + 8 * BLOCK);
        V a = {0}, b = {0}, c = {0}, d = {0};
        for (; i + 2 * W <= end; i += 2 * W) {
            V g = LOAD(dy + i), h = LOAD(dy + i + W);
            a += g * (LOAD(x + i) - centre), b += h * (LOAD(x + i + W) - centre), c += g, d += h;
        }
        A one = NAME(lanes)(a + b), other = NAME(lanes)(c + d);
        for (; i < end; i++) {
            A g = LOAD1(dy + i);
            one += g * (LOAD1(x + i) - centre), other += g;
        }
        first += one, second += other;
    }
    *product = first, *total = second;
}

LOOP static void NAME(side_sums_floor)(const T *dy, const T *x, I n, A centre, A scale, A shift, A floor,
                                         double *product, double *total, double *below) {
    double first = 0, second = 0, third = 0;
    for (I i = 0; i < n;) {
        I end = least(n, i + 8 * BLOCK);
        V a = {0}, b = {0}, c = {0}, zero = {0};
        for (; i + W <= end; i += W) {
            V g = LOAD(dy + i), u = LOAD(x + i) - centre;
            MASK low = u * scale + shift <= ALL(floor);
            V kept = PICK(low, zero, g);
            a += kept * u, b += kept, c += PICK(low, g, zero);
        }
        A one = NAME(lanes)(a), other = NAME(lanes)(b), rest = NAME(lanes)(c);
        for (; i < end; i++) {
            A g = LOAD1(dy + i), u = LOAD1(x + i) - centre;
            if (u * scale + shift <= floor)
                rest += g;
            else
                one += g * u, other += g;
        }
        first += one, second += other, third += rest;
    }
    *product = first, *total = second, *below = third;
}

INLINE void NAME(last_sums_few)(const T *dy, const T *x, I n, I stride, const A *centre, double *product, double *total,
                                const int vectors) {
    V a[SIDEWAYS], b[SIDEWAYS], m[SIDEWAYS];
    UNROLL
    for (int j = 0; j < vectors; j++) {
        a[j] = b[j] = (V){0};
        memcpy(&m[j], centre + j * W, sizeof(V));
    }
    for (I i = 0; i < n; i++)
        UNROLL
        for (int j = 0; j < vectors; j++) {
            I o = i * stride + j * W;
            if (j * W * (I)sizeof(T) % 64 == 0) FETCH(x + o + n * stride), FETCH(dy + o + n * stride);
            V g = LOAD(dy + o);
            a[j] += g * (LOAD(x + o) - m[j]), b[j] += g;
        }
    NAME(add_to)(product, a, vectors);
    NAME(add_to)(total, b, vectors);
}

LOOP static void NAME(last_sums)(const T *dy, const T *x, I n, I cols, I stride, const A *centre, double *product,
                                   double *total) {
    memset(product, 0, (size_t)cols * sizeof(double));
    memset(total, 0, (size_t)cols * sizeof(double));
    I block = most(8, least(BLOCK, 4096 / most(cols, 1)));
    for (I i = 0; i < n; i += block) {
        I k = least(block, n - i);
        const T *g = dy + i * stride, *v = x + i * stride;
        I c = 0;
        for (; c + SIDEWAYS * W <= cols; c += SIDEWAYS * W)
            NAME(last_sums_few)(g + c, v + c, k, stride, centre + c, product + c, total + c, SIDEWAYS);
        for (; c + W <= cols; c += W)
            NAME(last_sums_few)(g + c, v + c, k, stride, centre + c, product + c, total + c, 1);
        for (; c < cols; c++) {
            A one = 0, other = 0;
            for (I j = 0; j < k; j++) {
                A d = LOAD1(g + j * stride + c);
                one += d * (LOAD1(v + j * stride + c) - centre[c]), other += d;
            }
            product[c] += one, total[c] += other;
        }
    }
}

LOOP static void NAME(last_sums_floor)(const T *dy, const T *x, I n, I cols, I stride, NAME(Lines) by, double *product,
                                         double *total, double *below) {
    memset(product, 0, (size_t)cols * sizeof(double));
    memset(total, 0, (size_t)cols * sizeof(double));
    memset(below, 0, (size_t)cols * sizeof(double));
    I block = most(8, least(BLOCK, 4096 / most(cols, 1)));
    for (I i = 0; i < n; i += block) {
        I k = least(block, n - i);
        const T *g = dy + i * stride, *v = x + i * stride;
        I c = 0;
        for (; c + W <= cols; c += W) {
            V a = {0}, b = {0}, e = {0}, zero = {0}, m, s, d, f;
            memcpy(&m, by.centre + c, sizeof(V));
            memcpy(&s, by.scale + c, sizeof(V));
            memcpy(&d, by.shift + c, sizeof(V));
            memcpy(&f, by.floor + c, sizeof(V));
            for (I j = 0; j < k; j++) {
                I o = j * stride + c;
                FETCH(v + o + k * stride), FETCH(g + o + k * stride);
                V h = LOAD(g + o), u = LOAD(v + o) - m;
                MASK low = u * s + d <= f;
                V kept = PICK(low, zero, h);
                a += kept * u, b += kept, e += PICK(low, h, zero);
            }
            NAME(add_to)(product + c, &a, 1);
            NAME(add_to)(total + c, &b, 1);
            NAME(add_to)(below + c, &e, 1);
        }
        for (; c < cols; c++) {
            A one = 0, other = 0, rest = 0;
            for (I j = 0; j < k; j++) {
                A h = LOAD1(g + j * stride + c), u = LOAD1(v + j * stride + c) - by.centre[c];
                if (u * by.scale[c] + by.shift[c] <= by.floor[c])
                    rest += h;
                else
                    one += h * u, other += h;
            }
            product[c] += one, total[c] += other, below[c] += rest;
        }
    }
}

/* dx = factor * dy + (x - centre) * slope + rest: the gradient of a line whose coefficients follow from moments of x. */
LOOP static void NAME(side_blend)(const T *dy, const T *x, T *dx, I n, A factor, A centre, A slope, A rest) {
    I i = 0;
    for (; i + W <= n; i += W) STORE(dx + i, factor * LOAD(dy + i) + ((LOAD(x + i) - centre) * slope + rest));
    for (; i < n; i++) STORE1(dx + i, factor * LOAD1(dy + i) + ((LOAD1(x + i) - centre) * slope + rest));
}

LOOP static void NAME(last_blend)(const T *dy, const T *x, T *dx, I n, I cols, I stride, const A *factor,
                                    const A *centre, const A *slope, const A *rest) {
    for (I i = 0; i < n; i++) {
        const T *g = dy + i * stride, *v = x + i * stride;
        T *w = dx + i * stride;
        I c = 0;
        for (; c + W <= cols; c += W) {
            V a, m, e, f;
            memcpy(&a, factor + c, sizeof(V));
            memcpy(&m, centre + c, sizeof(V));
            memcpy(&e, slope + c, sizeof(V));
            memcpy(&f, rest + c, sizeof(V));
            STORE(w + c, a * LOAD(g + c) + ((LOAD(v + c) - m) * e + f));
        }
        for (; c < cols; c++)
            STORE1(w + c, factor[c] * LOAD1(g + c) + ((LOAD1(v + c) - centre[c]) * slope[c] + rest[c]));
    }
}

/* The same where a floor stopped some of dy. */
LOOP static void NAME(side_blend_floor)(const T *dy, const T *x, T *dx, I n, A from, A scale, A shift, A floor,
                                          A centre, A slope, A rest) {
    I i = 0;
    V zero = {0};
    for (; i + W <= n; i += W) {
        V v = LOAD(x + i);
        V kept = PICK((v - from) * scale + shift <= ALL(floor), zero, LOAD(dy + i));
        STORE(dx + i, scale * kept + ((v - centre) * slope + rest));
    }
    for (; i < n; i++) {
        A v = LOAD1(x + i), kept = (v - from) * scale + shift <= floor ? 0 : LOAD1(dy + i);
        STORE1(dx + i, scale * kept + ((v - centre) * slope + rest));
    }
}

LOOP static void NAME(last_blend_floor)(const T *dy, const T *x, T *dx, I n, I cols, I stride, NAME(Lines) by,
                                          const A *centre, const A *slope, const A *rest) {
    V zero = {0};
    for (I i = 0; i < n; i++) {
        const T *g = dy + i * stride, *u = x + i * stride;
        T *w = dx + i * stride;
        I c = 0;
        for (; c + W <= cols; c += W) {
            V o, s, d, low, m, e, f, v = LOAD(u + c);
            memcpy(&o, by.centre + c, sizeof(V));
            memcpy(&s, by.scale + c, sizeof(V));
            memcpy(&d, by.shift + c, sizeof(V));
            memcpy(&low, by.floor + c, sizeof(V));
            memcpy(&m, centre + c, sizeof(V));
            memcpy(&e, slope + c, sizeof(V));
            memcpy(&f, rest + c, sizeof(V));
            V kept = PICK((v - o) * s + d <= low, zero, LOAD(g + c));
            STORE(w + c, s * kept + ((v - m) * e + f));
        }
        for (; c < cols; c++) {
            A v = LOAD1(u + c);
            A kept = (v - by.centre[c]) * by.scale[c] + by.shift[c] <= by.floor[c] ? 0 : LOAD1(g + c);
            STORE1(w + c, by.scale[c] * kept + ((v - centre[c]) * slope[c] + rest[c]));
        }
    }
}

/* Moments, sums and maps of one piece of a table: columns `col` to `end` of a row, one segment. Tables of numbers per
 * segment are (rows, segments, cols), `i` the index of the first. */
INLINE I NAME(at_piece)(const Table *t, I row, I segment, I col) { return (row * t->segments + segment) * t->cols + col; }

static void NAME(piece_moments)(const Table *t, const T *x, I row, I segment, I col, I end, double *mean, double *squares) {
    I n = values_in(t, segment), i = NAME(at_piece)(t, row, segment, col);
    if (t->last) {
        NAME(last_moments)(x + offset(t, row, col, segment), n, end - col, t->stride, mean + i, squares + i);
        return;
    }
    for (; col < end; col++, i++) NAME(side_moments)(x + offset(t, row, col, segment), n, mean + i, squares + i);
}

static void NAME(piece_line)(const Table *t, const T *x, T *y, I row, I segment, I col, I end, NAME(Lines) by, I i) {
    I n = values_in(t, segment), o = offset(t, row, col, segment);
    NAME(Lines) here = {by.centre + i, by.scale + i, by.shift + i, by.floor ? by.floor + i : NULL};
    if (t->last) {
        if (by.floor)
            NAME(last_floor)(x + o, y + o, n, end - col, t->stride, here);
        else
            NAME(last_line)(x + o, y + o, n, end - col, t->stride, here);
        return;
    }
    for (I j = 0; j < end - col; j++, o += t->count) {
        if (by.floor)
            NAME(side_floor)(x + o, y + o, n, here.centre[j], here.scale[j], here.shift[j], here.floor[j]);
        else
            NAME(side_line)(x + o, y + o, n, here.centre[j], here.scale[j], here.shift[j]);
    }
}

static void NAME(piece_sums)(const Table *t, const T *dy, const T *x, I row, I segment, I col, I end, NAME(Lines) by, I i,
                             double *product, double *total, double *below) {
    I n = values_in(t, segment), o = offset(t, row, col, segment), k = NAME(at_piece)(t, row, segment, col);
    NAME(Lines) here = {by.centre + i, by.scale ? by.scale + i : NULL, by.shift ? by.shift + i : NULL,
                        by.floor ? by.floor + i : NULL};
    if (t->last) {
        if (by.floor)
            NAME(last_sums_floor)(dy + o, x + o, n, end - col, t->stride, here, product + k, total + k, below + k);
        else
            NAME(last_sums)(dy + o, x + o, n, end - col, t->stride, here.centre, product + k, total + k);
        return;
    }
    for (I j = 0; j < end - col; j++, o += t->count, k++) {
        if (by.floor)
            NAME(side_sums_floor)(dy + o, x + o, n, here.centre[j], here.scale[j], here.shift[j], here.floor[j],
                                  product + k, total + k, below + k);
        else
            NAME(side_sums)(dy + o, x + o, n, here.centre[j], product + k, total + k);
    }
}

static void NAME(piece_blend)(const Table *t, const T *dy, const T *x, T *dx, I row, I segment, I col, I end,
                              NAME(Lines) by, const A *centre, const A *slope, const A *rest, I i) {
    I n = values_in(t, segment), o = offset(t, row, col, segment);
    if (t->last) {
        if (by.floor) {
            NAME(Lines) here = {by.centre + i, by.scale + i, by.shift + i, by.floor + i};
            NAME(last_blend_floor)(dy + o, x + o, dx + o, n, end - col, t->stride, here, centre + i, slope + i, rest + i);
        } else if (dy) {
            NAME(last_blend)(dy + o, x + o, dx + o, n, end - col, t->stride, by.scale + i, centre + i, slope + i, rest + i);
        } else {
            NAME(Lines) here = {(A *)centre + i, (A *)slope + i, (A *)rest + i, NULL};
            NAME(last_line)(x + o, dx + o, n, end - col, t->stride, here);
        }
        return;
    }
    for (I j = i; j < i + end - col; j++, o += t->count) {
        if (by.floor)
            NAME(side_blend_floor)(dy + o, x + o, dx + o, n, by.centre[j], by.scale[j], by.shift[j], by.floor[j],
                                   centre[j], slope[j], rest[j]);
        else if (dy)
            NAME(side_blend)(dy + o, x + o, dx + o, n, by.scale[j], centre[j], slope[j], rest[j]);
        else
            NAME(side_line)(x + o, dx + o, n, centre[j], slope[j], rest[j]);
    }
}

/* Each piece of the table `t`, by all threads. */
#define PIECES                                                                                                          \
    _Pragma("omp parallel for schedule(static) num_threads(t->threads) if (t->threads > 1)")                            \
    for (I piece = 0; piece < t->rows * t->segments * t->strips; piece++)
#define PIECE                                                                                                           \
    I strip = piece % t->strips, segment = piece / t->strips % t->segments;                                             \
    I row = piece / t->strips / t->segments, col = strip * t->strip, end = least(t->cols, col + t->strip)

static Table NAME(of)(int last, I n, I c, I p, int threads) {
    return last ? table(1, n, c, p, c, p * c, threads) : table(0, n, c, p, 1, c * p, threads);
}

/* Row n of x has the coefficients of row n % k of a table (k, c). (x - m) * a + (b + a m) = a x + b for every m. One near
 * the values of x loses nothing in x - m, nor in their products with dy; -b / a loses nothing in the sum. So it is -b / a
 * where that is between two of the row's values, else the nearer one of them: where a is next to nothing, as the weight
 * of a channel that training has given up, -b / a is far from everything. */
static void NAME(lines)(int last, I n, I c, I p, I k, const T *x, const double *scale, const double *shift,
                        const double *floor, NAME(Lines) by, int threads) {
    I step = last ? 1 : p, middle = p / 2, before = n > k ? middle : most(middle - 1, 0);
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1 && k * c > FEW / 2)")
    for (I r = 0; r < k; r++) {
        I final = n > r ? r + (n - 1 - r) / k * k : r; /* the row's last sample */
        const T *u = x + r * c * p + (last ? middle * c : middle), *v = x + final * c * p + (last ? before * c : before);
        for (I j = 0; j < c; j++) {
            I i = r * c + j;
            double one = LOAD1(u + j * step), other = LOAD1(v + j * step), m = -shift[i] / scale[i];
            double low = one < other ? one : other, high = one > other ? one : other;
            m = m < low ? low : m;
            m = m > high ? high : m;
            m = fabs(m) < 1e30 ? m : one; /* not at 0 / 0 */
            m = fabs(m) < 1e30 ? m : 0;
            A near = (A)m;
            by.centre[i] = near;
            by.scale[i] = (A)scale[i];
            by.shift[i] = (A)(shift[i] + scale[i] * (double)near);
            if (floor) by.floor[i] = (A)floor[i];
        }
    }
}

/* Mean and biased variance (k, c) of the rows that are alike modulo k. */
static int NAME(moments)(int last, I n, I c, I p, I k, const void *x, double *mean, double *var, int threads) {
    const Table whole = NAME(of)(last, n, c, p, threads), *t = &whole;
    I cells = n * t->segments * c;
    double *means = malloc((size_t)(2 * cells + 1) * sizeof(double)), *squares = means + cells;
    if (!means) return 1;
    PIECES {
        PIECE;
        NAME(piece_moments)(t, x, row, segment, col, end, means, squares);
    }
    memset(mean, 0, (size_t)(k * c) * sizeof(double));
    memset(var, 0, (size_t)(k * c) * sizeof(double));
    for (I r = 0; r < n * t->segments; r++) {
        double share = (double)values_in(t, r % t->segments) / (double)(p * ((n - r / t->segments % k + k - 1) / k));
        double *to = mean + r / t->segments % k * c, *from = means + r * c;
        for (I j = 0; j < c; j++) to[j] += share * from[j];
    }
    for (I r = 0; r < n * t->segments; r++) {
        double count = (double)(p * ((n - r / t->segments % k + k - 1) / k)), own = (double)values_in(t, r % t->segments);
        double *to = var + r / t->segments % k * c, *from = means + r * c, *m = mean + r / t->segments % k * c;
        for (I j = 0; j < c; j++) to[j] += (squares[r * c + j] + own * (from[j] - m[j]) * (from[j] - m[j])) / count;
    }
    free(means);
    return 0;
}

/* y = scale * x + shift, at least `floor` (or NULL); tables (k, c). */
static int NAME(affine)(int last, I n, I c, I p, I k, const void *x, const double *scale, const double *shift,
                        const double *floor, void *y, int threads) {
    const Table whole = NAME(of)(last, n, c, p, threads), *t = &whole;
    I cells = k * c;
    A *room = malloc((size_t)(4 * cells + 1) * sizeof(A));
    if (!room) return 1;
    NAME(Lines) by = {room, room + cells, room + 2 * cells, floor ? room + 3 * cells : NULL};
    NAME(lines)(last, n, c, p, k, x, scale, shift, floor, by, t->threads);
    PIECES {
        PIECE;
        NAME(piece_line)(t, x, y, row, segment, col, end, by, row % k * c + col);
    }
    free(room);
    return 0;
}

/* Sums (k, c) of dy * x, of dy, and with a floor of those dy that it stopped (which are in no other sum). */
static int NAME(sums)(int last, I n, I c, I p, I k, const void *dy, const void *x, const double *scale,
                      const double *shift, const double *floor, double *product, double *total, double *below, int threads) {
    const Table whole = NAME(of)(last, n, c, p, threads), *t = &whole;
    I cells = k * c, pieces = n * t->segments * c;
    A *room = malloc((size_t)(4 * cells + 1) * sizeof(A));
    double *parts = malloc((size_t)(3 * pieces + 1) * sizeof(double));
    if (!room || !parts) {
        free(room), free(parts);
        return 1;
    }
    NAME(Lines) by = {room, room + cells, room + 2 * cells, floor ? room + 3 * cells : NULL};
    NAME(lines)(last, n, c, p, k, x, scale, shift, floor, by, t->threads);
    PIECES {
        PIECE;
        NAME(piece_sums)(t, dy, x, row, segment, col, end, by, row % k * c + col, parts, parts + pieces, parts + 2 * pieces);
    }
    memset(product, 0, (size_t)cells * sizeof(double));
    memset(total, 0, (size_t)cells * sizeof(double));
    if (floor) memset(below, 0, (size_t)cells * sizeof(double));
    for (I r = 0; r < n * t->segments; r++) {
        I to = r / t->segments % k * c;
        for (I j = 0; j < c; j++) {
            product[to + j] += parts[r * c + j], total[to + j] += parts[pieces + r * c + j];
            if (floor) below[to + j] += parts[2 * pieces + r * c + j];
        }
    }
    for (I i = 0; i < cells; i++) product[i] += (double)by.centre[i] * total[i];
    free(room), free(parts);
    return 0;
}

/* The gradient of x through its moments is (x - centre) * slope + rest. */
static void NAME(of_moments)(I n, I c, I p, I k, const double *mean, const double *d_mean, const double *d_var, A *centre,
                             A *slope, A *rest) {
    for (I r = 0; r < k; r++) {
        double count = (double)(p * ((n - r + k - 1) / k));
        for (I i = r * c; i < (r + 1) * c; i++) {
            double e = 2 * d_var[i] / count;
            centre[i] = (A)mean[i];
            slope[i] = (A)e;
            rest[i] = (A)(d_mean[i] / count + e * ((double)centre[i] - mean[i]));
        }
    }
}

/* The gradient of x: scale * dy where the line was above the floor, and that of moments of x, where there are any. */
static int NAME(blend)(int last, I n, I c, I p, I k, const void *dy, const void *x, const double *scale,
                       const double *shift, const double *floor, const double *mean, const double *d_mean,
                       const double *d_var, void *dx, int threads) {
    const Table whole = NAME(of)(last, n, c, p, threads), *t = &whole;
    I cells = k * c;
    A *room = calloc((size_t)(7 * cells + 1), sizeof(A));
    if (!room) return 1;
    NAME(Lines) by = {room, room + cells, room + 2 * cells, floor ? room + 3 * cells : NULL};
    A *centre = room + 4 * cells, *slope = room + 5 * cells, *rest = room + 6 * cells;
    if (floor)
        NAME(lines)(last, n, c, p, k, x, scale, shift, floor, by, t->threads);
    else if (dy)
        for (I i = 0; i < cells; i++) by.scale[i] = (A)scale[i];
    if (mean) NAME(of_moments)(n, c, p, k, mean, d_mean, d_var, centre, slope, rest);
    PIECES {
        PIECE;
        I i = row % k * c + col;
        if (mean || floor) {
            NAME(piece_blend)(t, dy, x, dx, row, segment, col, end, by, centre, slope, rest, i);
        } else { /* centre and shift are 0: scale * dy */
            NAME(Lines) plain = {centre, by.scale, rest, NULL};
            NAME(piece_line)(t, dy, dx, row, segment, col, end, plain, i);
        }
    }
    free(room);
    return 0;
}

/* A sample's c * p values, channel after channel, are g groups; k sets of samples, n % k. How their statistics are found:
 * the largest cells that are inside one channel and one group. */
typedef struct {
    Table t;
    I n, k, g, runs;       /* runs: rows of a sample */
    int wide;              /* a row is a whole set, a column one value of a sample */
    int pooled;            /* one deviation for all groups of a set: 0 no, 1 from their means, 2 from the mean of all */
    I width;               /* columns that belong to a group, where they are neighbours; else cols */
    I *group, *channel;    /* (runs, cols), (cols) */
    double *one, *two;     /* (rows, segments, cols) */
    A *centre, *scale, *shift, *slope; /* (k * runs, cols) */
    void *room;
} NAME(Plan);

static int NAME(plan)(NAME(Plan) *q, int last, I n, I c, I p, I k, I g, int pooled, int threads) {
    I size = c * p / g, unit = common(p, size);
    q->n = n, q->k = k, q->g = g, q->pooled = pooled;
    q->wide = unit < SHORT && unit < p && n % k == 0 && n / k >= SHORT;
    I lots = q->wide ? 1 : p / most(unit, 1);
    q->runs = last && !q->wide ? lots : 1;
    if (q->wide)
        q->t = table(1, k, c * p, n / k, k * c * p, c * p, threads);
    else if (last)
        q->t = table(1, n * lots, c, unit, c, unit * c, threads);
    else
        q->t = table(0, n, c * lots, unit, 1, c * p, threads);
    I cols = q->t.cols, pieces = q->t.rows * q->t.segments * cols, cells = k * q->runs * cols;
    q->width = !q->t.last && !pooled ? cols / g : cols;
    size_t bytes = (size_t)((q->runs + 1) * cols) * sizeof(I) + (size_t)(2 * pieces) * sizeof(double) +
                   (size_t)(4 * cells) * sizeof(A);
    q->room = malloc(bytes + 1);
    if (!q->room) return 1;
    q->one = q->room, q->two = q->one + pieces;
    q->group = (I *)(q->two + pieces), q->channel = q->group + q->runs * cols;
    q->centre = (A *)(q->channel + cols), q->scale = q->centre + cells, q->shift = q->scale + cells;
    q->slope = q->shift + cells;
    for (I r = 0; r < q->runs; r++)
        for (I j = 0; j < cols; j++) {
            if (q->wide) {
                I at_channel = last ? j % c : j / p, position = last ? j / c : j % p;
                q->group[j] = (at_channel * p + position) / size, q->channel[j] = at_channel;
            } else {
                I run = last ? j * lots + r : j; /* of the sample's c * lots */
                q->group[r * cols + j] = run * unit / size, q->channel[j] = last ? j : j / lots;
            }
        }
    return 0;
}

/* The rows of set `s`, one after the other. */
#define ROWS(q, s)                                                                                                      \
    for (I sample = (s); sample < ((q)->wide ? (s) + 1 : (q)->n); sample += (q)->k)                                     \
        for (I run = 0, row = sample * (q)->runs; run < (q)->runs; run++, row++)
#define SEGMENTS(q) for (I segment = 0; segment < (q)->t.segments; segment++)

INLINE double NAME(count)(const NAME(Plan) *q, I s, I size) { return (double)((q->n - s + q->k - 1) / q->k * size); }

/* Of set s and columns col to end, which are whole groups, from what the pieces have: mean and variance. */
static void NAME(pool)(const NAME(Plan) *q, I s, I col, I end, I size, double *mean, double *var) {
    I cols = q->t.cols;
    double count = NAME(count)(q, s, size);
    double each = 1 / count;
    for (I j = col; j < end; j++)
        for (I r = 0; r < q->runs; r++) mean[q->group[r * cols + j]] = var[q->group[r * cols + j]] = 0;
    ROWS(q, s) SEGMENTS(q) {
        const double *from = q->one + (row * q->t.segments + segment) * cols;
        const I *group = q->group + run * cols;
        double share = (double)values_in(&q->t, segment) / count;
        for (I j = col; j < end; j++) mean[group[j]] += share * from[j];
    }
    ROWS(q, s) SEGMENTS(q) {
        I at_row = (row * q->t.segments + segment) * cols;
        const I *group = q->group + run * cols;
        double own = (double)values_in(&q->t, segment);
        for (I j = col; j < end; j++) {
            double away = q->one[at_row + j] - mean[group[j]];
            var[group[j]] += (q->two[at_row + j] + own * away * away) * each;
        }
    }
}

INLINE double NAME(over_groups)(const NAME(Plan) *q, const double *values) {
    double sum = 0;
    for (I g = 0; g < q->g; g++) sum += values[g];
    return sum / (double)q->g;
}

/* y of one set and columns. stats: mean, biased variance, 1 / sqrt(variance + eps) and unbiased variance, (k, g) each. */
static void NAME(forward_lines)(const NAME(Plan) *q, I s, I col, I end, I size, double eps, const void *weight,
                                const void *bias, int wide, double *stats) {
    I cols = q->t.cols, all = q->k * q->g;
    double *mean = stats + s * q->g, *var = mean + all, *rstd = var + all, count = NAME(count)(q, s, size), one = 0;
    if (q->pooled) {
        double level = NAME(over_groups)(q, mean);
        for (I g = 0; g < q->g; g++) one += var[g] + (q->pooled == 2 ? (mean[g] - level) * (mean[g] - level) : 0);
        one = 1 / sqrt(one / (double)q->g + eps);
    }
    for (I r = 0; r < q->runs; r++)
        for (I j = col; j < end; j++) rstd[q->group[r * cols + j]] = -1;
    for (I r = 0; r < q->runs; r++)
        for (I j = col; j < end; j++) {
            I g = q->group[r * cols + j], i = (s * q->runs + r) * cols + j;
            if (rstd[g] == -1) {
                rstd[g] = q->pooled ? one : 1 / sqrt(var[g] + eps);
                rstd[g + all] = count > 1 ? var[g] * (count / (count - 1)) : var[g];
            }
            double a = weight ? rstd[g] * at(weight, wide, q->channel[j]) : rstd[g];
            q->centre[i] = (A)mean[g];
            q->scale[i] = (A)a;
            q->shift[i] = (A)((bias ? at(bias, wide, q->channel[j]) : 0) + a * ((double)q->centre[i] - mean[g]));
        }
}

INLINE I NAME(line_of)(const NAME(Plan) *q, I row, I col) {
    I s = q->wide ? row : row / q->runs % q->k;
    return (s * q->runs + row % q->runs) * q->t.cols + col;
}

/* Whether each set (and in "side" each of its groups) is to be gone through by one thread, while it is in the cache; not
 * where that would be many short runs far from each other. */
INLINE int NAME(by_set)(const NAME(Plan) *q) {
    I sets = q->k * (q->t.cols / most(q->width, 1));
    if (!q->t.last && q->k < q->n && q->width * q->t.count < SCATTERED) return 0;
    return q->t.threads == 1 || sets % q->t.threads == 0 || sets >= 4 * q->t.threads;
}

#define SETS                                                                                                            \
    _Pragma("omp parallel for schedule(static) num_threads(q->t.threads) if (q->t.threads > 1)")                        \
    for (I set = 0; set < q->k * (q->t.cols / q->width); set++)
#define SET                                                                                                             \
    I s = set / (q->t.cols / q->width), from = set % (q->t.cols / q->width) * q->width, to = from + q->width
/* the pieces of a row between two columns */
#define STRIPS(q, from, to)                                                                                             \
    for (I col = (from), end; end = (q)->t.last ? least((to), col + (q)->t.strip) : (to), col < (to); col = end)

/* Asks for the start of the set's next row, which lies far from this one, so that the processor does not foresee it. */
INLINE void NAME(ahead)(const NAME(Plan) *q, const T *x, I row, I col, const int written) {
    if (q->t.last || row + q->k >= q->n) return;
    const T *next = x + offset(&q->t, row + q->k, col, 0);
    UNROLL
    for (int line = 0; line < 8; line++) {
        if (written)
            __builtin_prefetch(next + line * (64 / sizeof(T)), 1);
        else
            __builtin_prefetch(next + line * (64 / sizeof(T)));
    }
}

static int NAME(normalize)(int last, I n, I c, I p, I k, I g, int pooled, double eps, const void *x, const void *weight,
                           const void *bias, int wide, int given, double *stats, void *y, int threads) {
    NAME(Plan) plan, *q = &plan;
    const Table *t = &q->t;
    if (NAME(plan)(q, last, n, c, p, k, g, pooled, threads)) return 1;
    NAME(Lines) by = {q->centre, q->scale, q->shift, NULL};
    I size = c * p / g;
    if (NAME(by_set)(q)) {
        SETS {
            SET;
            if (!given) {
                ROWS(q, s) SEGMENTS(q) STRIPS(q, from, to) {
                    NAME(ahead)(q, x, row, col, 0);
                    NAME(piece_moments)(&q->t, x, row, segment, col, end, q->one, q->two);
                }
                NAME(pool)(q, s, from, to, size, stats + s * g, stats + k * g + s * g);
            }
            NAME(forward_lines)(q, s, from, to, size, eps, weight, bias, wide, stats);
            ROWS(q, s) SEGMENTS(q) STRIPS(q, from, to) {
                NAME(ahead)(q, x, row, col, 0);
                NAME(ahead)(q, y, row, col, 1);
                NAME(piece_line)(&q->t, x, y, row, segment, col, end, by, NAME(line_of)(q, row, col));
            }
        }
    } else {
        if (!given) {
            PIECES {
                PIECE;
                NAME(piece_moments)(&q->t, x, row, segment, col, end, q->one, q->two);
            }
            for (I s = 0; s < k; s++) NAME(pool)(q, s, 0, q->t.cols, size, stats + s * g, stats + k * g + s * g);
        }
        for (I s = 0; s < k; s++) NAME(forward_lines)(q, s, 0, q->t.cols, size, eps, weight, bias, wide, stats);
        PIECES {
            PIECE;
            NAME(piece_line)(&q->t, x, y, row, segment, col, end, by, NAME(line_of)(q, row, col));
        }
    }
    free(q->room);
    return 0;
}

/* With h = (x - mean) * rstd: dx = rstd * (weight * dy - mean(weight * dy) - h * mean(weight * dy * h)), means over a
 * group of a set; from sums over cells of dy * (x - centre) and dy. */
static void NAME(backward_lines)(const NAME(Plan) *q, I s, I col, I end, I size, const void *weight, int wide,
                                 const double *stats, double *along, double *level) {
    I cols = q->t.cols, all = q->k * q->g;
    const double *mean = stats + s * q->g, *rstd = mean + 2 * all;
    double count = NAME(count)(q, s, size);
    along += s * q->g, level += s * q->g;
    for (I r = 0; r < q->runs; r++)
        for (I j = col; j < end; j++) along[q->group[r * cols + j]] = level[q->group[r * cols + j]] = 0;
    ROWS(q, s) SEGMENTS(q) {
        I i = (row * q->t.segments + segment) * cols;
        const I *group = q->group + run * cols;
        for (I j = col; j < end; j++) {
            double w = weight ? at(weight, wide, q->channel[j]) : 1, m = mean[group[j]];
            along[group[j]] += w * (q->one[i + j] + ((double)(A)m - m) * q->two[i + j]);
            level[group[j]] += w * q->two[i + j];
        }
    }
    double one = q->pooled ? NAME(over_groups)(q, along) : 0, middle = q->pooled == 2 ? NAME(over_groups)(q, mean) : 0;
    for (I r = 0; r < q->runs; r++)
        for (I j = col; j < end; j++) {
            I g = q->group[r * cols + j], i = (s * q->runs + r) * cols + j;
            double e = -rstd[g] * rstd[g] * rstd[g] * (q->pooled ? one : along[g]) / count;
            double from = q->pooled == 2 ? middle : mean[g];
            q->scale[i] = (A)(weight ? rstd[g] * at(weight, wide, q->channel[j]) : rstd[g]);
            q->slope[i] = (A)e;
            q->shift[i] = (A)(e * ((double)q->centre[i] - from) - rstd[g] * level[g] / count);
        }
}

static void NAME(centres)(const NAME(Plan) *q, I s, I col, I end, const double *mean) {
    for (I r = 0; r < q->runs; r++)
        for (I j = col; j < end; j++)
            q->centre[(s * q->runs + r) * q->t.cols + j] = (A)mean[s * q->g + q->group[r * q->t.cols + j]];
}

/* fixed: the statistics are not those of x, so that dx = rstd * weight * dy. */
static int NAME(normalize_backward)(int last, I n, I c, I p, I k, I g, int pooled, const void *dy, const void *x, const void *weight,
                                    int wide, int fixed, const double *stats, void *d_weight, void *d_bias, void *dx,
                                    int threads) {
    NAME(Plan) plan, *q = &plan;
    const Table *t = &q->t;
    if (NAME(plan)(q, last, n, c, p, k, g, pooled, threads)) return 1;
    double *sums = calloc((size_t)(2 * k * g + 2 * c + 1), sizeof(double)), *weights = sums + 2 * k * g;
    if (!sums) {
        free(q->room);
        return 1;
    }
    NAME(Lines) only = {q->centre, NULL, NULL, NULL}, by = {NULL, q->scale, NULL, NULL};
    I size = c * p / g;
    if (fixed) {
        if (d_weight) {
            for (I s = 0; s < k; s++) NAME(centres)(q, s, 0, q->t.cols, stats);
            PIECES {
                PIECE;
                NAME(piece_sums)(&q->t, dy, x, row, segment, col, end, only, NAME(line_of)(q, row, col), q->one, q->two, NULL);
            }
        }
        if (dx) {
            for (I i = 0; i < k * q->runs * t->cols; i++) {
                I h = i / (q->runs * t->cols) * g + q->group[i % (q->runs * t->cols)];
                double w = weight ? at(weight, wide, q->channel[i % t->cols]) : 1;
                q->scale[i] = (A)(stats[2 * k * g + h] * w), q->shift[i] = q->slope[i] = 0;
            }
            NAME(Lines) times = {q->slope, q->scale, q->shift, NULL};
            PIECES {
                PIECE;
                NAME(piece_line)(&q->t, dy, dx, row, segment, col, end, times, NAME(line_of)(q, row, col));
            }
        }
    } else if (NAME(by_set)(q)) {
        SETS {
            SET;
            NAME(centres)(q, s, from, to, stats);
            ROWS(q, s) SEGMENTS(q) STRIPS(q, from, to) {
                NAME(ahead)(q, x, row, col, 0);
                NAME(ahead)(q, dy, row, col, 0);
                NAME(piece_sums)(&q->t, dy, x, row, segment, col, end, only, NAME(line_of)(q, row, col), q->one, q->two, NULL);
            }
            if (!dx) continue;
            NAME(backward_lines)(q, s, from, to, size, weight, wide, stats, sums, sums + k * g);
            ROWS(q, s) SEGMENTS(q) STRIPS(q, from, to) {
                NAME(ahead)(q, x, row, col, 0);
                NAME(ahead)(q, dy, row, col, 0);
                NAME(ahead)(q, dx, row, col, 1);
                NAME(piece_blend)(&q->t, dy, x, dx, row, segment, col, end, by, q->centre, q->slope, q->shift,
                                  NAME(line_of)(q, row, col));
            }
        }
    } else {
        for (I s = 0; s < k; s++) NAME(centres)(q, s, 0, q->t.cols, stats);
        PIECES {
            PIECE;
            NAME(piece_sums)(&q->t, dy, x, row, segment, col, end, only, NAME(line_of)(q, row, col), q->one, q->two, NULL);
        }
        if (dx) {
            for (I s = 0; s < k; s++)
                NAME(backward_lines)(q, s, 0, q->t.cols, size, weight, wide, stats, sums, sums + k * g);
            PIECES {
                PIECE;
                NAME(piece_blend)(&q->t, dy, x, dx, row, segment, col, end, by, q->centre, q->slope, q->shift,
                                  NAME(line_of)(q, row, col));
            }
        }
    }
    if (d_weight) {
        for (I s = 0; s < k; s++)
            ROWS(q, s) SEGMENTS(q) {
                I i = (row * q->t.segments + segment) * q->t.cols;
                const I *group = q->group + run * q->t.cols;
                for (I j = 0; j < q->t.cols; j++) {
                    double m = stats[s * g + group[j]], h = stats[2 * k * g + s * g + group[j]];
                    weights[q->channel[j]] += (q->one[i + j] + ((double)(A)m - m) * q->two[i + j]) * h;
                    weights[c + q->channel[j]] += q->two[i + j];
                }
            }
        for (I j = 0; j < c; j++) put(d_weight, wide, j, weights[j]), put(d_bias, wide, j, weights[c + j]);
    }
    free(sums), free(q->room);
    return 0;
}

/* Curves. In both layouts a vector of values meets vectors of the numbers of its cells: in "side" W positions that share
 * them, in "last" W columns. So one loop serves both, over n vectors that lie `step` apart. */
typedef struct {
    const T *dy, *x;
    T *out;
    const A *k, *centre, *slope, *rest; /* k: (numbers, cells); the others NULL without a gradient of moments */
    I cells;
    double *sums; /* (numbers, apart) */
    I apart;
    int last;
} NAME(Curve);

/* sigmoid(z) is over / what is returned, and 1 - sigmoid(z) is rest / that: no difference is taken, nothing overflows. */
INLINE V NAME(sigmoid)(V z, V *over, V *rest) {
    V one = ALL((A)1), e = NAME(exp)(PICK(z < 0, z, -z));
    *over = PICK(z < 0, e, one), *rest = PICK(z < 0, one, e);
    return one + e;
}

INLINE V NAME(curve_value)(const int curve, V x, const V *k) {
    if (curve == GATE) {
        V over, rest, under = NAME(sigmoid)(k[0] * x, &over, &rest);
        return x * (over / under) * k[1] + k[2];
    }
    V t = k[0] * x + k[1];
    return x / PICK(t <= k[2], k[2], t) * k[3] + k[4];
}

INLINE V NAME(curve_slope)(const int curve, V x, const V *k) {
    if (curve == GATE) {
        V over, rest, r = 1 / NAME(sigmoid)(k[0] * x, &over, &rest), s = over * r;
        return (s + k[0] * (x * s * (rest * r))) * k[1];
    }
    V t = k[0] * x + k[1];
    MASK low = t <= k[2];
    V r = 1 / PICK(low, k[2], t);
    return k[3] * r * PICK(low, ALL((A)1), k[1] * r); /* 1 - k0 x r is k1 r */
}

/* Adds g times the derivatives by the numbers, but for `curve_factor`, which is alike in a cell. */
INLINE void NAME(curve_parts)(const int curve, V g, V x, const V *k, V *sums) {
    if (curve == GATE) {
        V over, rest, r = 1 / NAME(sigmoid)(k[0] * x, &over, &rest), along = g * (x * (over * r));
        sums[0] += along * (x * (rest * r)), sums[1] += along, sums[2] += g;
        return;
    }
    V t = k[0] * x + k[1], zero = {0};
    MASK low = t <= k[2];
    V r = 1 / PICK(low, k[2], t), q = x * r, along = g * q, steep = along * r;
    sums[0] += PICK(low, zero, along * q), sums[1] += PICK(low, zero, steep), sums[2] += PICK(low, steep, zero);
    sums[3] += along, sums[4] += g;
}

INLINE double NAME(curve_factor)(int curve, int number, const double *const *k, I cell) {
    if (curve == GATE) return number == 0 ? k[1][cell] : 1;
    return number < 3 ? -k[3][cell] : 1;
}

/* The numbers that a vector of values needs, from the first cell's. */
INLINE V NAME(numbers)(const A *k, int last, I lanes) {
    if (!last) return ALL(*k);
    V v = {0};
    if (lanes == W)
        memcpy(&v, k, sizeof(V));
    else
        memcpy(&v, k, (size_t)lanes * sizeof(A));
    return v;
}

/* n vectors, at most BLOCK, of which `lanes` values count; `to`: where the sums of the first cell go. */
INLINE void NAME(curve_block)(const int curve, const int task, const NAME(Curve) *b, I o, I n, I step, I lanes, I cell,
                              I to) {
    T some[3][BLOCK * sizeof(V) / sizeof(A)];
    const T *x = b->x + o, *dy = task == VALUES ? NULL : b->dy + o;
    T *out = task == SUMS ? NULL : b->out + o;
    I far = step;
    if (lanes < W) { /* padded, in a copy */
        memset(some, 0, sizeof(some));
        for (I i = 0; i < n; i++) {
            memcpy(some[0] + i * W, x + i * step, (size_t)lanes * sizeof(T));
            if (task != VALUES) memcpy(some[1] + i * W, dy + i * step, (size_t)lanes * sizeof(T));
        }
        x = some[0], dy = some[1], out = some[2], far = W;
    }
    V k[MOST], s[MOST], centre = {0}, slope = {0}, rest = {0};
    const int numbers = NUMBERS(curve);
    UNROLL
    for (int j = 0; j < numbers; j++) {
        k[j] = NAME(numbers)(b->k + j * b->cells + cell, b->last, lanes);
        s[j] = (V){0};
    }
    const int pulled = task == SLOPES && b->slope;
    if (pulled) {
        centre = NAME(numbers)(b->centre + cell, b->last, lanes);
        slope = NAME(numbers)(b->slope + cell, b->last, lanes);
        rest = NAME(numbers)(b->rest + cell, b->last, lanes);
    }
    for (I i = 0; i < n; i++) {
        FETCH(x + (i + n) * far);
        V v = LOAD(x + i * far);
        if (task == VALUES) {
            STORE(out + i * far, NAME(curve_value)(curve, v, k));
            continue;
        }
        FETCH(dy + (i + n) * far);
        V g = LOAD(dy + i * far);
        if (task == SUMS) {
            NAME(curve_parts)(curve, g, v, k, s);
            continue;
        }
        V d = g * NAME(curve_slope)(curve, v, k);
        if (pulled) d += (v - centre) * slope + rest; /* not 0 * v, which may be infinite */
        STORE(out + i * far, d);
    }
    if (task == SUMS)
        UNROLL
        for (int j = 0; j < numbers; j++)
            for (I l = 0; l < lanes; l++) b->sums[j * b->apart + to + (b->last ? l : 0)] += s[j][l];
    for (I i = 0; task != SUMS && lanes < W && i < n; i++)
        memcpy(b->out + o + i * step, out + i * W, (size_t)lanes * sizeof(T));
}

LOOP static void NAME(bend)(int curve, int task, const NAME(Curve) *b, I o, I n, I step, I lanes, I cell, I to) {
    switch (curve * 3 + task) {
    case 0: NAME(curve_block)(GATE, VALUES, b, o, n, step, lanes, cell, to); break;
    case 1: NAME(curve_block)(GATE, SLOPES, b, o, n, step, lanes, cell, to); break;
    case 2: NAME(curve_block)(GATE, SUMS, b, o, n, step, lanes, cell, to); break;
    case 3: NAME(curve_block)(DIVIDE, VALUES, b, o, n, step, lanes, cell, to); break;
    case 4: NAME(curve_block)(DIVIDE, SLOPES, b, o, n, step, lanes, cell, to); break;
    default: NAME(curve_block)(DIVIDE, SUMS, b, o, n, step, lanes, cell, to);
    }
}

/* n values of a cell, side by side. */
static void NAME(side_curve)(int curve, int task, const NAME(Curve) *b, I o, I n, I cell, I to) {
    I whole = n / W, left = n % W;
    for (I i = 0; i < whole; i += BLOCK) NAME(bend)(curve, task, b, o + i * W, least(BLOCK, whole - i), W, W, cell, to);
    if (left) NAME(bend)(curve, task, b, o + whole * W, 1, W, left, cell, to);
}

/* n values of each of `cols` neighbouring cells, in blocks that stay in the cache while their columns are gone through. */
static void NAME(last_curve)(int curve, int task, const NAME(Curve) *b, I o, I n, I cols, I stride, I cell, I to) {
    I block = most(16, least(BLOCK, 2048 / most(cols, 1)));
    for (I i = 0; i < n; i += block)
        for (I c = 0; c < cols; c += W)
            NAME(bend)(curve, task, b, o + i * stride + c, least(block, n - i), stride, least(W, cols - c), cell + c, to + c);
}

/* y, from dy also dx (with the gradient of moments, or NULL), or with `sums` those (numbers, k, c) of dy times the
 * derivatives by the numbers of cells, tables (k, c) each. */
static int NAME(curve)(int last, I n, I c, I p, I k, int curve, const void *dy, const void *x, const double *const *tables,
                       double *sums, const double *mean, const double *d_mean, const double *d_var, void *out, int threads) {
    const Table whole = NAME(of)(last, n, c, p, threads), *t = &whole;
    I cells = k * c, pieces = sums ? n * t->segments * c : 0, numbers = NUMBERS(curve);
    int task = sums ? SUMS : dy ? SLOPES : VALUES;
    A *room = malloc((size_t)((numbers + 3) * cells + 1) * sizeof(A));
    double *parts = calloc((size_t)(numbers * pieces + 1), sizeof(double));
    if (!room || !parts) {
        free(room), free(parts);
        return 1;
    }
    A *centre = room + numbers * cells, *slope = centre + cells, *rest = slope + cells;
    for (I j = 0; j < numbers; j++)
        for (I i = 0; i < cells; i++) room[j * cells + i] = (A)tables[j][i];
    if (mean) NAME(of_moments)(n, c, p, k, mean, d_mean, d_var, centre, slope, rest);
    NAME(Curve) each = {dy, x, out, room, centre, mean ? slope : NULL, rest, cells, parts, pieces, last}, *b = &each;
    PIECES {
        PIECE;
        I size = values_in(t, segment), o = offset(t, row, col, segment), cell = row % k * c + col;
        I to = NAME(at_piece)(t, row, segment, col);
        if (t->last)
            NAME(last_curve)(curve, task, b, o, size, end - col, t->stride, cell, to);
        else
            for (I j = 0; j < end - col; j++) NAME(side_curve)(curve, task, b, o + j * t->count, size, cell + j, to + j);
    }
    if (sums) memset(sums, 0, (size_t)(numbers * cells) * sizeof(double));
    for (int j = 0; sums && j < numbers; j++) {
        double *to = sums + j * cells;
        for (I r = 0; r < n * t->segments; r++)
            for (I i = 0; i < c; i++) to[r / t->segments % k * c + i] += parts[j * pieces + r * c + i];
        for (I i = 0; i < cells; i++) to[i] *= NAME(curve_factor)(curve, j, tables, i);
    }
    free(room), free(parts);
    return 0;
}

/* Normalization of the channels at each position, c values: y = h * weight + bias with h = (x - mean) / sqrt(var + eps),
 * or without a mean (then near, rest and level are 0). Few positions at a time, so that their values are in the cache
 * when they are read again: RUN positions side by side ("side"), or W rows of channels ("last"). */
typedef struct {
    I n, c, p; /* positions of a sample; in "last" all positions are one row after the other: n = 1 */
    int centred;
    A share, divisor, eps; /* 1 / c; 1 over what the sum of squares is divided by; added to the variance */
    const A *weight, *bias;
    I run, runs;      /* positions in one block, blocks of a sample */
    I blocks, pieces; /* blocks in one piece, pieces */
    int last, threads;
    A *room;
} NAME(Rows);

/* Of the positions of a block: sums over the channels of u = x - near, u * u, and in the backward of g = weight * dy and
 * g * u; then h = (x - near) * scale + shift, and dx = scale * (weight * dy - h * slope - level). */
typedef struct {
    A near[RUN], u[RUN], uu[RUN], g[RUN], gu[RUN], scale[RUN], shift[RUN], slope[RUN], level[RUN];
} NAME(Positions);

static int NAME(rows)(NAME(Rows) *q, int last, I n, I c, I p, int centred, int unbiased, double eps, const A *weight,
                      const A *bias, int threads) {
    last = last || p == 1;
    NAME(Rows) of = {last ? 1 : n, c, last ? n * p : p, centred, (A)(1 / (double)c), (A)(1 / (double)(c - unbiased)),
                     (A)eps, weight, bias, last ? W : RUN, 0, 0, 0, last, 1, NULL};
    of.runs = (of.p + of.run - 1) / of.run;
    of.blocks = most(1, SEGMENT / 2 / (c * least(of.run, of.p)));
    of.pieces = (of.n * of.runs + of.blocks - 1) / of.blocks;
    of.threads = (int)most(1, least(n * c * p / FEW, threads));
    if (!weight || !bias) {
        of.room = malloc((size_t)(2 * c) * sizeof(A));
        if (!of.room) return 1;
        for (I j = 0; j < c; j++) of.room[j] = 1, of.room[c + j] = 0;
        if (!weight) of.weight = of.room;
        if (!bias) of.bias = of.room + c;
    }
    *q = of;
    return 0;
}

INLINE V NAME(get)(const A *p) {
    V v;
    memcpy(&v, p, sizeof(V));
    return v;
}
INLINE void NAME(set)(A *p, V v) { memcpy(p, &v, sizeof(V)); }

/* The rest of `Positions` from its sums, of the first n; of the others what makes h and dx zero. */
INLINE void NAME(standards)(const NAME(Rows) *q, I n, NAME(Positions) *at, const int backward) {
    A share = q->centred ? q->share : 0; /* of the sum of u: what rounding left of the mean */
    for (I i = 0; i < n; i += W) {
        V u = NAME(get)(at->u + i), rest = u * share, squares = NAME(get)(at->uu + i) - rest * u, zero = {0};
        V var = PICK(squares < zero, zero, squares) * q->divisor + q->eps;
        A root[sizeof(V) / sizeof(A)];
        NAME(set)(root, var);
        UNROLL
        for (int l = 0; l < W; l++) root[l] = ROOT(root[l]);
        V rstd = (A)1 / NAME(get)(root);
        NAME(set)(at->scale + i, rstd);
        NAME(set)(at->shift + i, -rest * rstd);
        if (backward) {
            V g = NAME(get)(at->g + i);
            NAME(set)(at->slope + i, rstd * (NAME(get)(at->gu + i) - rest * g) * q->divisor);
            NAME(set)(at->level + i, g * share);
        }
    }
    for (I i = n; i % W; i++) at->scale[i] = at->shift[i] = at->slope[i] = at->level[i] = 0;
}

/* The first `few` of W values, 0 for the others. */
INLINE V NAME(load_few)(const T *p, I few) {
    if (few >= W) return LOAD(p);
    V v = {0};
    for (I l = 0; l < few; l++) v[l] = LOAD1(p + l);
    return v;
}
INLINE void NAME(store_few)(T *p, V v, I few) {
    if (few >= W)
        STORE(p, v);
    else
        for (I l = 0; l < few; l++) STORE1(p + l, v[l]);
}

/* "side": positions beside each other, their channels p apart. Sums of `vectors` vectors of them, of which the last has
 * `few` positions. */
INLINE void NAME(side_near)(const T *x, I c, I p, A share, A *near, I few, const int vectors) {
    V sum[SIDEWAYS];
    UNROLL
    for (int k = 0; k < vectors; k++) sum[k] = (V){0};
    for (I j = 0; j < c; j++, x += p)
        UNROLL
        for (int k = 0; k < vectors; k++) sum[k] += NAME(load_few)(x + k * W, few);
    UNROLL
    for (int k = 0; k < vectors; k++) NAME(set)(near + k * W, sum[k] * share);
}

INLINE void NAME(side_row_sums)(const T *x, const T *dy, I c, I p, const A *weight, NAME(Positions) *at, I i, I few,
                            const int vectors, const int backward) {
    V m[2], all[2][4];
    UNROLL
    for (int k = 0; k < vectors; k++) {
        m[k] = NAME(get)(at->near + i + k * W);
        UNROLL
        for (int s = 0; s < 4; s++) all[k][s] = (V){0};
    }
    for (I from = 0; from < c; from += 4 * BLOCK) {
        V one[2], two[2], three[2], four[2];
        UNROLL
        for (int k = 0; k < vectors; k++) one[k] = two[k] = three[k] = four[k] = (V){0};
        for (I j = from; j < least(c, from + 4 * BLOCK); j++)
            UNROLL
            for (int k = 0; k < vectors; k++) {
                V u = NAME(load_few)(x + j * p + i + k * W, few) - m[k];
                one[k] += u, two[k] += u * u;
                if (backward) {
                    V g = weight[j] * NAME(load_few)(dy + j * p + i + k * W, few);
                    three[k] += g, four[k] += g * u;
                }
            }
        UNROLL
        for (int k = 0; k < vectors; k++)
            all[k][0] += one[k], all[k][1] += two[k], all[k][2] += three[k], all[k][3] += four[k];
    }
    UNROLL
    for (int k = 0; k < vectors; k++) {
        NAME(set)(at->u + i + k * W, all[k][0]);
        NAME(set)(at->uu + i + k * W, all[k][1]);
        if (backward) {
            NAME(set)(at->g + i + k * W, all[k][2]);
            NAME(set)(at->gu + i + k * W, all[k][3]);
        }
    }
}

INLINE void NAME(side_positions)(const NAME(Rows) *q, const T *x, const T *dy, I n, NAME(Positions) *at,
                                 const int backward) {
    I i = 0;
    if (q->centred) {
        for (; i + SIDEWAYS * W <= n; i += SIDEWAYS * W)
            NAME(side_near)(x + i, q->c, q->p, q->share, at->near + i, W, SIDEWAYS);
        for (; i < n; i += W) NAME(side_near)(x + i, q->c, q->p, q->share, at->near + i, n - i, 1);
        i = 0;
    } else {
        memset(at->near, 0, sizeof at->near);
    }
    for (; i + 2 * W <= n; i += 2 * W) NAME(side_row_sums)(x, dy, q->c, q->p, q->weight, at, i, W, 2, backward);
    for (; i < n; i += W) NAME(side_row_sums)(x, dy, q->c, q->p, q->weight, at, i, n - i, 1, backward);
    NAME(standards)(q, n, at, backward);
}

INLINE void NAME(side_standardize)(const T *x, T *y, I p, const A *weight, const A *bias, const NAME(Positions) *at, I i,
                                   I few, const int channels) {
    V m = NAME(get)(at->near + i), a = NAME(get)(at->scale + i), b = NAME(get)(at->shift + i);
    UNROLL
    for (int j = 0; j < channels; j++) {
        V h = (NAME(load_few)(x + j * p + i, few) - m) * a + b;
        NAME(store_few)(y + j * p + i, h * weight[j] + bias[j], few);
    }
}

LOOP static void NAME(side_rows)(const NAME(Rows) *q, const T *x, T *y, I n) {
    NAME(Positions) at;
    I c = q->c, p = q->p, j = 0;
    NAME(side_positions)(q, x, NULL, n, &at, 0);
    for (; j < c; j += 4, x += 4 * p, y += 4 * p) {
        const A *w = q->weight + j, *d = q->bias + j;
        I i = 0;
        if (j + 4 <= c)
            for (; i + W <= n; i += W) NAME(side_standardize)(x, y, p, w, d, &at, i, W, 4);
        for (I k = 0; k < least(4, c - j); k++)
            for (I o = i; o < n; o += W) NAME(side_standardize)(x + k * p, y + k * p, p, w + k, d + k, &at, o, n - o, 1);
    }
}

/* dx of some channels at W positions, or `few`, and the lanes of their sums of dy * h and dy. */
INLINE void NAME(side_back)(const T *x, const T *dy, T *dx, I p, const A *weight, const NAME(Positions) *at, I i, I few,
                            V *d_weight, V *d_bias, const int channels) {
    V m = NAME(get)(at->near + i), a = NAME(get)(at->scale + i), b = NAME(get)(at->shift + i);
    V e = NAME(get)(at->slope + i), f = NAME(get)(at->level + i);
    UNROLL
    for (int j = 0; j < channels; j++) {
        V d = NAME(load_few)(dy + j * p + i, few), h = (NAME(load_few)(x + j * p + i, few) - m) * a + b;
        d_weight[j] += d * h, d_bias[j] += d;
        if (dx) NAME(store_few)(dx + j * p + i, a * (weight[j] * d - (h * e + f)), few);
    }
}

LOOP static void NAME(side_rows_backward)(const NAME(Rows) *q, const T *dy, const T *x, T *dx, I n, double *d_weight,
                                            double *d_bias) {
    NAME(Positions) at;
    I c = q->c, p = q->p;
    NAME(side_positions)(q, x, dy, n, &at, 1);
    for (I from = 0; from < c; from += W / 2) { /* as many channels as have their sums in one vector */
        V kept[sizeof(V) / sizeof(A)];
        I some = least(W / 2, c - from);
        if (some < W / 2) memset(kept, 0, sizeof kept);
        for (I j = 0; j < some; j += 2) {
            const A *w = q->weight + from + j;
            I o = (from + j) * p, i = 0;
            V one[2] = {{0}, {0}}, two[2] = {{0}, {0}};
            if (j + 2 <= some)
                for (; i + W <= n; i += W)
                    NAME(side_back)(x + o, dy + o, dx ? dx + o : NULL, p, w, &at, i, W, one, two, 2);
            for (I k = 0; k < least(2, some - j); k++, o += p)
                for (I l = i; l < n; l += W)
                    NAME(side_back)(x + o, dy + o, dx ? dx + o : NULL, p, w + k, &at, l, n - l, one + k, two + k, 1);
            for (int k = 0; k < 2 && j + k < some; k++) kept[j + k] = one[k], kept[W / 2 + j + k] = two[k];
        }
        V sums = NAME(lanes_of)(kept);
        for (I j = 0; j < some; j++) d_weight[from + j] += sums[j], d_bias[from + j] += sums[W / 2 + j];
    }
}

/* "last": at most W rows of channels, whose sums are the lanes of one vector. */
INLINE void NAME(last_positions)(const NAME(Rows) *q, const T *x, const T *dy, I n, NAME(Positions) *at,
                                 const int backward) {
    V kept[4][sizeof(V) / sizeof(A)];
    A left[4][sizeof(V) / sizeof(A)]; /* of the channels that fill no vector */
    V near = {0}, sums[4] = {{0}, {0}, {0}, {0}};
    I c = q->c;
    if (n < W) memset(kept, 0, sizeof kept);
    memset(left, 0, sizeof left);
    if (q->centred) {
        for (I r = 0; r < n; r++) {
            const T *v = x + r * c;
            V a = {0}, b = {0};
            I j = 0;
            for (; j + 2 * W <= c; j += 2 * W) a += LOAD(v + j), b += LOAD(v + j + W);
            for (; j + W <= c; j += W) a += LOAD(v + j);
            for (; j < c; j++) left[0][r] += LOAD1(v + j);
            kept[0][r] = a + b;
        }
        near = (NAME(lanes_of)(kept[0]) + NAME(get)(left[0])) * q->share;
        memset(left[0], 0, sizeof left[0]);
    }
    NAME(set)(at->near, near);
    for (I from = 0; from < c; from += 4 * BLOCK) {
        I to = least(c, from + 4 * BLOCK);
        for (I r = 0; r < n; r++) {
            const T *v = x + r * c, *w = backward ? dy + r * c : NULL;
            V one = {0}, two = {0}, three = {0}, four = {0}, m = ALL(at->near[r]);
            I j = from;
            for (; j + W <= to; j += W) {
                V u = LOAD(v + j) - m;
                one += u, two += u * u;
                if (backward) {
                    V g = NAME(get)(q->weight + j) * LOAD(w + j);
                    three += g, four += g * u;
                }
            }
            for (; j < to; j++) {
                A u = LOAD1(v + j) - at->near[r];
                left[0][r] += u, left[1][r] += u * u;
                if (backward) {
                    A g = q->weight[j] * LOAD1(w + j);
                    left[2][r] += g, left[3][r] += g * u;
                }
            }
            kept[0][r] = one, kept[1][r] = two;
            if (backward) kept[2][r] = three, kept[3][r] = four;
        }
        for (int s = 0; s < (backward ? 4 : 2); s++) sums[s] += NAME(lanes_of)(kept[s]);
    }
    NAME(set)(at->u, sums[0] + NAME(get)(left[0]));
    NAME(set)(at->uu, sums[1] + NAME(get)(left[1]));
    if (backward) {
        NAME(set)(at->g, sums[2] + NAME(get)(left[2]));
        NAME(set)(at->gu, sums[3] + NAME(get)(left[3]));
    }
    NAME(standards)(q, W, at, backward);
}

LOOP static void NAME(last_rows)(const NAME(Rows) *q, const T *x, T *y, I n) {
    NAME(Positions) at;
    I c = q->c;
    NAME(last_positions)(q, x, NULL, n, &at, 0);
    for (I r = 0; r < n; r++, x += c, y += c) {
        V m = ALL(at.near[r]), a = ALL(at.scale[r]), b = ALL(at.shift[r]);
        I j = 0;
        for (; j + W <= c; j += W)
            STORE(y + j, ((LOAD(x + j) - m) * a + b) * NAME(get)(q->weight + j) + NAME(get)(q->bias + j));
        for (; j < c; j++) STORE1(y + j, ((LOAD1(x + j) - at.near[r]) * at.scale[r] + at.shift[r]) * q->weight[j] + q->bias[j]);
    }
}

INLINE void NAME(last_back)(const T *x, const T *dy, T *dx, I n, I c, const A *weight, const NAME(Positions) *at,
                            double *d_weight, double *d_bias, const int vectors) {
    V one[2] = {{0}, {0}}, two[2] = {{0}, {0}};
    for (I r = 0; r < n; r++) {
        V m = ALL(at->near[r]), a = ALL(at->scale[r]), b = ALL(at->shift[r]), e = ALL(at->slope[r]), f = ALL(at->level[r]);
        UNROLL
        for (int k = 0; k < vectors; k++) {
            V d = LOAD(dy + r * c + k * W), h = (LOAD(x + r * c + k * W) - m) * a + b;
            one[k] += d * h, two[k] += d;
            if (dx) STORE(dx + r * c + k * W, a * (NAME(get)(weight + k * W) * d - (h * e + f)));
        }
    }
    NAME(add_to)(d_weight, one, vectors);
    NAME(add_to)(d_bias, two, vectors);
}

LOOP static void NAME(last_rows_backward)(const NAME(Rows) *q, const T *dy, const T *x, T *dx, I n, double *d_weight,
                                            double *d_bias) {
    NAME(Positions) at;
    I c = q->c, j = 0;
    NAME(last_positions)(q, x, dy, n, &at, 1);
    for (; j + 2 * W <= c; j += 2 * W)
        NAME(last_back)(x + j, dy + j, dx ? dx + j : NULL, n, c, q->weight + j, &at, d_weight + j, d_bias + j, 2);
    for (; j + W <= c; j += W)
        NAME(last_back)(x + j, dy + j, dx ? dx + j : NULL, n, c, q->weight + j, &at, d_weight + j, d_bias + j, 1);
    for (; j < c; j++) {
        A one = 0, two = 0;
        for (I r = 0; r < n; r++) {
            A d = LOAD1(dy + r * c + j), h = (LOAD1(x + r * c + j) - at.near[r]) * at.scale[r] + at.shift[r];
            one += d * h, two += d;
            if (dx) STORE1(dx + r * c + j, at.scale[r] * (q->weight[j] * d - (h * at.slope[r] + at.level[r])));
        }
        d_weight[j] += one, d_bias[j] += two;
    }
}

#define ROW_PIECES                                                                                                      \
    _Pragma("omp parallel for schedule(static) num_threads(q->threads) if (q->threads > 1)")                            \
    for (I piece = 0; piece < q->pieces; piece++)
#define ROW_BLOCKS                                                                                                      \
    for (I block = piece * q->blocks; block < least(q->n * q->runs, (piece + 1) * q->blocks); block++)
/* the first position of a block, how many it has, and their offset */
#define ROW_BLOCK                                                                                                       \
    I from = block % q->runs * q->run, few = least(q->run, q->p - from);                                                \
    I o = block / q->runs * q->c * q->p + (q->last ? from * q->c : from)

static int NAME(rows_forward)(int last, I n, I c, I p, int centred, int unbiased, double eps, const T *x,
                              const A *weight, const A *bias, T *y, int threads) {
    NAME(Rows) of, *q = &of;
    if (NAME(rows)(q, last, n, c, p, centred, unbiased, eps, weight, bias, threads)) return 1;
    ROW_PIECES {
        ROW_BLOCKS {
            ROW_BLOCK;
            if (q->last)
                NAME(last_rows)(q, x + o, y + o, few);
            else
                NAME(side_rows)(q, x + o, y + o, few);
        }
    }
    free(q->room);
    return 0;
}

/* The gradients of x (or NULL), and of weight and bias (or both NULL). */
static int NAME(rows_backward)(int last, I n, I c, I p, int centred, int unbiased, double eps, const T *dy, const T *x,
                               const A *weight, A *d_weight, A *d_bias, T *dx, int threads) {
    NAME(Rows) of, *q = &of;
    if (NAME(rows)(q, last, n, c, p, centred, unbiased, eps, weight, NULL, threads)) return 1;
    double *parts = calloc((size_t)(2 * c * q->pieces), sizeof(double));
    if (!parts) {
        free(q->room);
        return 1;
    }
    ROW_PIECES {
        double *sums = parts + 2 * c * piece;
        ROW_BLOCKS {
            ROW_BLOCK;
            if (q->last)
                NAME(last_rows_backward)(q, dy + o, x + o, dx ? dx + o : NULL, few, sums, sums + c);
            else
                NAME(side_rows_backward)(q, dy + o, x + o, dx ? dx + o : NULL, few, sums, sums + c);
        }
    }
    if (d_weight) {
        for (I piece = 1; piece < q->pieces; piece++)
            for (I j = 0; j < 2 * c; j++) parts[j] += parts[2 * c * piece + j];
        for (I j = 0; j < c; j++) d_weight[j] = (A)parts[j], d_bias[j] = (A)parts[c + j];
    }
    free(parts), free(q->room);
    return 0;
}

#undef W
#undef LOAD
#undef STORE
#undef LOAD1
#undef STORE1
#undef ROOT
#undef ALL
#undef ROW_PIECES
#undef ROW_BLOCKS
#undef ROW_BLOCK
#undef MASK
#undef PICK
#undef SIDEWAYS
#undef PIECES
#undef PIECE
#undef ROWS
#undef SEGMENTS
#undef SETS
#undef SET
#undef STRIPS
#endif
