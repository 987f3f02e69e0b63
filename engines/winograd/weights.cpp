// Transforms the weights of a convolution and packs them as kernel.cpp reads them. Runs once, at build.
#include <algorithm>
#include <cstring>

#include "kernel.hpp"

namespace lcm {
namespace {

// The G of F(2×2, 3×3), F(3×3, 2×2) and F(4×4, 3×3); see kernel.cpp for the source.
constexpr double G2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double G3[4][2] = {{1, 0}, {0.5, 0.5}, {0.5, -0.5}, {0, 1}};
constexpr double G4[6][3] = {{1.0 / 4, 0, 0},
                             {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                             {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                             {1.0 / 24, 1.0 / 12, 1.0 / 6},
                             {1.0 / 24, -1.0 / 12, 1.0 / 6},
                             {0, 0, 1}};

template <int SIDE, int TAPS>
void pack(const double (&g)[SIDE][TAPS], const float* weights, std::int64_t outputs, std::int64_t inputs, bool bf16,
          void* packed) {
    const std::int64_t together = bf16 ? 2 : 1, depth = inputs / together;
    for (std::int64_t k = 0; k < outputs; k++) {
        const std::int64_t first = k / ROWS * ROWS, rows = std::min<std::int64_t>(ROWS, outputs - first);
        for (std::int64_t c = 0; c < inputs; c++) {
            const float* w = weights + (k * inputs + c) * TAPS * TAPS;
            double half[SIDE][TAPS] = {};
            for (int i = 0; i < SIDE; i++)
                for (int a = 0; a < TAPS; a++)
                    for (int b = 0; b < TAPS; b++) half[i][b] += g[i][a] * w[a * TAPS + b];
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) {
                    double value = 0;
                    for (int b = 0; b < TAPS; b++) value += half[i][b] * g[j][b];
                    const std::int64_t position = (i * SIDE + j) * outputs * depth;
                    const std::int64_t word = position + first * depth + c / together * rows + (k - first);
                    if (bf16)
                        static_cast<Bf16*>(packed)[2 * word + c % 2] = rounded(static_cast<float>(value));
                    else
                        static_cast<float*>(packed)[word] = static_cast<float>(value);
                }
        }
    }
}

}  // namespace
}  // namespace lcm

// Packs weights (outputs, inputs, 3, 3), or for tile 3 (4 * outputs, inputs, 2, 2): those of an output's four 2×2
// convolutions lie together. Writes matrices G w Gᵀ, one for each position. In each, ROWS outputs lie together, or
// the rest of them: [input][output], where an input is a float, or two inputs are a pair of bfloat16.
extern "C" __attribute__((visibility("default"))) void winograd_pack(const float* weights, std::int64_t outputs,
                                                                     std::int64_t inputs, std::int64_t tile,
                                                                     int bf16, void* packed) {
    if (tile == 2)
        lcm::pack(lcm::G2, weights, outputs, inputs, bf16 != 0, packed);
    else if (tile == 3)
        lcm::pack(lcm::G3, weights, outputs, inputs, bf16 != 0, packed);
    else
        lcm::pack(lcm::G4, weights, outputs, inputs, bf16 != 0, packed);
}
