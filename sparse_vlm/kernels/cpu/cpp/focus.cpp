// The focus module of an inference tower on a CPU: the network that predicts variation, and the placement of cells; as
// sparse_vlm/tower/focus.py.
//
// Shape legend: B images, T pixels a side of a thumbnail, M x M the map, S scales, n cells, b cells of the coarse grid.
//
// Notable: torch computes the same in two hundred operators, most of which take longer to call than to carry out. Each
// image passes through all layers alone, so that what is between them stays in the second cache; few images are shared
// by threads in rows. All is float32, also of a bfloat16 tower: layers of so few channels gain nothing from pairs.

#include <omp.h>

#include "windows.h"

namespace {

constexpr int COLOURS = 3, TAPS = 3, MIDDLE = 1;  // as in focus.py
constexpr float ELONGATED = 2;

// Numbers (rows, columns, channels) with a border of zeros, as cells of a convolution read them.
struct Plane {
    int rows, columns, channels;
    long length;  // of a line
    std::vector<float> numbers;

    Plane(int rows, int columns, int channels)
        : rows(rows),
          columns(columns),
          channels(channels),
          length((columns + 2L) * channels),
          numbers((rows + 2) * length) {}

    float* row(int y) { return &numbers[(y + 1) * length + channels]; }
};

struct Three {  // a window of 3 x 3
    static constexpr int lines = TAPS;
    int each, apart;
    long length;
};

// The weights and biases of all layers, from the one that is to come on.
struct Weights {
    const float *weight, *numbers;

    // Past a layer of 3 x 3 from so many channels to so many.
    void pass(int from, int to) { weight += long(TAPS) * TAPS * from * to, numbers += to; }
};

// Row y of a convolution of 3 x 3, with its GELU, to (columns, channels).
inline void convolve_row(const Plane& from, int stride, const Weights& of, int y, int columns, int channels,
                         float* to) {
    Three window{TAPS * from.channels, stride * from.channels, from.length};
    row_of_cells(window, &from.numbers[y * stride * from.length], of.weight, of.numbers, columns, channels, to);
    for (long i = 0; i < long(columns) * channels; i += WIDE) put(to + i, gelu(get_wide(to + i)));
}

// What an image becomes on the way.
struct Room {
    Plane thumbnail, first, second, third, pooled, body;
    std::vector<float> map, kept;

    Room(const int* channels, int size, int side)
        : thumbnail(size, size, COLOURS),
          first(half(size), half(size), channels[0]),
          second(half(first.rows), half(first.rows), channels[1]),
          third(half(second.rows), half(second.rows), channels[2]),
          pooled(side, side, channels[2]),
          body(side, side, channels[3]),
          map(long(side) * side * std::max(channels[2], channels[3])),
          kept(map.size()) {}

    static int half(int size) { return (size + 1) / 2; }
};

// A part of the rows of each layer of one image; `parts` threads go through the layers together.
struct Passage {
    Room& at;
    int part, parts;

    template <typename F>
    void each_row(int rows, F function) {
        for (int y = rows * part / parts; y < rows * (part + 1) / parts; y++) function(y);
        if (parts > 1) {
#pragma omp barrier
        }
    }

    void layer(const Plane& from, int stride, Weights& of, Plane& to) {
        each_row(to.rows, [&](int y) { convolve_row(from, stride, of, y, to.columns, to.channels, to.row(y)); });
        of.pass(from.channels, to.channels);
    }

    // A thumbnail (3, T, T) to its map (S, M, M).
    void run(const float* pixels, Weights of, float eps, int scales, float* out) {
        int size = at.thumbnail.rows, side = at.pooled.rows, width = at.body.channels, before = at.pooled.channels;
        long cells = long(side) * side;
        each_row(size, [&](int y) {
            for (int colour = 0; colour < COLOURS; colour++)
                for (int x = 0; x < size; x++)
                    at.thumbnail.row(y)[x * COLOURS + colour] = pixels[(long(colour) * size + y) * size + x];
        });
        layer(at.thumbnail, 2, of, at.first);
        layer(at.first, 2, of, at.second);
        layer(at.second, 2, of, at.third);
        each_row(side, [&](int y) { pool(y); });
        float sum = 0, squares = 0;
        for (long i = 0; i < cells * before; i++) sum += at.map[i];
        float mean = sum / (cells * before);
        for (long i = 0; i < cells * before; i++) squares += (at.map[i] - mean) * (at.map[i] - mean);
        float scale = 1 / std::sqrt(squares / (cells * before) + eps);
        const float *gain = of.numbers, *shift = gain + before;
        of.numbers = shift + before;
        each_row(side, [&](int y) {
            const float* from = &at.map[long(y) * side * before];
            for (long i = 0; i < long(side) * before; i += before)
                for (int c = 0; c < before; c++)
                    at.pooled.row(y)[i + c] = (from[i + c] - mean) * scale * gain[c] + shift[c];
        });
        layer(at.pooled, 1, of, at.body);
        long length = long(side) * width;
        each_row(side, [&](int y) { convolve_row(at.body, 1, of, y, side, width, &at.kept[y * length]); });
        of.pass(width, width);
        // what all cells say together; each thread finds it for itself
        std::vector<float> whole(width), context(of.numbers, of.numbers + width);
        of.numbers += width;
        for (long i = 0; i < cells; i++)
            for (int c = 0; c < width; c++) whole[c] += at.kept[i * width + c] / cells;
        for (int i = 0; i < width; i++, of.numbers += width)
            for (int c = 0; c < width; c++) context[c] += whole[i] * of.numbers[c];
        std::vector<float> row(length);
        if (parts > 1) {
#pragma omp barrier
        }
        each_row(side, [&](int y) {
            float* to = &at.kept[y * length];
            for (long i = 0; i < length; i += width)
                for (int c = 0; c < width; c++) to[i + c] += context[c];
            std::copy(to, to + length, at.body.row(y));
        });
        each_row(side, [&](int y) {
            convolve_row(at.body, 1, of, y, side, width, row.data());
            const float* head = of.numbers + width;
            for (int x = 0; x < side; x++) {
                float* cell = &row[long(x) * width];
                for (int c = 0; c < width; c++) cell[c] += at.kept[y * length + long(x) * width + c];
                for (int s = 0; s < scales; s++) {
                    float value = head[long(scales) * width + s];
                    for (int c = 0; c < width; c++) value += cell[c] * head[long(s) * width + c];
                    out[(long(s) * side + y) * side + x] = value;
                }
            }
        });
    }

    // Row y of the map: means of what the last of the strided convolutions says there.
    void pool(int y) {
        int side = at.pooled.rows, size = at.third.rows, channels = at.third.channels;
        int top = y * size / side, below = ((y + 1) * size + side - 1) / side;
        for (int x = 0; x < side; x++) {
            int left = x * size / side, right = ((x + 1) * size + side - 1) / side;
            float *to = &at.map[(long(y) * side + x) * channels], part = 1.0f / ((below - top) * (right - left));
            std::fill(to, to + channels, 0.0f);
            for (int i = top; i < below; i++)
                for (int j = left; j < right; j++)
                    for (int c = 0; c < channels; c++) to[c] += at.third.row(i)[long(j) * channels + c] * part;
        }
    }
};

// Thumbnails (B, 3, T, T) to maps (B, S, M, M). `weight` of the six layers of 3 x 3, and `numbers`: the biases of the
// first three, gain and shift of the norm, biases of the next two, bias (d) and weight (in, out) of the context, bias of
// the last one, weight (S, d) and bias (S) of the head.
void predict(const float* pixels, const float* weight, const float* numbers, float eps, int batch, int size, int first,
             int second, int third, int width, int side, int scales, float* out, int threads) {
    int channels[] = {first, second, third, width};
    long image = long(COLOURS) * size * size, map = long(scales) * side * side;
    Weights of{weight, numbers};
    if (batch >= threads) {
#pragma omp parallel num_threads(threads)
        {
            Room scratch(channels, size, side);
#pragma omp for
            for (int b = 0; b < batch; b++)
                Passage{scratch, 0, 1}.run(pixels + b * image, of, eps, scales, out + b * map);
        }
        return;
    }
    Room scratch(channels, size, side);
#pragma omp parallel num_threads(threads)
    for (int b = 0; b < batch; b++)
        Passage{scratch, omp_get_thread_num(), omp_get_num_threads()}.run(pixels + b * image, of, eps, scales,
                                                                          out + b * map);
}

struct Cell {
    float left, top, right, bottom;

    float area() const { return (right - left) * (bottom - top); }

    // q of its quarters in reading order
    Cell quarter(int q) const {
        float across = (right - left) / 2, down = (bottom - top) / 2;
        float x = left + (q % 2) * across, y = top + (q / 2) * down;
        return {x, y, x + across, y + down};
    }
};

// A grid of `count` cells, near square in an image of this aspect, as roi.grid_rois_for.
inline std::vector<Cell> grid_of(int count, float aspect) {
    int rows = int(within(std::nearbyint(std::sqrt(count / aspect)), 1, count));
    std::vector<Cell> cells;
    for (int row = 0; row < rows; row++) {
        int columns = count * (row + 1) / rows - count * row / rows;
        for (int i = 0; i < columns; i++)
            cells.push_back({float(i) / columns, float(row) / rows, float(i + 1) / columns, float(row + 1) / rows});
    }
    return cells;
}

// Maps (S, M, M) of one image.
struct Maps {
    const float* numbers;
    int side, scales;

    float sample(int scale, float x, float y) const {
        x = within(x * side - 0.5f, 0, side - 1), y = within(y * side - 0.5f, 0, side - 1);
        int column = std::min(int(x), side - 2), row = std::min(int(y), side - 2);
        const float* at = numbers + (long(scale) * side + row) * side + column;
        x -= column, y -= row;
        return (at[0] * (1 - x) + at[1] * x) * (1 - y) + (at[side] * (1 - x) + at[side + 1] * x) * y;
    }

    // what splitting a cell gains
    float gain(const Cell& cell) const {
        float x = (cell.left + cell.right) / 2, y = (cell.top + cell.bottom) / 2, area = cell.area();
        float step = within(-std::log2(std::max(area, 1e-9f)) / 2 - 1, 0, scales);
        int scale = int(within(std::floor(step), 0, scales - 2));
        float coarse = sample(scale, x, y), fine = sample(scale + 1, x, y);
        return std::exp(coarse + (step - scale) * (fine - coarse)) * area;
    }

    // the standard deviation of a scale's map
    float spread(int scale) const {
        long count = long(side) * side;
        const float* at = numbers + scale * count;
        double mean = 0, squares = 0;
        for (long i = 0; i < count; i++) mean += at[i] / count;
        for (long i = 0; i < count; i++) squares += (at[i] - mean) * (at[i] - mean);
        return float(std::sqrt(squares / (count - 1)));
    }
};

// The cells of one image.
inline std::vector<Cell> cells_of_image(const Maps& maps, float aspect, int n, int coarse, float evenness) {
    aspect /= within(aspect, 1 / ELONGATED, ELONGATED);
    std::vector<Cell> grid = grid_of(n, aspect), tree;
    int splits = (n - coarse) / 3;
    if (splits == 0 || maps.spread(MIDDLE) < evenness) return grid;
    std::vector<Cell> base = grid_of(coarse, aspect);
    std::vector<float> scores;
    std::vector<int> order;
    for (const Cell& cell : base) {
        float score = maps.gain(cell);
        scores.push_back(score);
        for (int q = 0; q < 4; q++) {
            float gain = maps.gain(cell.quarter(q));
            scores.push_back(std::min(gain, score * (1 - 1e-3f * score / std::max(gain, 1e-30f))));
        }
    }
    for (size_t i = 0; i < scores.size(); i++) {
        scores[i] = scores[i] == scores[i] ? scores[i] : 1e30f;  // NaNs have no order
        order.push_back(int(i));
    }
    // of cells alike the first ones, so that none is split before the one that it is a quarter of
    std::partial_sort(order.begin(), order.begin() + splits, order.end(),
                      [&](int a, int b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
    std::vector<char> split(scores.size());
    for (int i = 0; i < splits; i++) split[order[i]] = 1;
    for (size_t i = 0; i < base.size(); i++) {
        if (!split[i * 5]) {
            tree.push_back(base[i]);
            continue;
        }
        for (int q = 0; q < 4; q++) {
            Cell quarter = base[i].quarter(q);
            if (split[i * 5 + 1 + q])
                for (int p = 0; p < 4; p++) tree.push_back(quarter.quarter(p));
            else
                tree.push_back(quarter);
        }
    }
    return tree;
}

}  // namespace

extern "C" {
// Maps (B, S, M, M) and aspects (B) to cells (B, n, 4); `coarse` of the n are those of the grid that is split.
void place_cells_float32(const float* maps, const float* aspects, float evenness, int batch, int n, int coarse, int side,
                   int scales, float* out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int b = 0; b < batch; b++) {
        Maps of{maps + long(b) * scales * side * side, side, scales};
        std::vector<Cell> cells = cells_of_image(of, aspects[b], n, coarse, evenness);
        std::memcpy(out + long(b) * n * 4, cells.data(), n * sizeof(Cell));
    }
}

void focus_float32(const float* pixels, const float* weight, const float* numbers, float eps, int batch, int size,
                     int first, int second, int third, int width, int side, int scales, float* out, int threads) {
    predict(pixels, weight, numbers, eps, batch, size, first, second, third, width, side, scales, out, threads);
}
}
