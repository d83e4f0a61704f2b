// Numbers, vectors and small matrix products, for the other files here. All is summed in float32, whatever is
// read and written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;  // of a vector, which is one register
#else
constexpr int LANES = 8;
#endif
constexpr int PADDING = 16;                // rows are padded to a multiple of this, as native.py pads them
constexpr int ROWS = LANES == 16 ? 8 : 4;  // of a block of a product: two vectors of sums a row fit the registers
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float VectorInMemory __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

// a function whose loop the compiler is to find registers for by itself
#define ALONE __attribute__((noinline))

struct bfloat16 {
    uint16_t bits;
};

inline float get(const float* from) { return *from; }

inline float get(const bfloat16* from) {
    uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void put(float* to, float value) { *to = value; }

inline void put(bfloat16* to, float value) {  // to the nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// A row less its mean, divided by its standard deviation.
template <typename T>
void normalise(const T* from, float* to, int width, float eps) {
    float sum = 0, squares = 0;
    for (int i = 0; i < width; i++) sum += to[i] = get(from + i);
    float mean = sum / width;
    for (int i = 0; i < width; i++) squares += (to[i] - mean) * (to[i] - mean);
    float scale = 1 / std::sqrt(squares / width + eps);
    for (int i = 0; i < width; i++) to[i] = (to[i] - mean) * scale;
}

template <typename T>
void widen(const T* from, float* to, long count) {
    for (long i = 0; i < count; i++) to[i] = get(from + i);
}

inline Vector load(const float* from) { return *reinterpret_cast<const VectorInMemory*>(from); }

inline void put(float* to, Vector values) { *reinterpret_cast<VectorInMemory*>(to) = values; }

#if defined(__AVX512BF16__)
inline void put(bfloat16* to, Vector values) {  // as one by one, but that numbers below 1e-38 become 0
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)values));
}
#elif defined(__AVX512F__)
inline void put(bfloat16* to, Vector values) {
    for (int i = 0; i < LANES; i++) put(to + i, values[i]);
}
#endif

inline Vector add_product(Vector sum, float a, Vector b) { return sum + a * b; }

// What functions of numbers are computed of at once: a vector, or one number where compilers make vectors of such
// loops.
#ifdef __AVX512F__
typedef Vector Wide;
#else
typedef float Wide;
#endif
constexpr int WIDE = sizeof(Wide) / sizeof(float);

// a number, but at least and at most that; a NaN stays one
inline float within(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

inline float nearest(float x) { return std::nearbyint(x); }

// p 2^whole, of whole numbers from -126 to 127
inline float times_power(float p, float whole) {
    uint32_t bits = uint32_t(int(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

#ifdef __AVX512F__
inline Vector within(Vector x, float low, float high) {  // where one is a NaN, these instructions give the second
    __m512 raised = _mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
    return (Vector)_mm512_min_ps(_mm512_set1_ps(high), raised);
}

inline Vector nearest(Vector x) { return (Vector)_mm512_roundscale_ps((__m512)x, 0); }

inline Vector times_power(Vector p, Vector whole) { return (Vector)_mm512_scalef_ps((__m512)p, (__m512)whole); }

inline Wide get_wide(const float* from) { return load(from); }

inline Wide get_wide(const bfloat16* from) {
    return (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}

inline float largest_of(Wide x) { return _mm512_reduce_max_ps((__m512)x); }
inline float sum_of(Wide x) { return _mm512_reduce_add_ps((__m512)x); }
#else
template <typename T>
inline Wide get_wide(const T* from) {
    return get(from);
}

inline float largest_of(Wide x) { return x; }
inline float sum_of(Wide x) { return x; }
#endif

inline Wide larger(Wide a, Wide b) { return (a > b) | (a != a) ? a : b; }  // a NaN, if either is

// Functions of a number, or of each in a vector.

// erf by the ratio of polynomials that Eigen and XLA use: 4e-7 at most
template <typename F>
inline F erf_of(F x) {
    x = within(x, -4.0f, 4.0f);
    F s = x * x;
    F p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    F q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

template <typename F>
inline F gelu(F x) {
    return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f));
}

// exp, of numbers below -87 as of -87 and above 88 as of 88
template <typename F>
inline F exp_of(F x) {
    F t = within(x, -87.0f, 88.0f) * 1.44269504088896341f, whole = nearest(t), f = t - whole;
    F p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return times_power(p, whole);
}

// sin(2 pi t) of t in [-0.5, 0.5]
inline float sine_of_turns(float t) {
    // sin(2 pi t) = sin(2 pi (1/2 - t)) for t beyond a quarter
    float a = std::fabs(t);
    a = a > 0.25f ? 0.5f - a : a;
    float x = 6.28318530717958648f * a, s = x * x;
    float p = -2.3889859e-08f;
    p = p * s + 2.7525562e-06f;
    p = p * s - 1.9840874e-04f;
    p = p * s + 8.3333310e-03f;
    p = p * s - 1.6666667e-01f;
    float y = x + x * s * p;
    return t < 0 ? -y : y;
}

#ifdef __AVX512BF16__
typedef uint32_t Pairs __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint32_t PairsInMemory __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4), may_alias));

inline Pairs load(const uint32_t* from) { return *reinterpret_cast<const PairsInMemory*>(from); }

// two products of a lane, of bfloat16 numbers that lie beside each other
inline Vector add_product(Vector sum, uint32_t a, Pairs b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}

inline const uint32_t* pairs_of(const bfloat16* from) { return reinterpret_cast<const uint32_t*>(from); }

// each two rows, which are `apart`, as one of pairs
inline void interleave(const bfloat16* from, long apart, uint32_t* to, int rows, int columns) {
    for (int i = 0; i < rows / 2; i++) {
        const bfloat16 *upper = from + 2 * i * apart, *lower = upper + apart;
        for (int j = 0; j < columns; j++) to[i * columns + j] = upper[j].bits | uint32_t(lower[j].bits) << 16;
    }
}
#endif

// sum (R rows, V vectors) += a (R, k) b (k, V vectors), where rows of a are `apart` and those of b `columns`;
// `each_time` is called with every k
template <int R, int V, typename E, typename F>
inline void accumulate(const E* a, long apart, const E* b, long columns, int k, Vector (&sum)[R][V], F each_time) {
    for (int i = 0; i < k; i++) {
        decltype(load(b)) row[V];
        for (int v = 0; v < V; v++) row[v] = load(b + i * columns + v * LANES);
        each_time(i);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = add_product(sum[r][v], a[r * apart + i], row[v]);
    }
}

template <int R, int V, typename E>
inline void block(const E* a, long apart, const E* b, float* c, int k, int columns) {
    Vector sum[R][V] = {};
    accumulate(a, apart, b, columns, k, sum, [](int) {});
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(c + long(r) * columns + v * LANES, sum[r][v]);
}

template <int R, typename E>
ALONE void rows_of(const E* a, long apart, const E* b, float* c, int k, int columns) {
    int j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) block<R, 2>(a, apart, b + j, c + j, k, columns);
    if (j < columns) block<R, 1>(a, apart, b + j, c + j, k, columns);
}

template <int MOST>
constexpr int blocks_of(int count) {
    return (count + MOST - 1) / MOST;
}

template <typename F, int... I>
inline void of_height(int height, F function, std::integer_sequence<int, I...>) {
    constexpr int MOST = sizeof...(I);  // which comes first, because it is asked for most often
    (void)((height == MOST - I && (function(std::integral_constant<int, MOST - I>()), true)) || ...);
}

// Rows in blocks of at most MOST, about as high (49 as 10, 10, 10, 10 and 9): `function` of each from `block` to before
// `last`, with its first row and, as a constant, its height.
template <int MOST, typename F>
inline void each_block(int count, int block, int last, F function) {
    int blocks = blocks_of<MOST>(count);
    for (; block < last; block++) {
        long row = long(count) * block / blocks, below = long(count) * (block + 1) / blocks;
        of_height(
            int(below - row), [&](auto height) { function(row, height); }, std::make_integer_sequence<int, MOST>());
    }
}

// c (rows, columns) = a (rows, k) b (k, columns), where rows of a are `apart`; columns is a multiple of LANES
template <typename E>
void multiply(const E* a, long apart, const E* b, float* c, int rows, int k, int columns) {
    each_block<ROWS>(rows, 0, blocks_of<ROWS>(rows), [&](long row, auto height) {
        rows_of<decltype(height)::value>(a + row * apart, apart, b, c + row * columns, k, columns);
    });
}

}  // namespace
