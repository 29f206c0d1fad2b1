// JSON in memory: a bounded parser, and a writer whose bytes equal those of Python's json module.
//
// A number is kept as it is written. The digest of a document is over its text, so "1e-06" must not
// become "0.000001".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edge_dit {

class Json {
public:
    enum class Kind { null, boolean, number, text, list, object };
    using Members = std::vector<std::pair<std::string, Json>>;

    Json() = default;
    static Json of(std::string text);
    static Json of_whole(std::int64_t value);
    static Json of_real(double value);
    static Json list();
    static Json object();

    Kind kind() const { return kind_; }
    /// A member of an object, or null if there is none.
    const Json* find(std::string_view key) const;
    /// A member of an object. Throws `Malformed` if there is none, or this is no object.
    const Json& at(std::string_view key) const;
    /// These throw `Malformed` if the value is of another kind or out of bounds.
    const std::string& text() const;
    std::uint64_t natural(std::uint64_t most = INT64_MAX) const;
    double real() const;
    bool boolean() const;
    const std::vector<Json>& items() const;
    const Members& members() const;
    std::vector<std::string> texts() const;

    /// Append to a list, or to an object.
    void add(Json value);
    void add(std::string key, Json value);
    /// Remove a member of an object and return it; null if there is none.
    Json take(std::string_view key);

private:
    friend class JsonParser;
    friend class JsonWriter;
    void expect(Kind kind) const;

    Kind kind_ = Kind::null;
    std::string text_;  // a text; a number or boolean as written
    std::vector<Json> items_;
    Members members_;
};

/// Parse UTF-8. Throws `Malformed` for what is not JSON, a key that stands twice in one object, more
/// than 64 levels, or more than four million values.
Json parse_json(std::string_view bytes);

/// The styles of Python's json.dumps in our files.
enum class JsonStyle {
    plain,     // json.dumps(value)
    sorted,    // json.dumps(value, sort_keys=True): what a digest is made of
    compact,   // separators=(",", ":"): the header of a safetensors file
    indented,  // indent=2: documents
};
std::string dump_json(const Json& value, JsonStyle style);

/// SHA-256 of a value in the sorted style, in hexadecimal.
std::string json_digest(const Json& value);

/// A double as Python's repr writes it: the fewest digits that give it back.
std::string repr(double value);

}  // namespace edge_dit
