// Random numbers by contract (docs/noise.md).
#pragma once

#include <cstdint>
#include <vector>

namespace edge_dit {

/// Streams of a seed.
enum class Stream : std::uint32_t { crop = 0, posterior = 1, noise = 2, order = 3 };

/// The first `count` words of a seed's stream.
std::vector<std::uint32_t> words(std::uint64_t seed, Stream stream, std::size_t count);

/// Standard normal numbers.
std::vector<float> normal(std::uint64_t seed, Stream stream, std::size_t count);

/// The seed of draw or epoch `number` of a seed.
std::uint64_t seed_of(std::uint64_t seed, std::uint64_t number);

/// Numbers 0 to count - 1 in the order of an epoch.
std::vector<std::size_t> permutation(std::size_t count, std::uint64_t seed, std::uint64_t epoch);

}  // namespace edge_dit
