// Compares the Winograd kernels with a direct convolution in float64 over random layers; run under sanitizers.
//
// Inputs, weights and results are in memory of exactly their size, so that a read or write beside it is reported.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernel.hpp"

extern "C" void winograd_pack(const float*, std::int64_t, std::int64_t, std::int64_t, int, void*);

namespace {

std::mt19937 generator(0);

std::int64_t between(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}

std::vector<float> numbers(std::int64_t count, double scale = 1) {
    std::normal_distribution<float> normal(0, static_cast<float>(scale));
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

float widened(lcm::Bf16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// The four 2×2 filters of each 3×3 one, for the even and odd pixels of a map that is doubled: sums of its weights.
std::vector<float> corners_of(const std::vector<float>& w, std::int64_t outputs, std::int64_t inputs) {
    std::vector<float> corners(outputs * 4 * inputs * 4);
    for (std::int64_t k = 0; k < outputs; k++)
        for (std::int64_t c = 0; c < inputs; c++)
            for (int row = 0; row < 2; row++)
                for (int column = 0; column < 2; column++)
                    for (int a = 0; a < 3; a++)
                        for (int b = 0; b < 3; b++)
                            corners[(((k * 4 + row * 2 + column) * inputs + c) * 2 + (a + 1 - row) / 2) * 2 +
                                    (b + 1 - column) / 2] += w[(k * inputs + c) * 9 + a * 3 + b];
    return corners;
}

// The signal-to-noise ratio of one random layer in dB.
double check(lcm::Compute kernel, std::int64_t tile, bool bf16_products, bool bf16_maps) {
    const std::int64_t pictures = between(1, 2), inputs = 2 * between(1, 6), outputs = between(1, 20);
    const std::int64_t height = between(1, 40), width = between(1, between(0, 3) ? 40 : 300);
    const std::int64_t threads = between(1, 3), pixels = height * width;
    const bool per_picture = between(0, 1), with_residual = tile != 3 && between(0, 1);
    std::vector<float> x = numbers(pictures * inputs * pixels), residual = numbers(pictures * outputs * pixels);
    const std::vector<float> w = numbers(outputs * inputs * 9, 1 / std::sqrt(9.0 * inputs));
    const bool doubled = tile == 3;
    const std::int64_t scale = doubled ? 2 : 1, all = pixels * scale * scale;
    const std::vector<float> bias = numbers(per_picture ? pictures * outputs : outputs);
    std::vector<lcm::Bf16> x16, residual16, y16(pictures * outputs * pixels * (tile == 3 ? 4 : 1));
    for (float& value : x) x16.push_back(lcm::rounded(value));
    for (float& value : residual) residual16.push_back(lcm::rounded(value));
    if (bf16_maps) {
        for (std::size_t i = 0; i < x.size(); i++) x[i] = widened(x16[i]);
        for (std::size_t i = 0; i < residual.size(); i++) residual[i] = widened(residual16[i]);
    }
    const std::int64_t words = (doubled ? 64 : (tile + 2) * (tile + 2)) * outputs * inputs / (bf16_products ? 2 : 1);
    std::vector<float> packed(words), y(pictures * outputs * all, NAN);
    const std::vector<float> corners = doubled ? corners_of(w, outputs, inputs) : w;
    winograd_pack(corners.data(), outputs * scale * scale, inputs, tile, bf16_products, packed.data());
    lcm::Convolution layer{};
    layer.pictures = pictures, layer.inputs = inputs, layer.outputs = outputs;
    layer.height = height, layer.width = width, layer.tile = tile;
    layer.type = bf16_maps ? lcm::Type::bf16 : lcm::Type::f32;
    layer.products = bf16_products ? lcm::Type::bf16 : lcm::Type::f32;
    layer.x = bf16_maps ? static_cast<const void*>(x16.data()) : x.data();
    layer.weights = packed.data(), layer.bias = bias.data(), layer.bias_per_picture = per_picture;
    if (with_residual) layer.residual = bf16_maps ? static_cast<const void*>(residual16.data()) : residual.data();
    layer.y = bf16_maps ? static_cast<void*>(y16.data()) : y.data();
    kernel(layer, static_cast<int>(threads), [](std::int64_t count, const auto& work) {
        for (std::int64_t i = count; i-- > 0;) work(i);
    });

    double signal = 0, noise = 0;
    for (std::int64_t n = 0; n < pictures; n++)
        for (std::int64_t k = 0; k < outputs; k++)
            for (std::int64_t i = 0; i < scale * height; i++)
                for (std::int64_t j = 0; j < scale * width; j++) {
                    double sum = bias[(per_picture ? n * outputs : 0) + k];
                    for (std::int64_t c = 0; c < inputs; c++)
                        for (std::int64_t a = std::max<std::int64_t>(0, 1 - i); a < 3 && i + a - 1 < scale * height; a++)
                            for (std::int64_t b = std::max<std::int64_t>(0, 1 - j); b < 3 && j + b - 1 < scale * width; b++)
                                sum += static_cast<double>(w[(k * inputs + c) * 9 + a * 3 + b]) *
                                       x[(n * inputs + c) * pixels + (i + a - 1) / scale * width + (j + b - 1) / scale];
                    const std::int64_t at = (n * outputs + k) * all + i * scale * width + j;
                    if (with_residual) sum += residual[at];
                    const double error = sum - (bf16_maps ? widened(y16[at]) : y[at]);
                    signal += sum * sum, noise += error * error;
                }
    return noise == 0 ? 200 : 10 * std::log10(signal / noise);  // NaN fails every comparison
}

int failures = 0;

void require(const char* name, lcm::Compute kernel, std::int64_t tile, bool products, bool maps, double floor) {
    double worst = 200;
    for (int i = 0; i < 10; i++) {
        const double db = check(kernel, tile, products, maps);
        if (!(db >= worst)) worst = db;
    }
    std::printf("%s, F%d, products in %s, maps in %s: %.1f dB, needs %.0f\n", name, static_cast<int>(tile),
                products ? "bf16" : "fp32", maps ? "bf16" : "fp32", worst, floor);
    if (!(worst >= floor)) failures++;
}

}  // namespace

int main() {
    for (std::int64_t tile : {2, 3, 4}) {
        const double fp32 = tile == 4 ? 105 : 120, bf16 = tile == 4 ? 28 : 44;
        for (bool maps : {false, true}) {
            require("avx2", lcm::winograd_avx2, tile, false, maps, maps ? 48 : fp32);
            if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
                require("avx512", lcm::winograd_avx512, tile, false, maps, maps ? 48 : fp32);
            if (__builtin_cpu_supports("avx512bf16"))
                require("avx512_bf16", lcm::winograd_avx512_bf16, tile, true, maps, bf16);
        }
    }
    return failures;
}
