// PNG without compression: the picture's bytes in stored blocks (RFC 1950, 1951, 2083).
#include <algorithm>
#include <array>
#include <string>

#include "files.h"
#include "paint.h"

namespace edge_dit {

namespace {

void append(std::string& to, std::uint32_t number) {  // big-endian
    for (int shift = 24; shift >= 0; shift -= 8) to += static_cast<char>(number >> shift & 0xFF);
}

std::uint32_t crc32(const std::string& bytes) {
    std::uint32_t crc = 0xFFFFFFFF;
    for (const char byte : bytes) {
        crc ^= static_cast<unsigned char>(byte);
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320 : 0);
    }
    return ~crc;
}

std::uint32_t adler32(const std::string& bytes) {
    std::uint32_t one = 1, two = 0;
    for (const char byte : bytes) {
        one = (one + static_cast<unsigned char>(byte)) % 65521;
        two = (two + one) % 65521;
    }
    return two << 16 | one;
}

std::string chunk(const std::string& kind, const std::string& content) {
    std::string bytes;
    append(bytes, static_cast<std::uint32_t>(content.size()));
    bytes += kind + content;
    append(bytes, crc32(kind + content));
    return bytes;
}

std::string stored(const std::string& bytes) {
    constexpr std::size_t kMost = 65535;
    std::string result = "\x78\x01";
    for (std::size_t at = 0; at < bytes.size(); at += kMost) {
        const std::string part = bytes.substr(at, kMost);
        const auto size = static_cast<std::uint16_t>(part.size());
        result += static_cast<char>(at + kMost >= bytes.size());  // whether it is the last one
        for (const std::uint16_t number : {size, static_cast<std::uint16_t>(~size)}) {
            result += static_cast<char>(number & 0xFF);
            result += static_cast<char>(number >> 8);
        }
        result += part;
    }
    append(result, adler32(bytes));
    return result;
}

}  // namespace

void write_png(const Path& path, const Picture& picture) {
    const auto side = static_cast<std::uint32_t>(picture.side);
    std::string header, rows;
    append(header, side);
    append(header, side);
    header += std::string("\x08\x02\x00\x00\x00", 5);  // eight bits, RGB
    for (std::uint32_t y = 0; y < side; ++y) {
        rows += '\0';  // no filter
        rows.append(reinterpret_cast<const char*>(&picture.rgb[std::size_t{3} * side * y]),
                    std::size_t{3} * side);
    }
    const std::string ends[] = {chunk("IHDR", header), chunk("IDAT", stored(rows)),
                                chunk("IEND", "")};
    write_whole(path, {"\x89PNG\r\n\x1A\n", ends[0], ends[1], ends[2]});
}

}  // namespace edge_dit
