// Winograd's F(2×2, 3×3), F(4×4, 3×3) and F(3×3, 2×2) for one instruction set; compiled once for each, by library.py.
//
// The output is cut into tiles of m×m pixels, each of which needs (m+2)² pixels of the input. Both are transformed
// along rows and columns (A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2015), between
// which a convolution is (m+2)² products of matrices, outputs × inputs times inputs × tiles:
//
//     y = Aᵀ [ Σ over inputs of (G w Gᵀ) ⊙ (Bᵀ x B) ] A
//
// A vector holds as many tiles as it has lanes, so that transforms read and write planar maps and transpose nothing.
// Tiles are taken in blocks of about 64, whose transformed values stay in a core's cache: V[position][input][tile],
// then M[position][output][tile]. G w Gᵀ was computed and packed when the engine was built.
//
// A 3×3 convolution of a doubled map is four 2×2 convolutions of the small map, one for each of the four pixels that a
// pixel becomes. The input tile of rows s-1 … s+2 gives rows s … s+2 of the convolutions for even rows, and rows
// s-1 … s+1 of those for odd rows: together the rows 2s-1 … 2s+4 of the doubled map. So all four use the same V, and
// 64 products give 36 pixels.
#include "kernel.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef WINOGRAD_FUNCTION
#error "WINOGRAD_FUNCTION is the name of the function that this file defines"
#endif

namespace lcm {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 64;  // tiles of a block, about
constexpr std::int64_t CACHED = 1 << 19;  // bytes of a block's part of M
constexpr std::int64_t LARGE = 1 << 24;   // bytes of weights above which they don't stay in a cache
constexpr std::int64_t FITS = 1 << 25;    // bytes of V below which it does
// Floats between the positions' parts of V and M, whose sizes are often powers of two: without them the values of one
// tile would all lie in the same set of the first-level cache, which has no room for so many.
constexpr std::int64_t PAD = 16;
// Vectors of tiles that the innermost product computes at once, for ROWS outputs: as many as registers hold.
constexpr int COLUMNS = LANES == 16 ? 4 : 2;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef std::int32_t Mask __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

template <int START, int STEP>
inline Mask every() {
    Mask mask;
    for (int i = 0; i < LANES; i++) mask[i] = START + STEP * i;
    return mask;
}
inline Vector even(Vector a, Vector b) { return __builtin_shuffle(a, b, every<0, 2>()); }
inline Vector odd(Vector a, Vector b) { return __builtin_shuffle(a, b, every<1, 2>()); }
// a and b, lane by lane in turn: the lower half, and the upper half.
template <int HALF>
inline Vector zipped(Vector a, Vector b) {
    Mask mask;
    for (int i = 0; i < LANES; i++) mask[i] = HALF * LANES / 2 + i / 2 + (i % 2) * LANES;
    return __builtin_shuffle(a, b, mask);
}

inline float widened(float value) { return value; }
inline float widened(Bf16 value) {
    const std::uint32_t bits = std::uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline void put(float* p, float value) { *p = value; }
inline void put(Bf16* p, float value) { *p = rounded(value); }

inline Vector load_as_floats(const float* p) { return load(p); }
inline void store_floats(float* p, Vector v) { store(p, v); }
#if defined(__AVX512BF16__)
inline Vector load_as_floats(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_floats(Bf16* p, Vector v) {
    const __m256bh narrow = _mm512_cvtneps_pbh(__m512(v));
    std::memcpy(p, &narrow, 32);
}
#else
inline Vector load_as_floats(const Bf16* p) {
    Vector v;
    for (int i = 0; i < LANES; i++) v[i] = widened(p[i]);
    return v;
}
inline void store_floats(Bf16* p, Vector v) {
    for (int i = 0; i < LANES; i++) p[i] = rounded(v[i]);
}
#endif

// One-dimensional transforms; a tile's are these along its rows, then along its columns.
template <int M>
struct Tile;

template <>
struct Tile<2> {
    static constexpr int SIDE = 4;
    static void forward(const Vector* d, int step, Vector* v) {
        const Vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
        v[0] = d0 - d2;
        v[step] = d1 + d2;
        v[2 * step] = d2 - d1;
        v[3 * step] = d1 - d3;
    }
    static void backward(const Vector* m, int step, Vector* y, int to) {
        const Vector sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
        y[0] = m[0] + sum;
        y[to] = difference - m[3 * step];
    }
    // Pixels 2t + j of a row, for LANES tiles t.
    static void pixels(const float* row, Vector* d) {
        const Vector a = load(row), b = load(row + LANES), c = load(row + 2), e = load(row + LANES + 2);
        d[0] = even(a, b);
        d[1] = odd(a, b);
        d[2] = even(c, e);
        d[3] = odd(c, e);
    }
    static void line(const Vector* y, float* pixels) {
        store(pixels, zipped<0>(y[0], y[1]));
        store(pixels + LANES, zipped<1>(y[0], y[1]));
    }
};

template <>
struct Tile<3> {
    static constexpr int SIDE = 4;
    static void forward(const Vector* d, int step, Vector* v) { Tile<2>::forward(d, step, v); }
    static void backward(const Vector* m, int step, Vector* y, int to) {
        const Vector sum = m[step] + m[2 * step];
        y[0] = m[0] + sum;
        y[to] = m[step] - m[2 * step];
        y[2 * to] = sum - m[3 * step];
    }
    static void pixels(const float* row, Vector* d) {
        for (int j = 0; j < SIDE; j++) {
            alignas(64) float values[LANES];
            for (int l = 0; l < LANES; l++) values[l] = row[3 * l + j];
            d[j] = load(values);
        }
    }
};

template <>
struct Tile<4> {
    static constexpr int SIDE = 6;
    static void forward(const Vector* d, int step, Vector* v) {
        const Vector d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
        const Vector a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, e = 2 * (d3 - d1);
        v[0] = 4 * d0 - 5 * d2 + d4;
        v[step] = a + b;
        v[2 * step] = a - b;
        v[3 * step] = c + e;
        v[4 * step] = c - e;
        v[5 * step] = 4 * d1 - 5 * d3 + d5;
    }
    static void backward(const Vector* m, int step, Vector* y, int to) {
        const Vector s = m[step] + m[2 * step], d = m[step] - m[2 * step];
        const Vector s2 = m[3 * step] + m[4 * step], d2 = m[3 * step] - m[4 * step];
        y[0] = m[0] + s + s2;
        y[to] = d + 2 * d2;
        y[2 * to] = s + 4 * s2;
        y[3 * to] = d + 8 * d2 + m[5 * step];
    }
    static void pixels(const float* row, Vector* d) {
        const Vector a = load(row), b = load(row + LANES), c = load(row + 2 * LANES), e = load(row + 3 * LANES);
        const Vector even_low = even(a, b), even_high = even(c, e), odd_low = odd(a, b), odd_high = odd(c, e);
        d[0] = even(even_low, even_high);
        d[1] = even(odd_low, odd_high);
        d[2] = odd(even_low, even_high);
        d[3] = odd(odd_low, odd_high);
        const float* next = row + 4;
        const Vector f = load(next), g = load(next + LANES), h = load(next + 2 * LANES), i = load(next + 3 * LANES);
        d[4] = even(even(f, g), even(h, i));
        d[5] = even(odd(f, g), odd(h, i));
    }
    static void line(const Vector* y, float* pixels) {
        const Vector low = zipped<0>(y[0], y[2]), high = zipped<1>(y[0], y[2]);
        const Vector low2 = zipped<0>(y[1], y[3]), high2 = zipped<1>(y[1], y[3]);
        store(pixels, zipped<0>(low, low2));
        store(pixels + LANES, zipped<1>(low, low2));
        store(pixels + 2 * LANES, zipped<0>(high, high2));
        store(pixels + 3 * LANES, zipped<1>(high, high2));
    }
};

// A rectangle of tiles of one picture. Its tile (row, column) is lane row * columns + column.
struct Block {
    std::int64_t picture, row, column, rows, columns;
    std::int64_t lanes;  // rows * columns, rounded up to whole vectors
};

std::vector<Block> blocks_of(const Convolution& layer) {
    // Of a doubled map, the last tile must reach the last odd row, which is a row behind the even one.
    const std::int64_t more = layer.tile == 3;
    const std::int64_t high = (layer.height + more + layer.tile - 1) / layer.tile;
    const std::int64_t wide = (layer.width + more + layer.tile - 1) / layer.tile;
    const std::int64_t columns = std::min<std::int64_t>(wide, BLOCK);
    const std::int64_t rows = std::max<std::int64_t>(1, BLOCK / columns);
    std::vector<Block> blocks;
    for (std::int64_t n = 0; n < layer.pictures; n++)
        for (std::int64_t r = 0; r < high; r += rows)
            for (std::int64_t c = 0; c < wide; c += columns) {
                const std::int64_t r_count = std::min(rows, high - r), c_count = std::min(columns, wide - c);
                const std::int64_t lanes = (r_count * c_count + LANES - 1) / LANES * LANES;
                blocks.push_back({n, r, c, r_count, c_count, lanes});
            }
    return blocks;
}

// Memory that calls take and give back, so that its pages are not asked for again at each call.
class Scratch {
public:
    explicit Scratch(std::size_t floats) {
        {
            const std::lock_guard<std::mutex> lock(mutex());
            if (!idle().empty()) {
                memory_ = std::move(idle().back());
                idle().pop_back();
            }
        }
        if (memory_.size < floats) memory_ = {std::unique_ptr<float[]>(new float[floats + LANES]), floats};
    }
    ~Scratch() {
        const std::lock_guard<std::mutex> lock(mutex());
        idle().push_back(std::move(memory_));
    }
    float* data() const {
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.values.get());
        return reinterpret_cast<float*>((address + 4 * LANES - 1) / (4 * LANES) * (4 * LANES));
    }

private:
    struct Memory {
        std::unique_ptr<float[]> values;
        std::size_t size = 0;
    };
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static std::vector<Memory>& idle() {
        static std::vector<Memory> instance;
        return instance;
    }
    Memory memory_;
};

// Writes the transformed tiles of inputs first … last - 1 to V.
template <int M, class X, bool BF16>
void transform_inputs(const Convolution& layer, const Block& block, std::int64_t first, std::int64_t last, float* v) {
    constexpr int SIDE = Tile<M>::SIDE, POSITIONS = SIDE * SIDE, TOGETHER = BF16 ? 2 : 1;
    constexpr int LONGEST = M * BLOCK + 2 * LANES + 8;
    const std::int64_t plane = layer.height * layer.width, top = block.row * M - 1, left = block.column * M - 1;
    const std::int64_t length = block.columns * M + 2;
    const bool narrow = block.columns < LANES;
    const std::int64_t position_step = layer.inputs / TOGETHER * block.lanes + PAD;  // in words of 4 bytes
    // The pixels of columns left … left + length - 1 that the map has; others are zero.
    const std::int64_t begin = std::max<std::int64_t>(0, -left), end = std::min(length, layer.width - left);
    alignas(64) float rows[TOGETHER][SIDE][LONGEST];
    alignas(64) float gathered[TOGETHER][POSITIONS][BLOCK];
    std::memset(rows, 0, sizeof rows);
    if (narrow) std::memset(gathered, 0, sizeof gathered);

    const auto finish = [&](Vector (*d)[POSITIONS], std::int64_t channel, std::int64_t lane) {
        for (int t = 0; t < TOGETHER; t++) {
            for (int i = 0; i < SIDE; i++) Tile<M>::forward(d[t] + i * SIDE, 1, d[t] + i * SIDE);
            for (int j = 0; j < SIDE; j++) Tile<M>::forward(d[t] + j, SIDE, d[t] + j);
        }
        float* to = v + channel / TOGETHER * block.lanes + lane;
        for (int p = 0; p < POSITIONS; p++) {
#if defined(__AVX512BF16__)
            if constexpr (BF16) {
                const __m512bh pair = _mm512_cvtne2ps_pbh(__m512(d[1][p]), __m512(d[0][p]));
                static const __m512i interleave = [] {
                    std::uint16_t order[32];
                    for (int i = 0; i < 32; i++) order[i] = std::uint16_t(i / 2 + (i % 2) * 16);
                    return _mm512_loadu_si512(order);
                }();
                _mm512_storeu_si512(to + p * position_step, _mm512_permutexvar_epi16(interleave, __m512i(pair)));
                continue;
            }
#endif
            store(to + p * position_step, d[0][p]);
        }
    };

    for (std::int64_t c = first; c < last; c += TOGETHER) {
        for (std::int64_t r = 0; r < block.rows; r++) {
            for (int t = 0; t < TOGETHER; t++) {
                const X* map = static_cast<const X*>(layer.x) + (block.picture * layer.inputs + c + t) * plane;
                for (int i = 0; i < SIDE; i++) {
                    const std::int64_t y = top + r * M + i;
                    float* row = rows[t][i];
                    if (y < 0 || y >= layer.height) {
                        std::memset(row, 0, sizeof(float) * length);
                        continue;
                    }
                    const X* source = map + y * layer.width + left;
                    std::int64_t k = begin;
                    for (; k + LANES <= end; k += LANES) store(row + k, load_as_floats(source + k));
                    for (; k < end; k++) row[k] = widened(source[k]);
                }
            }
            if (narrow) {
                for (int t = 0; t < TOGETHER; t++)
                    for (int i = 0; i < SIDE; i++)
                        for (int j = 0; j < SIDE; j++) {
                            float* to = gathered[t][i * SIDE + j] + r * block.columns;
                            for (std::int64_t k = 0; k < block.columns; k++) to[k] = rows[t][i][M * k + j];
                        }
                continue;
            }
            for (std::int64_t k = 0; k < block.columns; k += LANES) {
                const std::int64_t column = std::min(k, block.columns - LANES);  // the last ones may come twice
                Vector d[TOGETHER][POSITIONS];
                for (int t = 0; t < TOGETHER; t++)
                    for (int i = 0; i < SIDE; i++) Tile<M>::pixels(rows[t][i] + M * column, d[t] + i * SIDE);
                finish(d, c, r * block.columns + column);
            }
        }
        if (narrow)
            for (std::int64_t lane = 0; lane < block.lanes; lane += LANES) {
                Vector d[TOGETHER][POSITIONS];
                for (int t = 0; t < TOGETHER; t++)
                    for (int p = 0; p < POSITIONS; p++) d[t][p] = load(gathered[t][p] + lane);
                finish(d, c, lane);
            }
    }
}

// m[R][V vectors] = u[depth][R] · v[depth][V vectors], a word of u and v being a float or two bfloat16.
template <int R, int V, bool BF16>
void product(const float* u, const float* v, std::int64_t depth, std::int64_t lanes, float* m) {
    Vector sums[R][V] = {};
    for (std::int64_t c = 0; c < depth; c++) {
        Vector values[V];
#pragma GCC unroll 8
        for (int k = 0; k < V; k++) values[k] = load(v + c * lanes + k * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Vector weight = Vector{} + u[c * R + r];
#pragma GCC unroll 8
            for (int k = 0; k < V; k++) {
#if defined(__AVX512BF16__)
                if constexpr (BF16) {
                    sums[r][k] = Vector(_mm512_dpbf16_ps(__m512(sums[r][k]), __m512bh(weight), __m512bh(values[k])));
                    continue;
                }
#endif
                sums[r][k] += weight * values[k];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int k = 0; k < V; k++) store(m + r * lanes + k * LANES, sums[r][k]);
}

template <int R, bool BF16>
void products(const float* u, const float* v, std::int64_t depth, std::int64_t lanes, float* m) {
    std::int64_t lane = 0;
    for (; lane + COLUMNS * LANES <= lanes; lane += COLUMNS * LANES)
        product<R, COLUMNS, BF16>(u, v + lane, depth, lanes, m + lane);
    for (; lane + 2 * LANES <= lanes; lane += 2 * LANES) product<R, 2, BF16>(u, v + lane, depth, lanes, m + lane);
    for (; lane < lanes; lane += LANES) product<R, 1, BF16>(u, v + lane, depth, lanes, m + lane);
}

// Rows first … last - 1 of one position's product, to m; first is a multiple of ROWS.
template <bool BF16>
void multiply(const float* u, const float* v, std::int64_t depth, std::int64_t lanes, std::int64_t first,
              std::int64_t last, float* m) {
    for (std::int64_t k = first; k < last; k += ROWS) {
        const float* rows = u + k * depth;
        float* to = m + (k - first) * lanes;
        switch (std::min<std::int64_t>(ROWS, last - k)) {
            case 6: products<6, BF16>(rows, v, depth, lanes, to); break;
            case 5: products<5, BF16>(rows, v, depth, lanes, to); break;
            case 4: products<4, BF16>(rows, v, depth, lanes, to); break;
            case 3: products<3, BF16>(rows, v, depth, lanes, to); break;
            case 2: products<2, BF16>(rows, v, depth, lanes, to); break;
            default: products<1, BF16>(rows, v, depth, lanes, to);
        }
    }
}

// Writes outputs first … last - 1 of a block from M.
template <int M, class Y>
void transform_outputs(const Convolution& layer, const Block& block, std::int64_t first, std::int64_t last,
                       const float* m, std::int64_t position_step) {
    constexpr int SIDE = Tile<M>::SIDE, POSITIONS = SIDE * SIDE;
    const std::int64_t plane = layer.height * layer.width;
    const bool narrow = block.columns < LANES;
    for (std::int64_t k = first; k < last; k++) {
        const std::int64_t map = (block.picture * layer.outputs + k) * plane;
        const float bias = layer.bias[(layer.bias_per_picture ? block.picture * layer.outputs : 0) + k];
        const Y* residual = layer.residual ? static_cast<const Y*>(layer.residual) + map : nullptr;
        Y* y = static_cast<Y*>(layer.y) + map;
        const auto tiles = [&](std::int64_t lane, Vector* out) {
            Vector in[POSITIONS], half[M * SIDE];
            for (int p = 0; p < POSITIONS; p++) in[p] = load(m + p * position_step + (k - first) * block.lanes + lane);
            for (int j = 0; j < SIDE; j++) Tile<M>::backward(in + j, SIDE, half + j, SIDE);
            for (int i = 0; i < M; i++) Tile<M>::backward(half + i * SIDE, 1, out + i * M, 1);
            for (int i = 0; i < M * M; i++) out[i] += bias;
        };
        if (narrow) {
            for (std::int64_t lane = 0; lane < block.lanes; lane += LANES) {
                Vector out[M * M];
                tiles(lane, out);
                const std::int64_t count = std::min<std::int64_t>(LANES, block.rows * block.columns - lane);
                for (std::int64_t l = 0; l < count; l++) {
                    const std::int64_t top = (block.row + (lane + l) / block.columns) * M;
                    const std::int64_t left = (block.column + (lane + l) % block.columns) * M;
                    for (int i = 0; i < M && top + i < layer.height; i++)
                        for (int j = 0; j < M && left + j < layer.width; j++) {
                            const std::int64_t at = (top + i) * layer.width + left + j;
                            put(y + at, out[i * M + j][l] + (residual ? widened(residual[at]) : 0.0f));
                        }
                }
            }
            continue;
        }
        for (std::int64_t r = 0; r < block.rows; r++)
            for (std::int64_t c = 0; c < block.columns; c += LANES) {
                const std::int64_t column = std::min(c, block.columns - LANES);
                Vector out[M * M];
                tiles(r * block.columns + column, out);
                const std::int64_t left = (block.column + column) * M;
                const std::int64_t count = std::min<std::int64_t>(M * LANES, layer.width - left);
                for (int i = 0; i < M; i++) {
                    const std::int64_t top = (block.row + r) * M + i;
                    if (top >= layer.height) break;
                    alignas(64) float line[M * LANES];
                    Tile<M>::line(out + i * M, line);
                    const std::int64_t at = top * layer.width + left;
                    std::int64_t l = 0;
                    for (; l + LANES <= count; l += LANES) {
                        const Vector sum = load(line + l);
                        store_floats(y + at + l, residual ? sum + load_as_floats(residual + at + l) : sum);
                    }
                    for (; l < count; l++) put(y + at + l, line[l] + (residual ? widened(residual[at + l]) : 0.0f));
                }
            }
    }
}

// Writes outputs first … last - 1 of a block of the doubled map from M, where each has four rows: for the pixels of
// even and odd columns of even rows, then of odd rows.
template <class Y>
void transform_doubled_outputs(const Convolution& layer, const Block& block, std::int64_t first, std::int64_t last,
                               const float* m, std::int64_t position_step) {
    constexpr int M = 3, SIDE = Tile<3>::SIDE, POSITIONS = SIDE * SIDE;
    const std::int64_t height = 2 * layer.height, width = 2 * layer.width;
    for (std::int64_t k = first; k < last; k++) {
        Y* y = static_cast<Y*>(layer.y) + (block.picture * layer.outputs + k) * height * width;
        const float bias = layer.bias[(layer.bias_per_picture ? block.picture * layer.outputs : 0) + k];
        for (std::int64_t lane = 0; lane < block.lanes; lane += LANES) {
            alignas(64) float pixels[2 * M][2 * M][LANES];
            for (int part = 0; part < 4; part++) {
                Vector in[POSITIONS], half[M * SIDE], out[M * M];
                const float* row = m + (4 * (k - first) + part) * block.lanes + lane;
                for (int p = 0; p < POSITIONS; p++) in[p] = load(row + p * position_step);
                for (int j = 0; j < SIDE; j++) Tile<M>::backward(in + j, SIDE, half + j, SIDE);
                for (int i = 0; i < M; i++) Tile<M>::backward(half + i * SIDE, 1, out + i * M, 1);
                for (int i = 0; i < M; i++)
                    for (int j = 0; j < M; j++)
                        store(pixels[2 * i + 1 - part / 2][2 * j + 1 - part % 2], out[i * M + j] + bias);
            }
            const std::int64_t count = std::min<std::int64_t>(LANES, block.rows * block.columns - lane);
            for (std::int64_t l = 0; l < count; l++) {
                const std::int64_t top = (block.row + (lane + l) / block.columns) * 2 * M - 1;
                const std::int64_t left = (block.column + (lane + l) % block.columns) * 2 * M - 1;
                const std::int64_t begin = left < 0 ? 1 : 0, end = std::min<std::int64_t>(2 * M, width - left);
                for (std::int64_t i = top < 0 ? 1 : 0; i < 2 * M && top + i < height; i++)
                    for (std::int64_t j = begin; j < end; j++) put(y + (top + i) * width + left + j, pixels[i][j][l]);
            }
        }
    }
}

template <int M, class T, bool BF16>
void compute(const Convolution& layer, int threads, const Parallel& parallel) {
    constexpr std::int64_t POSITIONS = Tile<M>::SIDE * Tile<M>::SIDE, TOGETHER = BF16 ? 2 : 1;
    const std::int64_t depth = layer.inputs / TOGETHER;
    const float* u = static_cast<const float*>(layer.weights);
    const std::vector<Block> blocks = blocks_of(layer);
    const auto count = static_cast<std::int64_t>(blocks.size());
    const std::int64_t parts = M == 3 ? 4 : 1, rows = parts * layer.outputs;  // of M, and of the weights
    // Outputs are computed some at a time, so that their part of M stays in the cache too.
    const std::int64_t fit = CACHED / (4 * POSITIONS * BLOCK * parts) / ROWS * ROWS;
    const std::int64_t chunk = std::min(layer.outputs, std::max<std::int64_t>(ROWS, fit));
    const std::int64_t v_size = POSITIONS * (depth * BLOCK + PAD), weights = rows * depth;
    const auto transform_back = [&](const Block& block, std::int64_t first, std::int64_t last, const float* m) {
        const std::int64_t position_step = parts * (last - first) * block.lanes + PAD;
        if constexpr (M == 3)
            transform_doubled_outputs<T>(layer, block, first, last, m, position_step);
        else
            transform_outputs<M, T>(layer, block, first, last, m, position_step);
    };
    const auto outputs_of = [&](const Block& block, std::int64_t first, std::int64_t last, const float* v, float* m) {
        const std::int64_t m_step = parts * (last - first) * block.lanes + PAD;
        for (std::int64_t p = 0; p < POSITIONS; p++)
            multiply<BF16>(u + p * weights, v + p * (depth * block.lanes + PAD), depth, block.lanes, parts * first,
                           parts * last, m + p * m_step);
        transform_back(block, first, last, m);
    };

    const bool large = 4 * POSITIONS * weights > LARGE && 4 * count * v_size < FITS;
    if (!large && (count >= 2 * threads || threads == 1)) {  // each thread has blocks of its own
        parallel(count, [&](std::int64_t b) {
            const Scratch scratch(v_size + POSITIONS * (parts * chunk * BLOCK + PAD));
            float *v = scratch.data(), *m = v + v_size;
            transform_inputs<M, T, BF16>(layer, blocks[b], 0, layer.inputs, v);
            for (std::int64_t k = 0; k < layer.outputs; k += chunk)
                outputs_of(blocks[b], k, std::min(layer.outputs, k + chunk), v, m);
        });
        return;
    }
    // Of a small map, and where weights would have to be read from memory for each block, V is made for the whole map,
    // and each thread has outputs of its own.
    const Scratch scratch(count * v_size);
    float* v = scratch.data();
    const auto share = [&](std::int64_t channels, std::int64_t size, const auto& work) {
        parallel((channels + size - 1) / size, [&](std::int64_t task) {
            work(task * size, std::min(channels, task * size + size));
        });
    };
    share(layer.inputs, 16, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t b = 0; b < count; b++)
            transform_inputs<M, T, BF16>(layer, blocks[b], first, last, v + b * v_size);
    });
    const std::int64_t part = std::min(chunk, (layer.outputs / (8 * threads) + ROWS) / ROWS * ROWS);
    share(layer.outputs, part, [&](std::int64_t first, std::int64_t last) {
        const Scratch m(POSITIONS * (parts * part * BLOCK + PAD));
        for (std::int64_t b = 0; b < count; b++) outputs_of(blocks[b], first, last, v + b * v_size, m.data());
    });
}

template <class T, bool BF16>
void by_tile(const Convolution& layer, int threads, const Parallel& parallel) {
    if (layer.tile == 2) return compute<2, T, BF16>(layer, threads, parallel);
    if (layer.tile == 3) return compute<3, T, BF16>(layer, threads, parallel);
    return compute<4, T, BF16>(layer, threads, parallel);
}

template <bool BF16>
void by_type(const Convolution& layer, int threads, const Parallel& parallel) {
    if (layer.type == Type::f32) return by_tile<float, BF16>(layer, threads, parallel);
    return by_tile<Bf16, BF16>(layer, threads, parallel);
}

}  // namespace

void WINOGRAD_FUNCTION(const Convolution& layer, int threads, const Parallel& parallel) {
#if defined(__AVX512BF16__)
    if (layer.products == Type::bf16) return by_type<true>(layer, threads, parallel);
#endif
    by_type<false>(layer, threads, parallel);
}

}  // namespace lcm
