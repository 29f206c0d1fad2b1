#include "noise.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace edge_dit {

namespace {

/// A block of four words: Philox 4x32-10.
std::array<std::uint32_t, 4> philox(std::uint64_t block, Stream stream, std::uint64_t seed) {
    auto low = static_cast<std::uint32_t>(seed), high = static_cast<std::uint32_t>(seed >> 32);
    std::array<std::uint32_t, 4> c = {static_cast<std::uint32_t>(block),
                                      static_cast<std::uint32_t>(block >> 32),
                                      static_cast<std::uint32_t>(stream), 0};
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53} * c[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57} * c[2];
        c = {static_cast<std::uint32_t>(second >> 32) ^ c[1] ^ low,
             static_cast<std::uint32_t>(second),
             static_cast<std::uint32_t>(first >> 32) ^ c[3] ^ high,
             static_cast<std::uint32_t>(first)};
        low += 0x9E3779B9;
        high += 0xBB67AE85;
    }
    return c;
}

}  // namespace

std::vector<std::uint32_t> words(std::uint64_t seed, Stream stream, std::size_t count) {
    std::vector<std::uint32_t> all;
    for (std::uint64_t block = 0; all.size() < count; ++block)
        for (const std::uint32_t word : philox(block, stream, seed)) all.push_back(word);
    all.resize(count);
    return all;
}

std::vector<float> normal(std::uint64_t seed, Stream stream, std::size_t count) {
    constexpr double kUnit = 1.0 / 4294967296.0, kPi = 3.141592653589793;
    const std::vector<std::uint32_t> drawn = words(seed, stream, count + count % 2);
    std::vector<float> numbers;
    for (std::size_t i = 0; i < drawn.size(); i += 2) {  // Box and Muller
        const double radius = std::sqrt(-2.0 * std::log((drawn[i] + 1.0) * kUnit));
        const double angle = 2.0 * kPi * kUnit * drawn[i + 1];
        numbers.push_back(static_cast<float>(radius * std::cos(angle)));
        numbers.push_back(static_cast<float>(radius * std::sin(angle)));
    }
    numbers.resize(count);
    return numbers;
}

std::uint64_t seed_of(std::uint64_t seed, std::uint64_t number) {
    const auto block = philox(number, Stream::order, seed);
    return block[0] | static_cast<std::uint64_t>(block[1] & 0x1FFFFF) << 32;
}

std::vector<std::size_t> permutation(std::size_t count, std::uint64_t seed, std::uint64_t epoch) {
    const auto keys = words(seed_of(seed, epoch), Stream::order, count);
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t one, std::size_t other) { return keys[one] < keys[other]; });
    return order;
}

}  // namespace edge_dit
