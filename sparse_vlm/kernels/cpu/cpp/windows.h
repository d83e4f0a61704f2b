// Convolutions on a CPU: cells that each read a window of an image that lies channels last, with its padding.
//
// Notable: what a cell reads of a line then lies together, and what cells beside each other read lies evenly apart, so
// that a product reads it as it lies there.

#pragma once

#include "vectors.h"

namespace {

constexpr int CELLS = LANES == 16 ? 10 : 4;  // at once: two vectors of sums each fit the registers

template <typename T>
struct Multiplied {  // as float32
    typedef float Number;
    typedef float Element;
    static constexpr int TOGETHER = 1;
};

#ifdef __AVX512BF16__
template <>
struct Multiplied<bfloat16> {  // as pairs
    typedef bfloat16 Number;
    typedef uint32_t Element;
    static constexpr int TOGETHER = 2;
};
#endif

// R cells by V vectors of channels, from the first number that the first cell reads. A window has `lines`, `each`
// elements that a cell reads of one, what cells beside each other read `apart` elements, and lines `length` elements;
// its weights are (lines, each, channels).
template <int R, int V, typename W, typename E>
inline void some_cells(const W& window, const E* from, const E* weight, const float* bias, int channels, float* to) {
    Vector sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = load(bias + v * LANES);
    for (int line = 0; line < window.lines; line++)
        accumulate(from + line * window.length, window.apart, weight + long(line) * window.each * channels, channels,
                   window.each, sum, [](int) {});
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(to + long(r) * channels + v * LANES, sum[r][v]);
}

template <int R, typename W, typename E>
ALONE void cells_of(const W& window, const E* from, const E* weight, const float* bias, int channels, float* to) {
    int c = 0;
    for (; c + 2 * LANES <= channels; c += 2 * LANES)
        some_cells<R, 2>(window, from, weight + c, bias + c, channels, to + c);
    if (c < channels) some_cells<R, 1>(window, from, weight + c, bias + c, channels, to + c);
}

// A row of cells (columns, channels).
template <typename W, typename E>
inline void row_of_cells(const W& window, const E* from, const E* weight, const float* bias, int columns, int channels,
                         float* to) {
    each_block<CELLS>(columns, 0, blocks_of<CELLS>(columns), [&](long cell, auto count) {
        cells_of<decltype(count)::value>(window, from + cell * window.apart, weight, bias, channels,
                                         to + cell * channels);
    });
}

}  // namespace
