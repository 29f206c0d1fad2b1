// Tensors in memory, and safetensors files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "files.h"

namespace edge_dit {

enum class Dtype { f64, f32, f16, i64, i32, i8, u8, boolean };
using Shape = std::vector<std::int64_t>;

std::size_t bytes_of(Dtype dtype);
/// Number of elements. Throws `Malformed` if it is no size a file could have.
std::size_t count_of(const Shape& shape);
std::string in_words(const Shape& shape);

/// A tensor that lies somewhere else: in a mapped file, or in a `Tensor`.
struct View {
    Dtype dtype = Dtype::f32;
    Shape shape;
    const void* data = nullptr;

    std::size_t bytes() const { return count_of(shape) * bytes_of(dtype); }
};

/// A float32 tensor of its own, row-major.
struct Tensor {
    Tensor() = default;
    /// Zeros.
    explicit Tensor(Shape shape_) : shape(std::move(shape_)), values(count_of(shape)) {}

    View view() const { return {Dtype::f32, shape, values.data()}; }
    bool finite() const;

    Shape shape;
    std::vector<float> values;
};

/// Tensors in the order of the manifest.
using Tensors = std::vector<Tensor>;
bool all_finite(const Tensors& tensors);

/// Widen float16 or copy float32. Throws `Malformed` for another dtype.
Tensor as_float32(const View& view);

/// A mapped safetensors file. Its header is checked against the file before anything is read: every
/// tensor lies in the file, and together they fill it. Files with digests, which are those that
/// edge-dit writes for itself, must have the header that they were written with.
class TensorFile {
public:
    using Metadata = std::vector<std::pair<std::string, std::string>>;

    /// Throws `Malformed`.
    explicit TensorFile(const Path& path);

    const Metadata& metadata() const { return metadata_; }
    /// An entry of the metadata, or null.
    const std::string* find(std::string_view key) const;
    /// Whether the file carries digests.
    bool hashed() const { return find("sha256") != nullptr; }
    const std::map<std::string, View>& tensors() const { return tensors_; }
    /// A tensor whose bytes are compared with its digest, if the file carries any. Throws
    /// `Malformed` if it is missing or changed.
    const View& checked(const std::string& name) const;

private:
    MappedFile file_;
    Metadata metadata_;
    std::map<std::string, View> tensors_;
};

/// Write a safetensors file with digests, whole or not at all: the same bytes as edge-dit's Python
/// code for the same tensors.
void write_tensors(const Path& path, const std::map<std::string, View>& tensors,
                   const TensorFile::Metadata& metadata);

}  // namespace edge_dit
