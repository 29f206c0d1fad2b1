#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <locale>
#include <set>
#include <sstream>

#include "fault.h"
#include "sha256.h"

namespace edge_dit {

namespace {

constexpr int kMostLevels = 64;
constexpr std::size_t kMostValues = 4'000'000;

/// The double of a JSON number; digits are read the same way whatever the process's locale is.
double to_double(const std::string& digits) {
    std::istringstream stream(digits);
    stream.imbue(std::locale::classic());
    double value = 0;
    stream >> value;
    if (stream.fail() || !std::isfinite(value)) throw Malformed("number " + digits.substr(0, 40));
    return value;
}

/// Length in bytes of the UTF-8 character at `at`. Throws `Malformed` if there is none.
std::size_t utf8_length(std::string_view bytes, std::size_t at, std::uint32_t& point) {
    const auto first = static_cast<unsigned char>(bytes[at]);
    const std::size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    static constexpr std::uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if ((first >= 0x80 && first < 0xC2) || first > 0xF4 || at + length > bytes.size())
        throw Malformed("not UTF-8");
    point = length == 1 ? first : first & (0x7F >> length);
    for (std::size_t i = 1; i < length; ++i) {
        const auto next = static_cast<unsigned char>(bytes[at + i]);
        if ((next & 0xC0) != 0x80) throw Malformed("not UTF-8");
        point = point << 6 | (next & 0x3F);
    }
    if (point < smallest[length] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000))
        throw Malformed("not UTF-8");
    return length;
}

void append_utf8(std::string& to, std::uint32_t point) {
    if (point < 0x80) {
        to += static_cast<char>(point);
        return;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    to += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | point >> (6 * more));
    for (int i = more - 1; i >= 0; --i) to += static_cast<char>(0x80 | (point >> (6 * i) & 0x3F));
}

}  // namespace

// ---------------------------------------------------------------- values

Json Json::of(std::string text) {
    Json value;
    value.kind_ = Kind::text;
    value.text_ = std::move(text);
    return value;
}

Json Json::of_whole(std::int64_t whole) {
    Json value;
    value.kind_ = Kind::number;
    value.text_ = std::to_string(whole);
    return value;
}

Json Json::of_real(double real) {
    Json value;
    value.kind_ = Kind::number;
    value.text_ = repr(real);
    return value;
}

Json Json::list() {
    Json value;
    value.kind_ = Kind::list;
    return value;
}

Json Json::object() {
    Json value;
    value.kind_ = Kind::object;
    return value;
}

void Json::expect(Kind kind) const {
    static const char* names[] = {"null", "a boolean", "a number", "a text", "a list", "an object"};
    if (kind_ != kind)
        throw Malformed(std::string(names[int(kind_)]) + " instead of " + names[int(kind)]);
}

const Json* Json::find(std::string_view key) const {
    expect(Kind::object);
    for (const auto& [name, value] : members_)
        if (name == key) return &value;
    return nullptr;
}

const Json& Json::at(std::string_view key) const {
    if (const Json* value = find(key)) return *value;
    throw Malformed("no key '" + std::string(key) + "'");
}

const std::string& Json::text() const {
    expect(Kind::text);
    return text_;
}

std::uint64_t Json::natural(std::uint64_t most) const {
    expect(Kind::number);
    std::uint64_t value = 0;
    for (const char c : text_) {
        if (c < '0' || c > '9') throw Malformed(text_.substr(0, 40) + " is not a whole number");
        const std::uint64_t digit = c - '0';
        if (value > (most - digit) / 10) throw Malformed(text_.substr(0, 40) + " is too large");
        value = value * 10 + digit;
    }
    return value;
}

double Json::real() const {
    expect(Kind::number);
    return to_double(text_);
}

bool Json::boolean() const {
    expect(Kind::boolean);
    return text_ == "true";
}

const std::vector<Json>& Json::items() const {
    expect(Kind::list);
    return items_;
}

const Json::Members& Json::members() const {
    expect(Kind::object);
    return members_;
}

std::vector<std::string> Json::texts() const {
    std::vector<std::string> all;
    for (const Json& item : items()) all.push_back(item.text());
    return all;
}

void Json::add(Json value) {
    expect(Kind::list);
    items_.push_back(std::move(value));
}

void Json::add(std::string key, Json value) {
    expect(Kind::object);
    members_.emplace_back(std::move(key), std::move(value));
}

Json Json::take(std::string_view key) {
    expect(Kind::object);
    for (auto member = members_.begin(); member != members_.end(); ++member) {
        if (member->first != key) continue;
        Json value = std::move(member->second);
        members_.erase(member);
        return value;
    }
    return {};
}

// ---------------------------------------------------------------- parser

class JsonParser {
public:
    explicit JsonParser(std::string_view bytes) : bytes_(bytes) {}

    Json document() {
        Json value = parse(0);
        skip_space();
        if (at_ != bytes_.size()) fail("more after the end");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& why) const {
        throw Malformed("not JSON: " + why + " at byte " + std::to_string(at_));
    }
    char peek() const { return at_ < bytes_.size() ? bytes_[at_] : '\0'; }
    void skip_space() {
        while (at_ < bytes_.size() && std::string_view(" \t\r\n").find(bytes_[at_]) != bytes_.npos)
            ++at_;
    }
    bool skip(std::string_view word) {
        if (bytes_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Json parse(int level) {
        if (level > kMostLevels) fail("nested too deep");
        if (++values_ > kMostValues) fail("too many values");
        skip_space();
        if (peek() == '{') return object(level);
        if (peek() == '[') return list(level);
        if (peek() == '"') return Json::of(string());
        if (peek() == '-' || (peek() >= '0' && peek() <= '9')) return number();
        Json value;
        if (skip("null")) return value;
        value.kind_ = Json::Kind::boolean;
        value.text_ = peek() == 't' ? "true" : "false";
        if (!skip(value.text_)) fail("no value");
        return value;
    }

    Json object(int level) {
        Json value = Json::object();
        std::set<std::string> seen;
        ++at_;
        for (skip_space(); peek() != '}'; skip_space()) {
            if (!value.members_.empty()) {
                if (!skip(",")) fail("no comma");
                skip_space();
            }
            if (peek() != '"') fail("no key");
            std::string key = string();
            if (!seen.insert(key).second) fail("a key stands twice in one object");
            skip_space();
            if (!skip(":")) fail("no colon");
            value.members_.emplace_back(std::move(key), parse(level + 1));
        }
        ++at_;
        return value;
    }

    Json list(int level) {
        Json value = Json::list();
        ++at_;
        for (skip_space(); peek() != ']'; skip_space()) {
            if (!value.items_.empty() && !skip(",")) fail("no comma");
            value.items_.push_back(parse(level + 1));
        }
        ++at_;
        return value;
    }

    Json number() {
        const std::size_t begin = at_;
        const auto digits = [this] {
            const std::size_t first = at_;
            while (peek() >= '0' && peek() <= '9') ++at_;
            if (at_ == first) fail("a number without digits");
        };
        skip("-");
        if (!skip("0")) digits();
        if (skip(".")) digits();
        if (skip("e") || skip("E")) {
            if (!skip("-")) skip("+");
            digits();
        }
        Json value;
        value.kind_ = Json::Kind::number;
        value.text_ = bytes_.substr(begin, at_ - begin);
        return value;
    }

    std::string string() {
        std::string text;
        for (++at_; peek() != '"';) {
            if (at_ >= bytes_.size() || static_cast<unsigned char>(peek()) < 0x20)
                fail("a text without end");
            if (skip("\\")) {
                escaped(text);
                continue;
            }
            std::uint32_t point;
            const std::size_t length = utf8_length(bytes_, at_, point);
            text += bytes_.substr(at_, length);
            at_ += length;
        }
        ++at_;
        return text;
    }

    void escaped(std::string& text) {
        static constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
        const char name = peek();
        ++at_;
        if (name == 'u') {
            std::uint32_t point = hexadecimal();
            if (point >= 0xD800 && point < 0xDC00 && skip("\\u")) {
                const std::uint32_t low = hexadecimal();
                if (low < 0xDC00 || low > 0xDFFF) fail("half a character");
                point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
            }
            if (point >= 0xD800 && point < 0xE000) fail("half a character");
            append_utf8(text, point);
            return;
        }
        const std::size_t place = names.find(name);
        if (name == '\0' || place == names.npos) fail("an unknown escape");
        text += values[place];
    }

    std::uint32_t hexadecimal() {
        std::uint32_t value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("no hexadecimal digit");
            value = value << 4 | static_cast<std::uint32_t>(digit);
        }
        return value;
    }

    std::string_view bytes_;
    std::size_t at_ = 0, values_ = 0;
};

Json parse_json(std::string_view bytes) { return JsonParser(bytes).document(); }

// ---------------------------------------------------------------- writer

class JsonWriter {
public:
    explicit JsonWriter(JsonStyle style) : style_(style) {}

    std::string take() { return std::move(out_); }

    void write(const Json& value, int level) {
        switch (value.kind_) {
            case Json::Kind::null: out_ += "null"; return;
            case Json::Kind::boolean:
            case Json::Kind::number: out_ += value.text_; return;
            case Json::Kind::text: write_text(value.text_); return;
            case Json::Kind::list: write_list(value.items_, level); return;
            case Json::Kind::object: write_object(value.members_, level); return;
        }
    }

private:
    void separate(bool first, int level) {
        if (!first) out_ += ',';
        if (style_ == JsonStyle::indented) {
            out_ += '\n';
            out_.append(2 * static_cast<std::size_t>(level), ' ');
        } else if (!first && style_ != JsonStyle::compact) {
            out_ += ' ';
        }
    }

    void write_list(const std::vector<Json>& items, int level) {
        out_ += '[';
        for (const Json& item : items) {
            separate(&item == &items.front(), level + 1);
            write(item, level + 1);
        }
        if (!items.empty()) separate(true, level);
        out_ += ']';
    }

    void write_object(const Json::Members& members, int level) {
        std::vector<const std::pair<std::string, Json>*> order;
        for (const auto& member : members) order.push_back(&member);
        if (style_ == JsonStyle::sorted)  // UTF-8 sorts as its characters do
            std::sort(order.begin(), order.end(),
                      [](auto* one, auto* other) { return one->first < other->first; });
        out_ += '{';
        for (const auto* member : order) {
            separate(member == order.front(), level + 1);
            write_text(member->first);
            out_ += style_ == JsonStyle::compact ? ":" : ": ";
            write(member->second, level + 1);
        }
        if (!order.empty()) separate(true, level);
        out_ += '}';
    }

    void write_text(const std::string& text) {
        static constexpr std::string_view plain = "\"\\\b\f\n\r\t", escapes = "\"\\bfnrt";
        out_ += '"';
        for (std::size_t at = 0; at < text.size();) {
            std::uint32_t point;
            at += utf8_length(text, at, point);
            const std::size_t place = point < 0x80 ? plain.find(char(point)) : plain.npos;
            if (place != plain.npos) {
                out_ += '\\';
                out_ += escapes[place];
            } else if (point >= 0x20 && point < 0x7F) {
                out_ += static_cast<char>(point);
            } else if (point < 0x10000) {
                write_unit(point);
            } else {
                write_unit(0xD800 + ((point - 0x10000) >> 10));
                write_unit(0xDC00 + ((point - 0x10000) & 0x3FF));
            }
        }
        out_ += '"';
    }

    void write_unit(std::uint32_t unit) {
        static constexpr char digits[] = "0123456789abcdef";
        out_ += "\\u";
        for (int shift = 12; shift >= 0; shift -= 4) out_ += digits[unit >> shift & 0xF];
    }

    JsonStyle style_;
    std::string out_;
};

std::string dump_json(const Json& value, JsonStyle style) {
    JsonWriter writer(style);
    writer.write(value, 0);
    return writer.take();
}

std::string json_digest(const Json& value) {
    return sha256_hex(dump_json(value, JsonStyle::sorted));
}

std::string repr(double value) {
    if (std::isnan(value)) return "nan";
    if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
    std::string scientific;  // "-1.25e-07"
    for (int digits = 0; digits < 17; ++digits) {
        std::ostringstream stream;
        stream.imbue(std::locale::classic());
        stream.precision(digits);
        stream << std::scientific << value;
        scientific = stream.str();
        if (to_double(scientific) == value) break;
    }
    const std::size_t e = scientific.find('e');
    const int exponent = std::atoi(scientific.c_str() + e + 1);
    std::string sign = scientific[0] == '-' ? "-" : "", digits;
    for (const char c : scientific.substr(0, e))
        if (c >= '0' && c <= '9') digits += c;
    if (exponent < -4 || exponent >= 16) {
        const std::string rest = digits.size() > 1 ? "." + digits.substr(1) : "";
        const int size = std::abs(exponent);
        return sign + digits[0] + rest + (exponent < 0 ? "e-" : "e+") + (size < 10 ? "0" : "") +
               std::to_string(size);
    }
    if (exponent < 0) return sign + "0." + std::string(std::size_t(-exponent - 1), '0') + digits;
    const auto whole = std::size_t(exponent) + 1;
    if (digits.size() < whole) digits.append(whole - digits.size(), '0');
    return sign + digits.substr(0, whole) + "." +
           (digits.size() > whole ? digits.substr(whole) : "0");
}

}  // namespace edge_dit
