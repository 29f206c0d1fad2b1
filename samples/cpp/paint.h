// Prompt and adapter -> picture, by the scheduler's own steps. For bundles with the loop's parts.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "trainer.h"

namespace edge_dit {

/// A square picture, three bytes a pixel, by rows.
struct Picture {
    std::int64_t side = 0;
    std::vector<unsigned char> rgb;
};

struct Request {
    Path bundle;
    std::optional<Path> run;  // whose adapter is used, as last saved; none: the untrained model
    std::string prompt;       // one that was encoded at export
    std::optional<std::string> negative;  // likewise; none: the bundle's
    std::uint64_t seed = 0;
    Runtime runtime;
};

/// Paint a picture. Throws `BadInput` if the bundle cannot, lacks the prompt, or the run is of
/// another bundle. `advance` is called after every step with the number of steps done, and of all.
Picture paint(const Request& request, const std::function<void(std::size_t, std::size_t)>& advance);

/// Write a picture as PNG, whole or not at all.
void write_png(const Path& path, const Picture& picture);

}  // namespace edge_dit
