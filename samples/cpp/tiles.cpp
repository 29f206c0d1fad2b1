#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "fault.h"

namespace edge_dit {

namespace {

constexpr std::int64_t kOverlap = 4;  // a tile shares one part in this many with its neighbour

/// Where tiles begin along a side, as evenly as whole numbers allow.
std::vector<std::int64_t> starts_of(std::int64_t size, std::int64_t tile) {
    if (size <= tile) return {0};
    const std::int64_t stride = std::max<std::int64_t>(1, tile - tile / kOverlap);
    const std::int64_t count = (size - tile + stride - 1) / stride + 1;
    std::vector<std::int64_t> starts;
    for (std::int64_t i = 0; i < count; ++i) {
        const auto start = static_cast<std::int64_t>(
            std::nearbyint(double(i * (size - tile)) / double(count - 1)));
        if (starts.empty() || starts.back() != start) starts.push_back(start);
    }
    return starts;
}

/// Weights along a side of a tile, rising from its ends to a quarter of it.
std::vector<float> ramp(std::int64_t size, bool alone) {
    std::vector<float> weights(static_cast<std::size_t>(size), 1.0f);
    const auto quarter = static_cast<float>(std::max<std::int64_t>(1, size / kOverlap));
    for (std::int64_t i = 0; !alone && i < size; ++i) {
        const float inwards = static_cast<float>(std::min(i, size - 1 - i)) + 0.5f;
        weights[static_cast<std::size_t>(i)] = std::min(inwards / quarter, 1.0f);
    }
    return weights;
}

/// Call `visit(channel, row, column, number of the value)` for all of a [1, C, H, W].
template <class Visit>
void each_value(const Shape& shape, Visit visit) {
    std::size_t number = 0;
    for (std::int64_t c = 0; c < shape[1]; ++c)
        for (std::int64_t y = 0; y < shape[2]; ++y)
            for (std::int64_t x = 0; x < shape[3]; ++x) visit(c, y, x, number++);
}

}  // namespace

Tensor unpacked(const Tensor& latents, const Latents& facts, std::int64_t side) {
    const std::int64_t channels = facts.channels();
    Tensor raw({1, channels, side, side});
    if (raw.values.size() != latents.values.size())
        throw Malformed("latents of shape " + in_words(latents.shape));
    each_value(raw.shape, [&](std::int64_t c, std::int64_t y, std::int64_t x, std::size_t number) {
        const std::int64_t token = y / 2 * (side / 2) + x / 2;
        const std::int64_t within = 4 * c + y % 2 * 2 + x % 2;
        const auto packed = static_cast<std::size_t>(token * 4 * channels + within);
        const float value = latents.values[facts.packed ? packed : number];
        const auto channel = static_cast<std::size_t>(facts.of_tokens ? within : c);
        raw.values[number] = value / facts.scale[channel] + facts.shift[channel];
    });
    return raw;
}

Tensor enlarged_by_tiles(const Tensor& image, const std::function<Tensor(const Tensor&)>& run,
                         std::int64_t tile, std::int64_t scale) {
    const std::int64_t height = image.shape[2], width = image.shape[3];
    const auto rows = starts_of(height, tile), columns = starts_of(width, tile);
    if (rows.size() == 1 && columns.size() == 1) return run(image);
    Tensor part({1, image.shape[1], std::min(height, tile), std::min(width, tile)});
    const auto down = ramp(part.shape[2] * scale, rows.size() == 1);
    const auto across = ramp(part.shape[3] * scale, columns.size() == 1);
    Tensor sums, weights({1, 1, height * scale, width * scale});
    const auto place = [&](std::int64_t y, std::int64_t x) {
        return static_cast<std::size_t>(y * width * scale + x);
    };
    const std::size_t area = weights.values.size();
    for (const std::int64_t top : rows) {
        for (const std::int64_t left : columns) {
            each_value(part.shape, [&](std::int64_t c, std::int64_t y, std::int64_t x, std::size_t n) {
                part.values[n] = image.values[static_cast<std::size_t>(
                    (c * height + top + y) * width + left + x)];
            });
            const Tensor made = run(part);
            if (made.shape.size() != 4 || made.shape[2] != part.shape[2] * scale ||
                made.shape[3] != part.shape[3] * scale)
                throw Malformed("a tile of shape " + in_words(made.shape));
            if (sums.values.empty())
                sums = Tensor({1, made.shape[1], height * scale, width * scale});
            each_value(made.shape, [&](std::int64_t c, std::int64_t y, std::int64_t x, std::size_t n) {
                const float weight = down[static_cast<std::size_t>(y)] *
                                     across[static_cast<std::size_t>(x)];
                const std::size_t at = place(top * scale + y, left * scale + x);
                sums.values[static_cast<std::size_t>(c) * area + at] += made.values[n] * weight;
                if (c == 0) weights.values[at] += weight;
            });
        }
    }
    for (std::size_t i = 0; i < sums.values.size(); ++i) sums.values[i] /= weights.values[i % area];
    return sums;
}

}  // namespace edge_dit
