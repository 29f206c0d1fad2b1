// The two errors of these sources.
#pragma once

#include <stdexcept>
#include <string>

namespace edge_dit {

/// Input that training cannot work with: where, what was found, what was expected, what to do.
/// `what()` is one line of all four.
struct BadInput : std::runtime_error {
    BadInput(const std::string& where, const std::string& found, const std::string& expected = "",
             const std::string& remedy = "");
};

/// Bytes that are not what they should be. Readers throw it; who knows the file and what the user
/// can do about it turns it into a `BadInput`.
struct Malformed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace edge_dit
