// Linear layers of few rows on a processor: weights in panels of 32 outputs, each of which stays in a near cache while
// all rows pass.
//
// Notable: oneDNN reaches the processor's peak with hundreds of rows, and half to three quarters of it with the 49 of a
// tower (docs/speed.md). This is for AVX-512, and in bfloat16 for processors that multiply pairs of it and have no AMX,
// which oneDNN uses well.

#include "vectors.h"

namespace {

constexpr int PANEL = 2 * LANES;  // outputs of a panel
constexpr int BLOCK = 10;         // rows at once: 20 sums, of the 32 registers of AVX-512; 50 rows are five blocks
constexpr long KEPT = 1 << 18;    // bytes of rows that pass before the next ones

#ifdef __AVX512F__
template <typename F>
inline void each_of(float* panel, F function) {
    for (int c = 0; c < PANEL; c++) panel[c] = function(panel[c]);
}

// the loops are within the choice, so that they become vectors
inline void activate(float* panel, int activation) {
    if (activation == 1) each_of(panel, gelu);
    if (activation == 2)  // GELU by a hyperbolic tangent, which is 1 - 2 / (exp(2 y) + 1)
        each_of(panel, [](float x) { return x - x / (exp_of(1.5957691216057308f * (x + 0.044715f * x * x * x)) + 1); });
    if (activation == 3) each_of(panel, [](float x) { return x / (1 + exp_of(-x)); });
}

template <typename T>
inline void finish(float* panel, const T* onto, float factor, T* out, int outputs) {
    if (onto)
        for (int c = 0; c < outputs; c++) panel[c] = get(onto + c) + factor * panel[c];
    for (int c = 0; c < outputs; c++) put(out + c, panel[c]);
}

// R rows of a panel. `outputs` of its 32 are there.
template <int R, typename E, typename T>
void rows(const E* x, const E* panel, int k, const float* bias, const T* onto, float factor, int activation, T* out,
          long columns, int outputs) {
    Vector sum[R][2];
    for (int r = 0; r < R; r++) sum[r][0] = load(bias), sum[r][1] = load(bias + LANES);
    for (int i = 0; i < k; i++) {
        auto left = load(panel + long(i) * PANEL), right = load(panel + long(i) * PANEL + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            E each = x[long(r) * k + i];
            sum[r][0] = add_product(sum[r][0], each, left);
            sum[r][1] = add_product(sum[r][1], each, right);
        }
    }
    for (int r = 0; r < R; r++) {
        float wide[PANEL];
        std::memcpy(wide, &sum[r], sizeof wide);
        activate(wide, activation);
        const T* under = onto ? onto + r * columns : nullptr;
        T* to = out + r * columns;
        if (outputs == PANEL)
            finish(wide, under, factor, to, PANEL);
        else
            finish(wide, under, factor, to, outputs);
    }
}

inline const float* elements(const float* from) { return from; }
inline int elements(const float*, int k) { return k; }
#ifdef __AVX512BF16__
inline const uint32_t* elements(const bfloat16* from) { return pairs_of(from); }
inline int elements(const bfloat16*, int k) { return k / 2; }
#endif

// x (rows, k) by panels (outputs / 32 rounded up, k, 32), and bias (all their outputs), to out (rows, outputs):
// activated, or times `factor` and added onto `onto` where that is not null.
template <typename T>
void linear(const T* x, const T* weight, const float* bias, const T* onto, float factor, int activation, int count,
            int k, int outputs, T* out, int threads) {
    int panels = (outputs + PANEL - 1) / PANEL, blocks = (count + BLOCK - 1) / BLOCK, each = elements(x, k);
    // rows stay in the second cache while all panels pass; few panels are shared by rows as well
    long parts = std::max(long(long(count) * k * sizeof(T) / KEPT + 1), long(2 * threads + panels - 1) / panels);
    parts = std::min(long(blocks), parts);
#pragma omp parallel for collapse(2) num_threads(threads)
    for (long part = 0; part < parts; part++)
        for (int p = 0; p < panels; p++) {
            auto panel = elements(weight + long(p) * k * PANEL);
            int row = blocks * part / parts * BLOCK, last = std::min(long(count), blocks * (part + 1) / parts * BLOCK);
            int here = std::min(PANEL, outputs - p * PANEL);
            auto some = [&](auto height) {
                constexpr int R = decltype(height)::value;
                for (; row + R <= last; row += R) {
                    long to = long(row) * outputs + p * PANEL;
                    rows<R>(elements(x + long(row) * k), panel, each, bias + p * PANEL, onto ? onto + to : onto, factor,
                            activation, out + to, outputs, here);
                }
            };
            some(std::integral_constant<int, BLOCK>());
            some(std::integral_constant<int, 4>());
            some(std::integral_constant<int, 1>());
        }
}
#endif

}  // namespace

extern "C" {
// whether they are for this processor
int multiplies_float32() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}
int multiplies_bfloat16() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}
#ifdef __AVX512F__
void linear_float32(const float* x, const float* weight, const float* bias, const float* onto, float factor,
                    int activation, int count, int k, int outputs, float* out, int threads) {
    linear(x, weight, bias, onto, factor, activation, count, k, outputs, out, threads);
}
#endif
#ifdef __AVX512BF16__
void linear_bfloat16(const bfloat16* x, const bfloat16* weight, const float* bias, const bfloat16* onto, float factor,
                     int activation, int count, int k, int outputs, bfloat16* out, int threads) {
    linear(x, weight, bias, onto, factor, activation, count, k, outputs, out, threads);
}
#endif
}
