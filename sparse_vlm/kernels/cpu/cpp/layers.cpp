// Layers of few rows on a CPU, attention, and both halves of a block of a transformer as one call each.
//
// Notable: between layers of a half there is nothing but a barrier; called one by one, with norms in between, they and
// their tensors cost a tenth of a tower's time for one image (lab/speed.md).

#include "attention.h"
#include "linear.h"

namespace {

#ifdef __AVX512F__
// x (count, width) normalised, times gain, plus shift. Called by all threads of a region together.
template <typename T>
void norm(const T* x, const float* gain, const float* shift, float eps, int count, int width, T* out) {
    std::vector<float> row(width);
#pragma omp for
    for (int i = 0; i < count; i++) {
        normalise(x + long(i) * width, row.data(), width, eps);
        for (int c = 0; c < width; c++) put(out + long(i) * width + c, row[c] * gain[c] + shift[c]);
    }
}

// x (count, k), or its norm where there is a gain, to out (count, outputs), as `linear`: `scratch` for k numbers a row.
template <typename T>
void layer(const T* x, const float* gain, const float* shift, float eps, const Layer<T>& of, const T* residual,
           float factor, int count, T* scratch, T* out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        if (gain) norm(x, gain, shift, eps, count, of.k, scratch);
        linear(of, gain ? scratch : x, residual, factor, count, out, threads);
    }
}

// x (B, n, d) to itself and what its norm attends to, with the bias of keys as `attend` takes it: `scratch` for 4 d numbers
// a token.
template <typename T>
void attention(const T* x, const float* gain, const float* shift, float eps, const T* weight, const float* bias,
               const T* out_weight, const float* out_bias, const float* key_bias, int biased, int batch, int n, int heads,
               int size, T* scratch, T* out, int threads) {
    int width = heads * size, count = batch * n;
    T *tokens = scratch, *qkv = scratch + long(count) * width;
#pragma omp parallel num_threads(threads)
    {
        norm(x, gain, shift, eps, count, width, tokens);
        linear(Layer<T>{weight, bias, 0, width, 3 * width}, tokens, (const T*)nullptr, 1, count, qkv, threads);
        attend(qkv, key_bias, biased, batch, n, heads, size, tokens);
        linear(Layer<T>{out_weight, out_bias, 0, width, width}, tokens, x, 1, count, out, threads);
    }
}

// x (count, d) to itself and `factor` times what an MLP makes of its norm: `scratch` for d + hidden numbers a token.
template <typename T>
void mlp(const T* x, const float* gain, const float* shift, float eps, const T* weight, const float* bias,
          int activation, const T* out_weight, const float* out_bias, float factor, int count, int width, int hidden,
          T* scratch, T* out, int threads) {
    T *tokens = scratch, *between = scratch + long(count) * width;
#pragma omp parallel num_threads(threads)
    {
        norm(x, gain, shift, eps, count, width, tokens);
        linear(Layer<T>{weight, bias, activation, width, hidden}, tokens, (const T*)nullptr, 1, count, between,
               threads);
        linear(Layer<T>{out_weight, out_bias, 0, hidden, width}, between, x, factor, count, out, threads);
    }
}
#endif

}  // namespace

#define OF_TYPE(NAME, T)                                                                                                   \
    void attention_core_##NAME(const T* qkv, const float* bias, int biased, int batch, int n, int heads, int size, T* out, \
                       int threads) {                                                                                      \
        _Pragma("omp parallel num_threads(threads)") attend(qkv, bias, biased, batch, n, heads, size, out);                \
    }

#define LINEAR_OF_TYPE(NAME, T)                                                                                             \
    void linear_##NAME(const T* x, const float* gain, const float* shift, float eps, const T* weight,                       \
                       const float* bias, const T* residual, float factor, int activation, int count, int k, int outputs,   \
                       T* scratch, T* out, int threads) {                                                                   \
        layer(x, gain, shift, eps, Layer<T>{weight, bias, activation, k, outputs}, residual, factor, count, scratch, out,   \
              threads);                                                                                                     \
    }                                                                                                                       \
    void attention_block_##NAME(const T* x, const float* gain, const float* shift, float eps, const T* weight,              \
                          const float* bias, const T* out_weight, const float* out_bias, const float* key_bias,             \
                          int biased, int batch, int n, int heads, int size, T* scratch, T* out, int threads) {             \
        attention(x, gain, shift, eps, weight, bias, out_weight, out_bias, key_bias, biased, batch, n, heads, size,         \
                  scratch, out, threads);                                                                                   \
    }                                                                                                                       \
    void mlp_block_##NAME(const T* x, const float* gain, const float* shift, float eps, const T* weight, const float* bias, \
                     int activation, const T* out_weight, const float* out_bias, float factor, int count, int width,        \
                     int hidden, T* scratch, T* out, int threads) {                                                         \
        mlp(x, gain, shift, eps, weight, bias, activation, out_weight, out_bias, factor, count, width, hidden, scratch,     \
             out, threads);                                                                                                 \
    }

extern "C" {
// whether the linear layers support this CPU
int linear_is_supported_float32() {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}
int linear_is_supported_bfloat16() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}
OF_TYPE(float32, float)
OF_TYPE(bfloat16, bfloat16)
#ifdef __AVX512F__
LINEAR_OF_TYPE(float32, float)
#endif
#ifdef __AVX512BF16__
LINEAR_OF_TYPE(bfloat16, bfloat16)
#endif
}
