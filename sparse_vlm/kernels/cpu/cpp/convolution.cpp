// The early convolution of an inference tower on a CPU: a convolution of 7 x 7 pixels, pooling, ReLU and norm in one
// pass.
//
// Shape legend: B images of h x w pixels; C channels; rows x columns cells of the convolution, H x W of the map.
//
// Notable: lines of an image are laid out channels last, with their padding (windows.h). In pairs of bfloat16 a cell
// reads one number more, times 0: a pixel that is not finite spoils that cell too. Three rows of the convolution are
// kept, as they are pooled along a row.

#include "windows.h"

namespace {

constexpr int SIDE = 7, EDGE = 3, STRIDE = 2, COLOURS = 3;
constexpr int REACH = SIDE * COLOURS, PADDED = REACH + 1;  // numbers that a cell reads of a line; as many as fit pairs
constexpr int APART = STRIDE * COLOURS;                    // of what cells beside each other read
constexpr int AT_ONCE = 8;                                 // rows of the map whose lines are laid out together

template <typename M>
struct Window {  // of a cell; its line lengths are known when an image is
    static constexpr int lines = SIDE, apart = APART / M::TOGETHER, each = M::TOGETHER == 2 ? PADDED / 2 : REACH;
    long length;
};

// weights (7, 22, C) as products read them: (7, EACH, C)
template <typename T>
void lay_out(const T* from, float* to, int channels) {
    for (int line = 0; line < SIDE; line++)
        widen(from + long(line) * PADDED * channels, to + long(line) * REACH * channels, long(REACH) * channels);
}
#ifdef __AVX512BF16__
void lay_out(const bfloat16* from, uint32_t* to, int channels) {
    interleave(from, channels, to, SIDE * PADDED, channels);
}
#endif

// Lines of an image (3, h, w) from `first` on, of which EDGE lie above it, as (count, length) of channels last
template <typename T, typename N>
void lay_lines(const T* image, int first, int count, int height, int width, long length, N* to) {
    std::fill(to, to + count * length, N());
    for (int i = 0; i < count; i++) {
        int line = first + i - EDGE;
        if (line < 0 || line >= height) continue;
        for (int colour = 0; colour < COLOURS; colour++) {
            const T* from = image + (long(colour) * height + line) * width;
            N* into = to + i * length + EDGE * COLOURS + colour;
            for (int x = 0; x < width; x++) put(into + long(x) * COLOURS, get(from + x));
        }
    }
}

// a row of cells (columns, C) to the largest of three, two apart (W, C)
inline void pool_row(const float* cells, int columns, int channels, float* to) {
    for (int x = 0; x < columns; x += 2)
        for (int c = 0; c < channels; c += WIDE) {
            const float* cell = cells + long(x) * channels + c;
            Wide most = get_wide(cell);
            if (x > 0) most = larger(get_wide(cell - channels), most);
            if (x + 1 < columns) most = larger(get_wide(cell + channels), most);
            put(to + long(x / 2) * channels + c, most);
        }
}

// Pictures (B, 3, h, w), weights (7, 22, C), of which the last of 22 are 0, and bias (C) to the map (B, H, W, C).
template <typename T>
void convolve(const T* pixels, const T* weight, const float* bias, float eps, int batch, int height, int width,
              int channels, T* map, int threads) {
    using M = Multiplied<T>;
    int rows = (height - 1) / STRIDE + 1, columns = (width - 1) / STRIDE + 1;
    int map_rows = (rows - 1) / 2 + 1, map_columns = (columns - 1) / 2 + 1;
    long length = (long(width + 2 * EDGE) * COLOURS + 2) / 2 * 2, row_size = long(map_columns) * channels;
    Window<M> window{length / M::TOGETHER};
    int bands = std::min(map_rows, batch % threads ? threads : 1);  // of an image, of one thread each
#pragma omp parallel num_threads(threads)
    {
        std::vector<typename M::Element> weights(long(SIDE) * Window<M>::each * channels);
        std::vector<typename M::Number> lines((STRIDE * (2 * AT_ONCE + 1) + SIDE) * length);
        std::vector<float> cells(long(columns) * channels), kept(3 * row_size), largest(channels);
        lay_out(weight, weights.data(), channels);
#pragma omp for collapse(2)
        for (int b = 0; b < batch; b++)
            for (int band = 0; band < bands; band++) {
                int top = map_rows * band / bands, below = map_rows * (band + 1) / bands;
                int next = std::max(0, 2 * top - 1);  // row of cells
                int above = 0;                        // the first line that is laid out
                for (int row = top; row < below; row++) {
                    int last = std::min(rows - 1, 2 * row + 1);
                    if ((row - top) % AT_ONCE == 0) {
                        above = STRIDE * next;
                        int count = STRIDE * (std::min(rows - 1, 2 * std::min(below, row + AT_ONCE) - 1) - next) + SIDE;
                        lay_lines(pixels + long(b) * COLOURS * height * width, above, count, height, width, length,
                                  lines.data());
                    }
                    for (; next <= last; next++) {
                        const auto* line = &lines[(STRIDE * next - above) * length];
                        row_of_cells(window, reinterpret_cast<const typename M::Element*>(line), weights.data(), bias,
                                     columns, channels, cells.data());
                        pool_row(cells.data(), columns, channels, &kept[next % 3 * row_size]);
                    }
                    T* to = map + (long(b) * map_rows + row) * row_size;
                    for (long at = 0; at < row_size; at += channels) {
                        float* most = largest.data();
                        std::fill(most, most + channels, 0.0f);
                        for (int i = std::max(0, 2 * row - 1); i <= last; i++) {
                            const float* cell = &kept[i % 3 * row_size + at];
                            for (int c = 0; c < channels; c += WIDE)
                                put(most + c, larger(get_wide(cell + c), get_wide(most + c)));
                        }
                        normalise(largest.data(), largest.data(), channels, eps);
                        for (int c = 0; c < channels; c += WIDE) put(to + at + c, get_wide(&largest[c]));
                    }
                }
            }
    }
}

}  // namespace

#define OF_TYPE(NAME, T)                                                                                        \
    void convolve_##NAME(const T* pixels, const T* weight, const float* bias, float eps, int batch, int height, \
                         int width, int channels, T* map, int threads) {                                        \
        convolve(pixels, weight, bias, eps, batch, height, width, channels, map, threads);                      \
    }

extern "C" {
OF_TYPE(float32, float)
OF_TYPE(bfloat16, bfloat16)
}
