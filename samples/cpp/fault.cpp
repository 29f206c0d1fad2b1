#include "fault.h"

namespace edge_dit {

namespace {

/// One printable line: a forged name must not write to the terminal.
std::string line(const std::string& where, const std::string& found, const std::string& expected,
                 const std::string& remedy) {
    std::string text = where + ": " + found;
    if (!expected.empty()) text += "; expected: " + expected;
    if (!remedy.empty()) text += "; remedy: " + remedy;
    unsigned char before = 0;
    for (char& c : text) {
        const auto byte = static_cast<unsigned char>(c);
        const bool control = byte < 0x20 || byte == 0x7F || (before == 0xC2 && byte < 0xA0);
        if (control) c = before == 0xC2 ? '\xBF' : ' ';  // U+0080 to U+009F become an upturned "?"
        before = byte;
    }
    return text;
}

}  // namespace

BadInput::BadInput(const std::string& where, const std::string& found, const std::string& expected,
                   const std::string& remedy)
    : std::runtime_error(line(where, found, expected, remedy)) {}

}  // namespace edge_dit
