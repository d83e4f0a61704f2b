// Numbers, vectors and small matrix products, for the other files here. All is summed in float32, whatever is
// read and written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;  // of a vector, which is one register
#else
constexpr int LANES = 8;
#endif
constexpr int PADDING = 16;  // rows are padded to a multiple of this, as native.py pads them
constexpr int ROWS = 4;      // of a block of a product: with two vectors a row, eight sums hide how long one takes
typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef float VectorInMemory __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

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

template <typename T>
void widen(const T* from, float* to, long count) {
    for (long i = 0; i < count; i++) to[i] = get(from + i);
}

// erf by the ratio of polynomials that Eigen and XLA use: 4e-7 at most
inline float erf_of(float x) {
    x = x < -4.0f ? -4.0f : x > 4.0f ? 4.0f : x;
    float s = x * x;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

inline float gelu(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f)); }

// exp, of numbers below -87 as of -87 and above 88 as of 88
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float t = x * 1.44269504088896341f, whole = std::nearbyint(t), f = t - whole;
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    uint32_t bits = uint32_t(int(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
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

inline Vector load(const float* from) { return *reinterpret_cast<const VectorInMemory*>(from); }

inline Vector add_product(Vector sum, float a, Vector b) { return sum + a * b; }

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

// R rows and V vectors of c (rows, columns) = a (rows, k) b (k, columns), where rows of a are `apart`
template <int R, int V, typename E>
inline void block(const E* a, long apart, const E* b, float* c, int k, int columns) {
    Vector sum[R][V] = {};
    for (int i = 0; i < k; i++) {
        decltype(load(b)) row[V];
        for (int v = 0; v < V; v++) row[v] = load(b + long(i) * columns + v * LANES);
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = add_product(sum[r][v], a[r * apart + i], row[v]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) *reinterpret_cast<VectorInMemory*>(c + long(r) * columns + v * LANES) = sum[r][v];
}

template <int R, typename E>
inline void rows_of(const E* a, long apart, const E* b, float* c, int k, int columns) {
    int j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES) block<R, 2>(a, apart, b + j, c + j, k, columns);
    if (j < columns) block<R, 1>(a, apart, b + j, c + j, k, columns);
}

// c (rows, columns) = a (rows, k) b (k, columns), where rows of a are `apart`; columns is a multiple of LANES
template <typename E>
void multiply(const E* a, long apart, const E* b, float* c, int rows, int k, int columns) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS) rows_of<ROWS>(a + r * apart, apart, b, c + long(r) * columns, k, columns);
    for (; r < rows; r++) rows_of<1>(a + r * apart, apart, b, c + long(r) * columns, k, columns);
}

}  // namespace
