// Attention among few tokens on a CPU, reading queries, keys and values as one layer wrote them.
//
// Notable: torch's fused attention is made for long sequences; at 49 tokens it takes three times as long
// (lab/speed.md), of which half is changing layouts before and after. Here a head's keys, scores and values stay in
// the first caches.

#pragma once

#include "vectors.h"

namespace {

// Scores (n, padded), plus the bias of each key (padded), to what they weigh (n, padded), which may lie at the same
// place, not yet divided by its sum.
template <typename T>
inline void weigh(float* scores, const float* bias, T* weights, float* sums, int n, int padded) {
    for (int i = 0; i < n; i++) {
        float* row = scores + long(i) * padded;
        Wide most = get_wide(row) + get_wide(bias), sum = {};
        put(row, most);
        for (int j = WIDE; j < padded; j += WIDE) {
            Wide score = get_wide(row + j) + get_wide(bias + j);
            put(row + j, score);
            most = larger(score, most);
        }
        float highest = largest_of(most);
        for (int j = 0; j < padded; j += WIDE) {
            Wide weight = exp_of(get_wide(row + j) - highest);
            sum += weight;
            put(weights + long(i) * padded + j, weight);
        }
        sums[i] = sum_of(sum);
    }
}

// What one head works in.
struct Head {
    int n, size, padded;
    std::vector<float> scores, sums, mean, bias, queries, keys, values;
    std::vector<bfloat16> weights;
    std::vector<uint32_t> pairs, value_pairs;

    Head(int n, int size)
        : n(n),
          size(size),
          padded((n + LANES - 1) / LANES * LANES),
          scores(long(n) * padded),
          sums(n),
          mean(long(n) * size),
          bias(padded, -1e30f) {}  // places from n on weigh next to nothing

    // of the last `count` keys; those before them have none
    void set_bias(const float* of_keys, int count) {
        std::fill(bias.begin(), bias.begin() + n, 0.0f);
        std::copy(of_keys, of_keys + count, bias.begin() + n - count);
    }
};

// queries, keys and values of a head (n, size), whose rows are `apart`, to what it attends to (n, size), in `at.mean`
template <typename T>
void attend_head(const T* q, const T* k, const T* v, long apart, Head& at) {
    at.queries.resize(long(at.n) * at.size);
    at.values.resize(at.queries.size());
    at.keys.resize(long(at.size) * at.padded);
    for (int j = 0; j < at.n; j++) {
        widen(q + j * apart, &at.queries[long(j) * at.size], at.size);
        widen(v + j * apart, &at.values[long(j) * at.size], at.size);
        for (int i = 0; i < at.size; i++) at.keys[long(i) * at.padded + j] = get(k + j * apart + i);
    }
    multiply(at.queries.data(), at.size, at.keys.data(), at.scores.data(), at.n, at.size, at.padded);
    weigh(at.scores.data(), at.bias.data(), at.scores.data(), at.sums.data(), at.n, at.padded);
    multiply(at.scores.data(), at.padded, at.values.data(), at.mean.data(), at.n, at.n, at.size);
}

#ifdef __AVX512BF16__
void attend_head(const bfloat16* q, const bfloat16* k, const bfloat16* v, long apart, Head& at) {
    int half = at.size / 2;
    at.pairs.resize(long(half) * at.padded);
    at.value_pairs.resize(long(at.padded) / 2 * at.size);
    at.weights.resize(long(at.n) * at.padded);
    for (int j = 0; j < at.n; j++)
        for (int i = 0; i < half; i++) at.pairs[long(i) * at.padded + j] = pairs_of(k + j * apart)[i];
    multiply(pairs_of(q), apart / 2, at.pairs.data(), at.scores.data(), at.n, half, at.padded);
    weigh(at.scores.data(), at.bias.data(), at.weights.data(), at.sums.data(), at.n, at.padded);
    interleave(v, apart, at.value_pairs.data(), at.n, at.size);
    if (at.n % 2)
        for (int i = 0; i < at.size; i++) at.value_pairs[long(at.n) / 2 * at.size + i] = v[(at.n - 1) * apart + i].bits;
    multiply(pairs_of(at.weights.data()), at.padded / 2, at.value_pairs.data(), at.mean.data(), at.n, (at.n + 1) / 2,
             at.size);
}
#endif

// Queries (scaled), keys and values (B, n, 3, heads, size) to what each token attends to (B, n, heads, size). The scores
// of the last `biased` keys are added to by `bias` (B, biased). Called by all threads of a region together.
template <typename T>
void attend(const T* qkv, const float* bias, int biased, int batch, int n, int heads, int size, T* out) {
    long width = long(heads) * size;
    Head at(n, size);
#pragma omp for collapse(2)
    for (int b = 0; b < batch; b++)
        for (int head = 0; head < heads; head++) {
            const T* q = qkv + b * n * 3 * width + head * size;
            at.set_bias(bias + long(b) * biased, biased);
            attend_head(q, q + width, q + 2 * width, 3 * width, at);
            for (int i = 0; i < n; i++) {
                T* row = out + (long(b) * n + i) * width + head * size;
                float part = 1 / at.sums[i];
                for (int c = 0; c < size; c += WIDE) put(row + c, get_wide(&at.mean[long(i) * size + c]) * part);
            }
        }
}

}  // namespace
