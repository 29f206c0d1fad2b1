#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fault.h"
#include "json.h"
#include "sha256.h"

namespace edge_dit {

namespace {

constexpr std::size_t kHeaderLimit = std::size_t{2} << 20;
constexpr std::size_t kMostDimensions = 8;
constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 48;
constexpr std::size_t kAlignment = 8;
const std::string kDigest = "sha256";

struct DtypeFacts {
    Dtype dtype;
    const char* name;   // in a safetensors header
    const char* numpy;  // in the text that the digest of a header is made of
    std::size_t bytes;
};
constexpr DtypeFacts kDtypes[] = {
    {Dtype::f64, "F64", "<f8", 8}, {Dtype::f32, "F32", "<f4", 4}, {Dtype::f16, "F16", "<f2", 2},
    {Dtype::i64, "I64", "<i8", 8}, {Dtype::i32, "I32", "<i4", 4}, {Dtype::i8, "I8", "|i1", 1},
    {Dtype::u8, "U8", "|u1", 1},   {Dtype::boolean, "BOOL", "|b1", 1}};

const DtypeFacts& facts_of(Dtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

Dtype dtype_named(const std::string& name) {
    for (const DtypeFacts& facts : kDtypes)
        if (name == facts.name) return facts.dtype;
    throw Malformed("dtype " + name.substr(0, 20));
}

Json list_of(const Shape& shape) {
    Json list = Json::list();
    for (const std::int64_t size : shape) list.add(Json::of_whole(size));
    return list;
}

/// The digest of a header: of its metadata without this digest, and of each dtype and shape.
std::string seal(const TensorFile::Metadata& metadata, const std::map<std::string, View>& tensors) {
    Json entries = Json::object(), kinds = Json::object(), both = Json::list();
    for (const auto& [key, value] : metadata)
        if (key != kDigest) entries.add(key, Json::of(value));
    for (const auto& [name, view] : tensors) {
        Json kind = Json::list();
        kind.add(Json::of(facts_of(view.dtype).numpy));
        kind.add(list_of(view.shape));
        kinds.add(name, std::move(kind));
    }
    both.add(std::move(entries));
    both.add(std::move(kinds));
    return json_digest(both);
}

std::string digest_of(const View& view) {
    return sha256_hex({static_cast<const char*>(view.data), view.bytes()});
}

/// The value of a float16. Every one is a float32.
float widened(std::uint16_t half) {
    const int exponent = half >> 10 & 0x1F;
    const auto mantissa = static_cast<float>(half & 0x3FF);
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 0x1F) return mantissa != 0 ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, -24);
    return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

}  // namespace

std::size_t bytes_of(Dtype dtype) { return facts_of(dtype).bytes; }

std::size_t count_of(const Shape& shape) {
    std::uint64_t count = 1;
    for (const std::int64_t size : shape) {
        if (size < 0 || (size > 0 && count > kMostBytes / static_cast<std::uint64_t>(size)))
            throw Malformed("shape " + in_words(shape));
        count *= static_cast<std::uint64_t>(size);
    }
    return count;
}

std::string in_words(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t size : shape)
        text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

bool Tensor::finite() const {
    return std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); });
}

bool all_finite(const Tensors& tensors) {
    return std::all_of(tensors.begin(), tensors.end(), [](auto& tensor) { return tensor.finite(); });
}

Tensor as_float32(const View& view) {
    Tensor tensor(view.shape);
    if (view.dtype == Dtype::f32) {
        std::memcpy(tensor.values.data(), view.data, view.bytes());
    } else if (view.dtype == Dtype::f16) {
        const auto* bytes = static_cast<const char*>(view.data);
        for (float& value : tensor.values) {
            std::uint16_t half;
            std::memcpy(&half, bytes, sizeof half);
            bytes += sizeof half;
            value = widened(half);
        }
    } else {
        throw Malformed(std::string("dtype ") + facts_of(view.dtype).name);
    }
    return tensor;
}

// ---------------------------------------------------------------- reading

TensorFile::TensorFile(const Path& path) : file_(path) {
    std::uint64_t length = 0;
    if (file_.size() >= 8)
        for (int i = 7; i >= 0; --i) length = length << 8 | std::uint8_t(file_.data()[i]);
    if (file_.size() < 8 || length > kHeaderLimit || length > file_.size() - 8)
        throw Malformed("a header of " + std::to_string(length) + " bytes in a file of " +
                        std::to_string(file_.size()));
    std::vector<std::pair<std::uint64_t, std::uint64_t>> places;
    const std::uint64_t size = file_.size() - 8 - length;
    const char* start = file_.data() + 8 + length;
    const Json header = parse_json({file_.data() + 8, length});
    for (const auto& [name, entry] : header.members()) {
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.members())
                metadata_.emplace_back(key, value.text());
            continue;
        }
        View view;
        view.dtype = dtype_named(entry.at("dtype").text());
        for (const Json& side : entry.at("shape").items())
            view.shape.push_back(std::int64_t(side.natural(kMostBytes)));
        const auto& offsets = entry.at("data_offsets").items();
        if (offsets.size() != 2 || view.shape.size() > kMostDimensions)
            throw Malformed("'" + name.substr(0, 80) + "' has no place or too many sides");
        const auto begin = offsets[0].natural(kMostBytes), end = offsets[1].natural(kMostBytes);
        if (begin > end || end > size || end - begin != view.bytes())
            throw Malformed("'" + name.substr(0, 80) + "' of shape " + in_words(view.shape) +
                            " at " + std::to_string(begin) + " to " + std::to_string(end));
        view.data = start + begin;
        places.emplace_back(begin, end);
        tensors_.emplace(name, std::move(view));
    }
    std::sort(places.begin(), places.end());
    std::uint64_t end = 0;
    for (const auto& place : places) {
        if (place.first != end) throw Malformed("tensors with gaps, or over each other");
        end = place.second;
    }
    if (end != size)
        throw Malformed("its header accounts for " + std::to_string(end) + " of " +
                        std::to_string(size) + " bytes");
    const std::string* sealed = find(kDigest);
    if (sealed && *sealed != seal(metadata_, tensors_))
        throw Malformed("the header is not the one that was written");
}

const std::string* TensorFile::find(std::string_view key) const {
    for (const auto& [name, value] : metadata_)
        if (name == key) return &value;
    return nullptr;
}

const View& TensorFile::checked(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw Malformed("no tensor '" + name.substr(0, 80) + "'");
    if (hashed()) {
        const std::string* written = find(kDigest + "." + name);
        if (!written || *written != digest_of(found->second))
            throw Malformed("'" + name.substr(0, 80) + "' is not what was written");
    }
    return found->second;
}

// ---------------------------------------------------------------- writing

void write_tensors(const Path& path, const std::map<std::string, View>& tensors,
                   const TensorFile::Metadata& metadata) {
    std::vector<std::pair<std::string, const View*>> order;
    for (const auto& [name, view] : tensors) order.emplace_back(name, &view);
    // Large elements first, so that all are aligned; then by name.
    std::stable_sort(order.begin(), order.end(), [](const auto& one, const auto& other) {
        return bytes_of(one.second->dtype) > bytes_of(other.second->dtype);
    });
    TensorFile::Metadata entries = metadata;
    for (const auto& [name, view] : order)
        entries.emplace_back(kDigest + "." + name, digest_of(*view));
    entries.emplace_back(kDigest, seal(entries, tensors));

    Json header = Json::object(), listed = Json::object();
    for (const auto& [key, value] : entries) listed.add(key, Json::of(value));
    header.add("__metadata__", std::move(listed));
    std::int64_t end = 0;
    std::vector<std::string_view> parts(2);
    for (const auto& [name, view] : order) {
        const auto bytes = static_cast<std::int64_t>(view->bytes());
        Json entry = Json::object();
        entry.add("dtype", Json::of(facts_of(view->dtype).name));
        entry.add("shape", list_of(view->shape));
        entry.add("data_offsets", list_of({end, end + bytes}));
        header.add(name, std::move(entry));
        end += bytes;
        parts.emplace_back(static_cast<const char*>(view->data), view->bytes());
    }
    std::string text = dump_json(header, JsonStyle::compact);
    text.append((kAlignment - text.size() % kAlignment) % kAlignment, ' ');
    std::string length;
    for (int i = 0; i < 8; ++i) length += static_cast<char>(text.size() >> (8 * i) & 0xFF);
    parts[0] = length;
    parts[1] = text;
    write_whole(path, parts);
}

}  // namespace edge_dit
