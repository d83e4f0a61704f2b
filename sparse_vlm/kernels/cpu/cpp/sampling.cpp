// Sampling and mixing of an inference tower on a CPU: the sampling points of each token, the samples and how they are
// mixed, positions and RoI adjustment; one pass over the tokens each.
//
// Shape legend: B images, n tokens, P points a token, C channels of the map, O points after mixing, d width of a
// token, H x W the map.
//
// Notable: torch computes the same in some sixty operators, each of which takes longer to call than to carry out
// for one image (lab/speed.md). Here a token's samples, weights and mixed points stay in the first cache. Plain C++
// without torch's headers, so that it compiles in two seconds; sparse_vlm/kernels/cpu/native.py compiles and calls it.

#include "vectors.h"

namespace {

// one point of a map (H, W, C), bilinearly, with half-pixel centres
template <typename M>
void read_point(const M* map, float x, float y, int height, int width, int channels, bool border, float* to) {
    x = x * width - 0.5f;
    y = y * height - 0.5f;
    if (border) {  // written so that a NaN becomes 0
        x = x > 0 ? (x < width - 1 ? x : width - 1) : 0;
        y = y > 0 ? (y < height - 1 ? y : height - 1) : 0;
    } else {  // beyond two cells outside all weights are 0
        x = x > -2 ? (x < width + 1 ? x : width + 1) : -2;
        y = y > -2 ? (y < height + 1 ? y : height + 1) : -2;
    }
    float left = std::floor(x), top = std::floor(y), right_part = x - left, low_part = y - top;
    int column = int(left), row = int(top);
    const M* cells[4];
    float weights[4];
    for (int corner = 0; corner < 4; corner++) {
        int i = row + corner / 2, j = column + corner % 2;
        float weight = (corner / 2 ? low_part : 1 - low_part) * (corner % 2 ? right_part : 1 - right_part);
        bool inside =
            i >= 0 && i < height && j >= 0 && j < width;  // with a border, what is outside has a weight of 0 anyway
        weights[corner] = inside ? weight : 0;
        cells[corner] = map + (inside ? (long(i) * width + j) * channels : 0);
    }
    for (int c = 0; c < channels; c++)
        to[c] = weights[0] * get(cells[0] + c) + weights[1] * get(cells[1] + c) + weights[2] * get(cells[2] + c) +
                weights[3] * get(cells[3] + c);
}

inline void point_of(const float* roi, float x, float y, float* to) {
    to[0] = (roi[0] + roi[2]) / 2 + x * (roi[2] - roi[0]);
    to[1] = (roi[1] + roi[3]) / 2 + y * (roi[3] - roi[1]);
}

// Latents (B, n, d), of which an image's lie `image_stride` apart and a token's are whole, to points (B, n, P, 2) in RoIs
// (B, n, 4). `weight` (d, padded) and `bias` (padded) have the norm's affine part in them; padded is 2 P rounded up to
// whole vectors.
template <typename T>
void points(const T* latents, long image_stride, const float* rois, const float* weight, const float* bias, float eps,
            int batch, int n, int width, int count, float* out, int threads) {
    int padded = (2 * count + PADDING - 1) / PADDING * PADDING, blocks = (n + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normal(long(ROWS) * width), offsets(long(ROWS) * padded);
#pragma omp for collapse(2)
        for (int b = 0; b < batch; b++)
            for (int chunk = 0; chunk < blocks; chunk++) {
                int first = chunk * ROWS, rows = n - first < ROWS ? n - first : ROWS;
                for (int r = 0; r < rows; r++)
                    normalise(latents + b * image_stride + long(first + r) * width, normal.data() + long(r) * width, width,
                              eps);
                multiply(normal.data(), width, weight, offsets.data(), rows, width, padded);
                for (int r = 0; r < rows; r++) {
                    float* offset = offsets.data() + long(r) * padded;
                    long token = long(b) * n + first + r;
                    float mean[2] = {}, squares[2] = {}, scale[2];
                    for (int i = 0; i < 2 * count; i++) mean[i % 2] += offset[i] += bias[i];
                    for (int i = 0; i < 2; i++) mean[i] /= count;
                    for (int i = 0; i < 2 * count; i++)
                        squares[i % 2] += (offset[i] - mean[i % 2]) * (offset[i] - mean[i % 2]);
                    for (int i = 0; i < 2; i++) scale[i] = 1 / (3 * (std::sqrt(squares[i] / (count - 1)) + 1e-5f));
                    for (int p = 0; p < count; p++)
                        point_of(rois + token * 4, (offset[2 * p] - mean[0]) * scale[0],
                                 (offset[2 * p + 1] - mean[1]) * scale[1], out + (token * count + p) * 2);
                }
            }
    }
}

// What one token works in.
struct Scratch {
    std::vector<float> sampled, mixed, last, wide;
    std::vector<bfloat16> narrow;
    std::vector<uint32_t> pairs;

    Scratch(int count, int channels, int out_points)
        : sampled(long(count) * channels),
          mixed(sampled.size()),
          last(long(out_points) * channels),
          wide(long(channels) * channels + long(out_points) * count),
          narrow(sampled.size()),
          pairs(long(channels) * std::max(channels, count) / 2) {}
};

inline void activate(float* mixed, const float* beta, int count, int channels) {
    if (beta)
        for (int p = 0; p < count; p++)
            for (int c = 0; c < channels; c += WIDE) {
                float* to = mixed + p * channels + c;
                put(to, gelu(get_wide(to) + get_wide(beta + c)));
            }
}

// sampled (P, C) by a channel matrix (C, C) and then a point matrix (O, P), one behind the other in `generated`, to
// last (O, C)
template <typename T>
void mix_token(const T* generated, const float* m_beta, int count, int channels, int out_points, Scratch& at) {
    widen(generated, at.wide.data(), at.wide.size());
    multiply(at.sampled.data(), channels, at.wide.data(), at.mixed.data(), count, channels, channels);
    activate(at.mixed.data(), m_beta, count, channels);
    multiply(at.wide.data() + long(channels) * channels, count, at.mixed.data(), at.last.data(), out_points, count,
             channels);
}

#ifdef __AVX512BF16__
// the same by products of bfloat16 numbers, as torch computes it too: twice as many at once
void mix_token(const bfloat16* generated, const float* m_beta, int count, int channels, int out_points, Scratch& at) {
    if (count % 2) return mix_token<bfloat16>(generated, m_beta, count, channels, out_points, at);
    for (size_t i = 0; i < at.sampled.size(); i += WIDE) put(&at.narrow[i], get_wide(&at.sampled[i]));
    interleave(generated, channels, at.pairs.data(), channels, channels);
    multiply(pairs_of(at.narrow.data()), channels / 2, at.pairs.data(), at.mixed.data(), count, channels / 2, channels);
    activate(at.mixed.data(), m_beta, count, channels);
    for (size_t i = 0; i < at.mixed.size(); i += WIDE) put(&at.narrow[i], get_wide(&at.mixed[i]));
    interleave(at.narrow.data(), channels, at.pairs.data(), count, channels);
    multiply(pairs_of(generated + long(channels) * channels), count / 2, at.pairs.data(), at.last.data(), out_points,
             count / 2, channels);
}
#endif

// Points (B or 1, n, P, 2) read in maps (B, H, W, C), mixed by generated parameters (B or 1, n, C * C + O * P): O * C
// numbers a token, whose rows in `out` are `apart` from each other.
template <typename T>
void mix(const T* map, const float* where, bool same_points, const T* generated, bool same_parameters,
         const float* m_beta, const float* s_beta, int batch, int n, int count, int channels, int out_points,
         int height, int width, bool border, T* out, long apart, int threads) {
    long parameters = long(channels) * channels + long(out_points) * count;
#pragma omp parallel num_threads(threads)
    {
        Scratch at(count, channels, out_points);
#pragma omp for collapse(2)
        for (int b = 0; b < batch; b++)
            for (int token = 0; token < n; token++) {
                const float* point = where + (same_points ? token : long(b) * n + token) * count * 2;
                const T* image = map + long(b) * height * width * channels;
                for (int p = 0; p < count; p++)
                    read_point(image, point[2 * p], point[2 * p + 1], height, width, channels, border,
                               at.sampled.data() + long(p) * channels);
                mix_token(generated + (same_parameters ? token : long(b) * n + token) * parameters, m_beta, count,
                          channels, out_points, at);
                T* row = out + (long(b) * n + token) * apart;
                for (int o = 0; o < out_points; o++) {
                    float beta = s_beta ? s_beta[o] : 0;
                    for (long c = long(o) * channels; c < long(o + 1) * channels; c += WIDE)
                        put(row + c, gelu(get_wide(&at.last[c]) + beta));
                }
            }
    }
}

// RoIs (B, n, 4) to their sines and cosines, normalised: d numbers a token, whose rows in `out` are `apart` from each
// other; `frequencies` (d / 4) as geometry.encode_rois has them.
template <typename T>
void positions(const float* rois, const float* frequencies, const float* gain, const float* shift, float eps,
               long tokens, int width, T* out, long apart, int threads) {
    int quarter = width / 4, half = quarter / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> code(width);
#pragma omp for
        for (long token = 0; token < tokens; token++) {
            for (int side = 0; side < 4; side++) {
                float turns = rois[token * 4 + side] / 2;  // sin(pi r f) is that of r f / 2 turns
                float *sines = code.data() + side * quarter, *cosines = sines + half;
                for (int i = 0; i < half; i++) {
                    float sine = turns * frequencies[2 * i], cosine = turns * frequencies[2 * i + 1];
                    cosine += 0.25f;
                    sines[i] = sine_of_turns(sine - std::nearbyint(sine));
                    cosines[i] = sine_of_turns(cosine - std::nearbyint(cosine));
                }
            }
            normalise(code.data(), code.data(), width, eps);
            for (int i = 0; i < width; i++) put(out + token * apart + i, code[i] * gain[i] + shift[i]);
        }
    }
}

// RoIs (B, n, 4) moved and scaled by what a layer `weight` (4, d) says of hidden tokens, of which an image's lie
// `image_stride` apart.
template <typename T>
void adjust(const T* hidden, long image_stride, const float* weight, const float* rois, int batch, int n, int width,
            float* out, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int b = 0; b < batch; b++)
        for (int token = 0; token < n; token++) {
            const T* row = hidden + b * image_stride + long(token) * width;
            const float* roi = rois + (long(b) * n + token) * 4;
            float delta[4] = {};
            for (int k = 0; k < 4; k++)
                for (int i = 0; i < width; i++) delta[k] += get(row + i) * weight[long(k) * width + i];
            float* to = out + (long(b) * n + token) * 4;
            for (int side = 0; side < 2; side++) {
                float size = roi[side + 2] - roi[side], centre = (roi[side] + roi[side + 2]) / 2 + delta[side] * size;
                float half = size * std::exp(delta[side + 2]) / 2;
                to[side] = centre - half;
                to[side + 2] = centre + half;
            }
        }
}

}  // namespace

#define OF_TYPE(NAME, T)                                                                                                   \
    void points_##NAME(const T* latents, long image_stride, const float* rois, const float* weight, const float* bias,     \
                       float eps, int batch, int n, int width, int count, float* out, int threads) {                       \
        points(latents, image_stride, rois, weight, bias, eps, batch, n, width, count, out, threads);                      \
    }                                                                                                                      \
    void positions_##NAME(const float* rois, const float* frequencies, const float* gain, const float* shift,              \
                          float eps, long tokens, int width, T* out, long apart, int threads) {                            \
        positions(rois, frequencies, gain, shift, eps, tokens, width, out, apart, threads);                                \
    }                                                                                                                      \
    void adjust_rois_##NAME(const T* hidden, long image_stride, const float* weight, const float* rois, int batch, int n,  \
                       int width, float* out, int threads) {                                                               \
        adjust(hidden, image_stride, weight, rois, batch, n, width, out, threads);                                         \
    }                                                                                                                      \
    void sample_and_mix_##NAME(const T* map, const float* where, int same_points, const T* generated, int same_parameters, \
                    const float* m_beta, const float* s_beta, int batch, int n, int count, int channels,                   \
                    int out_points, int height, int width, int border, T* out, long apart, int threads) {                  \
        mix(map, where, same_points, generated, same_parameters, m_beta, s_beta, batch, n, count, channels,                \
            out_points, height, width, border, out, apart, threads);                                                       \
    }

extern "C" {
OF_TYPE(float32, float)
OF_TYPE(bfloat16, bfloat16)
}
