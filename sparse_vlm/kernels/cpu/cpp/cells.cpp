// Cells of any place and size, cropped from an image for an inference tower on a CPU, and the average of the position
// embeddings in each.
//
// Shape legend: B images of 3 x h x w pixels, n cells, S pixels a side of what is made of each, G x G the positions, d
// their width.
//
// Notable: roi.crop_rois samples pixel by pixel from an atlas of all levels. In an upright cell the columns are the
// same for all rows and colours; a row of 16 pixels that are read at most 1.4 apart lies within 32 numbers, so that two
// instructions find all of its neighbours.

#include "vectors.h"

namespace {

constexpr int COLOURS = 3, MOST_LEVELS = 32;

// An image and its halves, as roi.image_pyramid; those of all images and colours of a level lie together.
template <typename T>
struct Pyramid {
    const T* pixels;
    int levels, heights[MOST_LEVELS], widths[MOST_LEVELS];
    std::vector<float> halves[MOST_LEVELS];

    Pyramid(const T* pixels, int batch, int height, int width, int levels) : pixels(pixels), levels(levels) {
        heights[0] = height, widths[0] = width;
        for (int k = 1; k <= levels; k++) {
            heights[k] = (heights[k - 1] + 1) / 2, widths[k] = (widths[k - 1] + 1) / 2;
            halves[k].resize(long(batch) * COLOURS * heights[k] * widths[k]);
        }
    }
};

// The mean of two rows, each two columns of them; what is odd at the end counts twice.
template <typename T>
void halve(const T* upper, const T* lower, int width, float* to) {
    for (int x = 0; x < width / 2; x++)
        to[x] = (get(upper + 2 * x) + get(upper + 2 * x + 1) + get(lower + 2 * x) + get(lower + 2 * x + 1)) * 0.25f;
    if (width % 2) to[width / 2] = (get(upper + width - 1) + get(lower + width - 1)) * 0.5f;
}

// Pixels of a side of an image at level k.
inline int side_at(float whole, int k) {
    int side = int(whole);
    for (; k > 0; k--) side = (side + 1) / 2;
    return side;
}

// Level k + 1 of a pyramid from level k, of canvases (B, 3, height, width), of what holds images of `whole` (B, 2) alone.
// Called by all threads of a region together.
template <typename T>
void halve_planes(const T* from, const float* whole, int k, int batch, int height, int width, float* to) {
    int rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp for collapse(2)
    for (int plane = 0; plane < batch * COLOURS; plane++)
        for (int y = 0; y < rows; y++) {
            const float* of = whole + plane / COLOURS * 2;
            int across = side_at(of[0], k), down = side_at(of[1], k);
            if (2 * y >= down) continue;
            const T *upper = from + (long(plane) * height + 2 * y) * width,
                    *lower = 2 * y + 1 < down ? upper + width : upper;
            halve(upper, lower, across, to + (long(plane) * rows + y) * columns);
        }
}

// Where the pixels of a cell lie along one side of a level: `at` the one before, and the part of the one behind it, which
// lies `next` further.
struct Side {
    int next = 1;
    std::vector<int> at;
    std::vector<float> part;

    explicit Side(int size) : at(size), part(size) {}

    // Args: low, high and whole in pixels of level 0; `shrunk` of the level, at which the image is `length` pixels long.
    void set(float low, float high, float whole, float shrunk, int length) {
        int size = int(at.size());
        float last = std::max(0.5f, whole * shrunk - 0.5f);
        next = length > 1;  // of an only pixel what is beyond is not read
        for (int i = 0; i < size; i++) {
            float x = (low + (high - low) * ((i + 0.5f) / size)) * shrunk;
            x = x > 0.5f ? (x < last ? x : last) : 0.5f;  // a NaN becomes the first
            x -= 0.5f;
            int before = std::min(int(x), std::max(0, length - 2));
            at[i] = before, part[i] = std::min(1.0f, x - before);
        }
    }
};

// A row of a cell from two rows of a level; `below` is the part of the lower one.
template <typename S, typename T>
inline void read_row(const S* upper, const S* lower, float below, const Side& columns, int width, T* to) {
    int size = int(columns.at.size()), next = columns.next, x = 0;
#ifdef __AVX512F__
    for (; x + LANES <= size; x += LANES) {
        // cells may be mirrored, or lie on the border
        int first = std::min(columns.at[x], columns.at[x + LANES - 1]);
        int start = std::min(first, width - 2 * LANES);
        if (start < 0 || std::max(columns.at[x], columns.at[x + LANES - 1]) + 1 - start >= 2 * LANES) break;
        Vector near[2];
        for (int i = 0; i < 2; i++) {
            Vector above = get_wide(upper + start + i * LANES);
            near[i] = above + below * (get_wide(lower + start + i * LANES) - above);
        }
        __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(&columns.at[x]), _mm512_set1_epi32(start));
        Vector left = (Vector)_mm512_permutex2var_ps((__m512)near[0], at, (__m512)near[1]);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(next));
        Vector right = (Vector)_mm512_permutex2var_ps((__m512)near[0], at, (__m512)near[1]);
        put(to + x, left + load(&columns.part[x]) * (right - left));
    }
#endif
    for (; x < size; x++) {
        int at = columns.at[x];
        float left = get(upper + at) + below * (get(lower + at) - get(upper + at));
        float right = get(upper + at + next) + below * (get(lower + at + next) - get(upper + at + next));
        put(to + x, left + columns.part[x] * (right - left));
    }
}

// A cell (3, S, S) from the planes of a level.
template <typename S, typename T>
void read_cell(const S* planes, int height, int width, const Side& rows, const Side& columns, T* to) {
    int size = int(rows.at.size());
    for (int colour = 0; colour < COLOURS; colour++)
        for (int y = 0; y < size; y++) {
            const S* upper = planes + (long(colour) * height + rows.at[y]) * width;
            read_row(upper, upper + rows.next * width, rows.part[y], columns, width,
                     to + (long(colour) * size + y) * size);
        }
}

// The level that a cell is read from.
inline int level_of(float across, float down, int size, int levels) {
    float sides = (std::log2(std::max(std::fabs(across), 1e-3f)) + std::log2(std::max(std::fabs(down), 1e-3f))) / 2;
    return int(within(std::floor(sides - float(std::log2(size)) + 0.5f), 0, levels));
}

// Canvases (B, 3, h, w) and cells (B, n, 4) relative to the images at their top left, of `whole` (B, 2) pixels across and
// down, to what lies in each (B, n, 3, S, S), as roi.crop_rois.
template <typename T>
void crop_rois(const T* pixels, const float* cells, const float* whole, int batch, int n, int height, int width, int size,
         int levels, T* out, int threads) {
    std::vector<int> level(long(batch) * n);
    int most = 0;
    for (long i = 0; i < long(batch) * n; i++) {
        const float *cell = cells + i * 4, *of = whole + i / n * 2;
        level[i] = level_of(cell[2] * of[0] - cell[0] * of[0], cell[3] * of[1] - cell[1] * of[1], size, levels);
        most = std::max(most, level[i]);
    }
    Pyramid<T> pyramid(pixels, batch, height, width, most);
#pragma omp parallel num_threads(threads)
    {
        for (int k = 1; k <= most; k++) {
            float* to = pyramid.halves[k].data();
            int h = pyramid.heights[k - 1], w = pyramid.widths[k - 1];
            if (k == 1)
                halve_planes(pixels, whole, 0, batch, h, w, to);
            else
                halve_planes(pyramid.halves[k - 1].data(), whole, k - 1, batch, h, w, to);
        }
        Side rows(size), columns(size);
        long numbers = long(COLOURS) * size * size;
#pragma omp for collapse(2)
        for (int b = 0; b < batch; b++)
            for (int i = 0; i < n; i++) {
                long at = long(b) * n + i;
                int k = level[at], h = pyramid.heights[k], w = pyramid.widths[k];
                const float *cell = cells + at * 4, *of = whole + b * 2;
                float shrunk = std::ldexp(1.0f, -k);
                columns.set(cell[0] * of[0], cell[2] * of[0], of[0], shrunk, side_at(of[0], k));
                rows.set(cell[1] * of[1], cell[3] * of[1], of[1], shrunk, side_at(of[1], k));
                long plane = long(b) * COLOURS * h * w;
                if (k == 0)
                    read_cell(pixels + plane, h, w, rows, columns, out + at * numbers);
                else
                    read_cell(&pyramid.halves[k][plane], h, w, rows, columns, out + at * numbers);
            }
    }
}

// What the samples of a span read of each of G cells in a row, as geometry.span_weights of one part.
inline void span(float low, float high, int grid, int samples, float* weights) {
    std::fill(weights, weights + grid, 0.0f);
    for (int i = 0; i < samples; i++) {
        float at = (low + (high - low) * ((i + 0.5f) / samples)) * grid - 0.5f;
        at = at > 0 ? (at < grid - 1 ? at : grid - 1) : 0;
        int before = int(at);
        weights[before] += (1 - (at - before)) / samples;
        if (before + 1 < grid) weights[before + 1] += (at - before) / samples;
    }
}

// Cells (count, 4) to the mean of positions (G, G, d) in each (count, d).
template <typename T>
void average(const float* cells, const float* positions, int count, int grid, int samples, int width, T* out,
             int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> down(grid), across(grid), mean(width);
#pragma omp for
        for (int i = 0; i < count; i++) {
            const float* cell = cells + long(i) * 4;
            span(cell[0], cell[2], grid, samples, across.data());
            span(cell[1], cell[3], grid, samples, down.data());
            std::fill(mean.begin(), mean.end(), 0.0f);
            for (int y = 0; y < grid; y++)
                for (int x = 0; x < grid; x++) {
                    float weight = down[y] * across[x];
                    if (weight == 0) continue;
                    const float* from = positions + (long(y) * grid + x) * width;
                    for (int c = 0; c < width; c++) mean[c] += weight * from[c];
                }
            for (int c = 0; c < width; c++) put(out + long(i) * width + c, mean[c]);
        }
    }
}

}  // namespace

#define OF_TYPE(NAME, T)                                                                                                    \
    void crop_rois_##NAME(const T* pixels, const float* cells, const float* whole, int batch, int n, int height, int width, \
                    int size, int levels, T* out, int threads) {                                                            \
        crop_rois(pixels, cells, whole, batch, n, height, width, size, levels, out, threads);                               \
    }                                                                                                                       \
    void average_positions_##NAME(const float* cells, const float* positions, int count, int grid, int samples, int width,  \
                        T* out, int threads) {                                                                              \
        average(cells, positions, count, grid, samples, width, out, threads);                                               \
    }

extern "C" {
OF_TYPE(float32, float)
OF_TYPE(bfloat16, bfloat16)
}
