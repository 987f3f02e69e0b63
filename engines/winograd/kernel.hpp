// A 3×3 convolution of stride 1 and padding 1 by Winograd's minimal filtering, on planar maps; or one of a map that
// is doubled first, each pixel becoming four.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>

namespace lcm {

constexpr int ROWS = 6;  // outputs that the innermost product computes at once, and whose weights lie together

struct Bf16 {
    std::uint16_t bits;
};

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline Bf16 rounded(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

enum class Type : int { f32, bf16 };

// Calls a function with 0 … count - 1, in any order, on any thread.
using Parallel = std::function<void(std::int64_t count, const std::function<void(std::int64_t)>&)>;

struct Convolution {
    std::int64_t pictures, inputs, outputs, height, width;  // height and width are those of x
    std::int64_t tile;                // 2 or 4: m of F(m×m, 3×3). 3: F(3×3, 2×2) of a map that is doubled
    Type type;                        // of x, residual and y
    Type products;                    // what the transformed tiles and weights are multiplied in; sums are in fp32
    const void* x;                    // pictures × inputs × height × width
    const void* weights;              // as weights.cpp packs them
    const float* bias;                // outputs, or pictures × outputs
    bool bias_per_picture;
    const void* residual;             // null, or what is added to y, of y's shape; null if tile is 3
    void* y;                          // pictures × outputs × height × width, or twice both if tile is 3
};

// Computes y = conv(x) + bias + residual on this many threads. One function an instruction set.
using Compute = void (*)(const Convolution&, int threads, const Parallel&);
void winograd_avx2(const Convolution&, int threads, const Parallel&);
void winograd_avx512(const Convolution&, int threads, const Parallel&);
void winograd_avx512_bf16(const Convolution&, int threads, const Parallel&);

}  // namespace lcm
