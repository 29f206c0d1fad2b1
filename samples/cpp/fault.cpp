#include "fault.h"

namespace edge_dit {

namespace {

/// One printable line: a forged name must not write to the terminal.
std::string line(const std::string& where, const std::string& found, const std::string& expected,
                 const std::string& remedy) {
    std::string text = where + ": " + found;
    if (!expected.empty()) text += "; expected: " + expected;
    if (!remedy.empty()) text += "; remedy: " + remedy;
    for (char& c : text)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
    return text;
}

}  // namespace

BadInput::BadInput(const std::string& where, const std::string& found, const std::string& expected,
                   const std::string& remedy)
    : std::runtime_error(line(where, found, expected, remedy)) {}

}  // namespace edge_dit
