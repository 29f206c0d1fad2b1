// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace edge_dit {

class Sha256 {
public:
    void update(const void* data, std::size_t size);
    /// The digest in hexadecimal; nothing may be added afterwards.
    std::string hex();

private:
    void block(const unsigned char* bytes);

    std::array<std::uint32_t, 8> state_ = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
                                           0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};
    std::array<unsigned char, 64> pending_{};
    std::uint64_t size_ = 0;
};

std::string sha256_hex(std::string_view bytes);

}  // namespace edge_dit
