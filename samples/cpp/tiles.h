// The transformer's latents as the autoencoder takes them, and large ones piece by piece.
#pragma once

#include <cstdint>
#include <functional>

#include "bundle.h"
#include "tensors.h"

namespace edge_dit {

/// The autoencoder's latents [1, C, side, side] of the transformer's.
Tensor unpacked(const Tensor& latents, const Latents& facts, std::int64_t side);

/// What `run` makes of an image [1, C, H, W], `scale` times larger, tile by tile, so that memory is
/// bounded. Where tiles overlap: their mean, weighted by how far a place is from each tile's border.
///
/// `tile`: longest side of a tile.
Tensor enlarged_by_tiles(const Tensor& image, const std::function<Tensor(const Tensor&)>& run,
                         std::int64_t tile, std::int64_t scale);

}  // namespace edge_dit
