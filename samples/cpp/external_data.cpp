#include "external_data.h"

#include <cstdint>

#include "fault.h"

namespace edge_dit {

namespace {

constexpr int kMostLevels = 100;  // protobuf's own limit

enum class Message { model, training, function, graph, node, attribute, sparse, tensor, entry, none };

/// The message in a field, if it may lead to external data (onnx.proto3).
Message child(Message parent, std::uint64_t field) {
    switch (parent) {
        case Message::model:
            return field == 7    ? Message::graph
                   : field == 20 ? Message::training
                   : field == 25 ? Message::function
                                 : Message::none;
        case Message::training:
            return field == 1 || field == 2 ? Message::graph : Message::none;
        case Message::function:
            return field == 7 ? Message::node : field == 11 ? Message::attribute : Message::none;
        case Message::graph:
            return field == 1    ? Message::node
                   : field == 5  ? Message::tensor
                   : field == 15 ? Message::sparse
                                 : Message::none;
        case Message::node: return field == 5 ? Message::attribute : Message::none;
        case Message::attribute:
            return field == 5 || field == 10   ? Message::tensor
                   : field == 6 || field == 11 ? Message::graph
                   : field == 22 || field == 23 ? Message::sparse
                                                : Message::none;
        case Message::sparse: return field == 1 || field == 2 ? Message::tensor : Message::none;
        case Message::tensor: return field == 13 ? Message::entry : Message::none;
        default: return Message::none;
    }
}

std::uint64_t varint(std::string_view& bytes) {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (bytes.empty()) throw Malformed("it ends within a number");
        const auto byte = static_cast<unsigned char>(bytes[0]);
        bytes.remove_prefix(1);
        if (shift < 64) value |= std::uint64_t(byte & 0x7F) << shift;
        if (byte < 0x80) return value;
    }
    throw Malformed("a number of more than 64 bits");
}

/// Take the next field of a message: its number, and its bytes if it has any.
std::pair<std::uint64_t, std::string_view> next_field(std::string_view& bytes) {
    const std::uint64_t tag = varint(bytes);
    std::uint64_t size = 0;
    switch (tag & 7) {
        case 0: varint(bytes); return {0, {}};
        case 1: size = 8; break;
        case 2: size = varint(bytes); break;
        case 5: size = 4; break;
        default: throw Malformed("a field of an unknown type");
    }
    if (size > bytes.size()) throw Malformed("it ends within a field");
    const std::string_view part = bytes.substr(0, size);
    bytes.remove_prefix(size);
    return {(tag & 7) == 2 ? tag >> 3 : 0, part};
}

void search(Message kind, std::string_view bytes, int level, std::set<std::string>& locations) {
    if (level > kMostLevels) throw Malformed("nested too deep");
    std::string_view key, value;
    while (!bytes.empty()) {
        const auto [number, part] = next_field(bytes);
        if (kind == Message::entry) {
            if (number == 1) key = part;
            if (number == 2) value = part;
        } else if (const Message inner = child(kind, number); inner != Message::none) {
            search(inner, part, level + 1, locations);
        }
    }
    if (kind == Message::entry && key == "location") locations.emplace(value);
}

}  // namespace

std::set<std::string> external_locations(std::string_view model) {
    std::set<std::string> locations;
    search(Message::model, model, 0, locations);
    return locations;
}

}  // namespace edge_dit
