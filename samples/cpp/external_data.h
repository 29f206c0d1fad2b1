// Which other files an ONNX file refers to.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace edge_dit {

/// Locations of all external tensors of a serialised ONNX model. Only the fields that lead to them
/// are decoded, so no protobuf library is needed. Throws `Malformed`.
std::set<std::string> external_locations(std::string_view model);

}  // namespace edge_dit
