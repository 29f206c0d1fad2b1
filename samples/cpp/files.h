// Files: mapped for reading, written whole or not at all, and a folder's lock.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace edge_dit {

using Path = std::filesystem::path;

/// A regular file, mapped read only. Pages are read when they are used, and the system may drop
/// them again.
class MappedFile {
public:
    /// Throws `Malformed` if it cannot be opened, or is a pipe or a device.
    explicit MappedFile(const Path& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const char* data() const { return data_; }
    std::size_t size() const { return size_; }
    std::string_view bytes() const { return {data_, size_}; }

private:
    const char* data_ = nullptr;
    std::size_t size_ = 0;
};

std::string sha256_of(const Path& path);

/// Write a file: readers see its old content or its new one, also after a power cut. Throws
/// `BadInput` if the system refuses; the old content stays.
void write_whole(const Path& path, const std::vector<std::string_view>& parts);

/// Keeps other processes, Python's included, out of a run folder. Makes the folder if it is not
/// there, and removes it at the end if nothing was written into it.
class FolderLock {
public:
    explicit FolderLock(const Path& folder);
    ~FolderLock();
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;

private:
    Path folder_;
    int descriptor_ = -1;
};

}  // namespace edge_dit
