// Transforms the weights of a 3×3 convolution and packs them as kernel.cpp reads them. Runs once, at build.
#include <algorithm>
#include <cstring>

#include "kernel.hpp"

namespace lcm {
namespace {

// The G of F(2×2, 3×3) and F(4×4, 3×3); see kernel.cpp for the source.
constexpr double G2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double G4[6][3] = {{1.0 / 4, 0, 0},
                             {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                             {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                             {1.0 / 24, 1.0 / 12, 1.0 / 6},
                             {1.0 / 24, -1.0 / 12, 1.0 / 6},
                             {0, 0, 1}};

template <int SIDE>
void pack(const double (&g)[SIDE][3], const float* weights, std::int64_t outputs, std::int64_t inputs, bool bf16,
          void* packed) {
    const std::int64_t together = bf16 ? 2 : 1, depth = inputs / together;
    for (std::int64_t k = 0; k < outputs; k++) {
        const std::int64_t first = k / ROWS * ROWS, rows = std::min<std::int64_t>(ROWS, outputs - first);
        for (std::int64_t c = 0; c < inputs; c++) {
            const float* w = weights + (k * inputs + c) * 9;
            double half[SIDE][3];
            for (int i = 0; i < SIDE; i++)
                for (int b = 0; b < 3; b++) half[i][b] = g[i][0] * w[b] + g[i][1] * w[3 + b] + g[i][2] * w[6 + b];
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) {
                    const auto value = static_cast<float>(half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2]);
                    const std::int64_t position = (i * SIDE + j) * outputs * depth;
                    const std::int64_t word = position + first * depth + c / together * rows + (k - first);
                    if (bf16)
                        static_cast<Bf16*>(packed)[2 * word + c % 2] = rounded(value);
                    else
                        static_cast<float*>(packed)[word] = value;
                }
        }
    }
}

}  // namespace
}  // namespace lcm

// Writes (tile + 2)² matrices G w Gᵀ, one for each position. In each, ROWS outputs lie together, or the rest of
// them: [input][output], where an input is a float, or two inputs are a pair of bfloat16.
extern "C" __attribute__((visibility("default"))) void winograd_pack(const float* weights, std::int64_t outputs,
                                                                     std::int64_t inputs, std::int64_t tile,
                                                                     int bf16, void* packed) {
    if (tile == 2)
        lcm::pack(lcm::G2, weights, outputs, inputs, bf16 != 0, packed);
    else
        lcm::pack(lcm::G4, weights, outputs, inputs, bf16 != 0, packed);
}
