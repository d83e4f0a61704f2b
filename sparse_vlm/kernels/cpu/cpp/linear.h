// Linear layers of few rows on a CPU: weights in panels of 32 outputs, each of which stays in a near cache while
// all rows pass.
//
// Notable: oneDNN reaches the CPU's peak with hundreds of rows, and half to three quarters of it with the 49 of a
// tower (lab/speed.md). This is for AVX-512, and in bfloat16 for CPUs that multiply pairs of it and have no AMX,
// which oneDNN uses well.

#pragma once

#include "vectors.h"

#ifdef __AVX512F__
namespace {

constexpr int PANEL = 2 * LANES;  // outputs of a panel
constexpr int BLOCK = 10;         // rows at once: 20 sums, of the 32 registers of AVX-512; 50 rows are five blocks
constexpr long KEPT = 3 << 18;    // bytes of rows that pass before the next ones; the second cache is larger
constexpr int LINE = 64;          // bytes that memory is read by

// Weights in panels (outputs / 32 rounded up, k, 32), and bias (all their outputs).
template <typename T>
struct Layer {
    const T* weight;
    const float* bias;
    int activation, k, outputs;

    const T* panel(int p) const { return weight + long(p) * k * PANEL; }
    int panels() const { return (outputs + PANEL - 1) / PANEL; }
};

inline Vector activated(Vector x, int activation) {
    if (activation == 1) return gelu(x);
    if (activation == 2)  // GELU by a hyperbolic tangent, which is 1 - 2 / (exp(2 y) + 1)
        return x - x / (exp_of(1.5957691216057308f * (x + 0.044715f * x * x * x)) + 1.0f);
    if (activation == 3) return x / (1.0f + exp_of(-x));
    return x;
}

inline const float* elements(const float* from) { return from; }
inline int elements(const float*, int k) { return k; }
#ifdef __AVX512BF16__
inline const uint32_t* elements(const bfloat16* from) { return pairs_of(from); }
inline int elements(const bfloat16*, int k) { return k / 2; }
#endif

template <typename T>
inline void finish(Vector value, const T* residual, float factor, T* out) {
    put(out, residual ? get_wide(residual) + factor * value : value);
}

// R rows by panel p; `step` bytes of what lies `ahead` come near at each product.
template <int R, typename T>
ALONE void rows(const Layer<T>& of, int p, const T* x, const T* residual, float factor, T* out, const char* ahead,
                int step) {
    Vector sum[R][2];
    const float* bias = of.bias + p * PANEL;
    for (int r = 0; r < R; r++) sum[r][0] = load(bias), sum[r][1] = load(bias + LANES);
    int k = elements(x, of.k), here = std::min(PANEL, of.outputs - p * PANEL);
    accumulate(elements(x), k, elements(of.panel(p)), PANEL, k, sum,
               [&](int i) { __builtin_prefetch(ahead + long(i) * step, 0, 2); });
    for (int r = 0; r < R; r++) {
        Vector left = activated(sum[r][0], of.activation), right = activated(sum[r][1], of.activation);
        const T* under = residual ? residual + long(r) * of.outputs : residual;
        T* to = out + long(r) * of.outputs;
        if (here == PANEL) {
            finish(left, under, factor, to);
            finish(right, residual ? under + LANES : residual, factor, to + LANES);
        } else {
            T there[PANEL] = {}, made[PANEL];
            if (residual) std::memcpy(there, under, here * sizeof(T));
            finish(left, residual ? there : residual, factor, made);
            finish(right, residual ? there + LANES : residual, factor, made + LANES);
            std::memcpy(to, made, here * sizeof(T));
        }
    }
}

// x (count, k) to out (count, outputs): activated, or times `factor` and added residual `residual` where that is not null.
// Called by all threads of a region together.
template <typename T>
void linear(const Layer<T>& of, const T* x, const T* residual, float factor, int count, T* out, int threads) {
    int panels = of.panels(), blocks = blocks_of<BLOCK>(count);
    // rows stay in the second cache while all panels pass; few panels are shared by rows as well
    long parts = std::max(long(long(count) * of.k * sizeof(T) / KEPT + 1), long(2 * threads + panels - 1) / panels);
    parts = std::min(long(blocks), parts);
#pragma omp for collapse(2)
    for (long part = 0; part < parts; part++)
        for (int p = 0; p < panels; p++) {
            int block = blocks * part / parts, last = blocks * (part + 1) / parts;
            // while blocks pass by this panel, the next one comes near, a part at each
            auto next = reinterpret_cast<const char*>(of.panel(p + 1 < panels ? p + 1 : 0));
            int step = std::min(LINE, int(PANEL * sizeof(float)) / (last - block));
            each_block<BLOCK>(count, block, last, [&](long row, auto height) {
                long to = row * of.outputs + p * PANEL;
                rows<decltype(height)::value>(of, p, x + row * of.k, residual ? residual + to : residual, factor, out + to, next,
                                              step);
                next += long(elements(x, of.k)) * step;
            });
        }
}

}  // namespace
#endif
