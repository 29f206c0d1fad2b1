#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "fault.h"
#include "sha256.h"

namespace edge_dit {

namespace {

std::string reason() { return std::strerror(errno); }

[[noreturn]] void cannot_write(const Path& path, const std::string& why) {
    throw BadInput(path.string(), "cannot be written (" + why + ")", "",
                   "free some space or make the folder writable, then run the same command again");
}

void write_all(int descriptor, std::string_view part) {
    while (!part.empty()) {
        const ssize_t written = ::write(descriptor, part.data(), part.size());
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) throw Malformed(reason());
        part.remove_prefix(static_cast<std::size_t>(written));
    }
}

}  // namespace

MappedFile::MappedFile(const Path& path) {
    // Without O_NONBLOCK a pipe would wait for its writer.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (descriptor < 0) throw Malformed(reason());
    struct stat facts {};
    const bool regular = ::fstat(descriptor, &facts) == 0 && S_ISREG(facts.st_mode);
    void* mapped = MAP_FAILED;
    size_ = regular ? static_cast<std::size_t>(facts.st_size) : 0;
    if (size_) mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const std::string why = reason();
    ::close(descriptor);
    if (!regular) throw Malformed("not a regular file");
    if (size_ && mapped == MAP_FAILED) throw Malformed(why);
    if (size_) data_ = static_cast<const char*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<char*>(data_), size_);
}

std::string sha256_of(const Path& path) { return sha256_hex(MappedFile(path).bytes()); }

void write_whole(const Path& path, const std::vector<std::string_view>& parts) {
    const Path folder = path.has_parent_path() ? path.parent_path() : Path(".");
    std::string temporary = (folder / ("." + path.filename().string() + ".XXXXXX")).string();
    const int descriptor = ::mkstemp(temporary.data());
    if (descriptor < 0) cannot_write(path, reason());
    std::string why;
    try {
        for (const std::string_view part : parts) write_all(descriptor, part);
        if (::fchmod(descriptor, 0644) || ::fsync(descriptor)) throw Malformed(reason());
    } catch (const Malformed& fault) {
        why = fault.what();
    }
    ::close(descriptor);
    if (why.empty() && ::rename(temporary.c_str(), path.c_str())) why = reason();
    if (!why.empty()) {
        ::unlink(temporary.c_str());
        cannot_write(path, why);
    }
    const int parent = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
    if (parent >= 0) {  // makes the rename durable
        ::fsync(parent);
        ::close(parent);
    }
}

FolderLock::FolderLock(const Path& folder) : folder_(folder) {
    std::error_code error;
    std::filesystem::create_directories(folder, error);
    if (error) cannot_write(folder, error.message());
    const Path path = folder / ".lock";
    while (true) {
        descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (descriptor_ < 0) cannot_write(folder, reason());
        if (::flock(descriptor_, LOCK_EX | LOCK_NB)) {
            ::close(descriptor_);
            throw BadInput(folder.string(), "in use by another process", "one process at a time",
                           "wait for it or stop it, then run the same command again");
        }
        // The process that held it before may have removed the file that was opened here.
        struct stat held {}, there {};
        if (!::fstat(descriptor_, &held) && !::stat(path.c_str(), &there) &&
            held.st_ino == there.st_ino && held.st_dev == there.st_dev)
            return;
        ::close(descriptor_);
    }
}

FolderLock::~FolderLock() {
    ::unlink((folder_ / ".lock").c_str());
    ::close(descriptor_);
    ::rmdir(folder_.c_str());  // fails unless it is empty
}

}  // namespace edge_dit
