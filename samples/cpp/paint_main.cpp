// edge-dit-paint: prompt and adapter to picture, without Python.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "fault.h"
#include "paint.h"

namespace {

using namespace edge_dit;

const char* const kUsage =
    "edge-dit-paint bundle/ PROMPT -o picture.png [options]\n"
    "  --run run/            whose adapter is used; default: none\n"
    "  --seed N              of the noise; default: 0\n"
    "  --negative TEXT       another negative prompt that was encoded at export\n"
    "  --onnxruntime PATH    its shared library; default: $EDGE_DIT_ONNXRUNTIME, else the system's\n"
    "  --threads N           of onnxruntime; default: its own choice\n";

std::uint64_t whole(const std::string& option, const std::string& text) {
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != text.npos)
        throw BadInput(option, "'" + text + "'", "a whole number");
    return std::strtoull(text.c_str(), nullptr, 10);
}

Request parse(const std::vector<std::string>& arguments, Path& file) {
    Request request;
    std::vector<std::string> plain;
    if (const char* path = std::getenv("EDGE_DIT_ONNXRUNTIME")) request.runtime.onnxruntime = path;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& name = arguments[i];
        const auto value = [&]() -> const std::string& {
            if (i + 1 == arguments.size()) throw BadInput(name, "nothing after it", "a value");
            return arguments[++i];
        };
        if (name == "-o") file = value();
        else if (name == "--run") request.run = value();
        else if (name == "--seed") request.seed = whole(name, value());
        else if (name == "--negative") request.negative = value();
        else if (name == "--onnxruntime") request.runtime.onnxruntime = value();
        else if (name == "--threads") request.runtime.threads = int(whole(name, value()) % 1024);
        else if (name.compare(0, 1, "-") == 0) throw BadInput(name, "not an option", "of --help");
        else plain.push_back(name);
    }
    if (plain.size() != 2 || file.extension() != ".png")
        throw BadInput("edge-dit-paint", "no bundle, no prompt or no picture", "all three",
                       "edge-dit-paint bundle/ \"a toy\" -o toy.png");
    request.bundle = plain[0];
    request.prompt = plain[1];
    return request;
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> given(arguments + 1, arguments + count);
    for (const std::string& argument : given)
        if (argument == "--help" || argument == "-h") return std::fputs(kUsage, stdout) < 0;
    try {
        Path file;
        const Request request = parse(given, file);
        const auto advance = [](std::size_t done, std::size_t steps) {
            std::printf("step %zu of %zu\n", done, steps);
            std::fflush(stdout);
        };
        write_png(file, paint(request, advance));
        std::printf("%s\n", file.c_str());
        return 0;
    } catch (const BadInput& fault) {
        std::fprintf(stderr, "edge-dit-paint: %s\n", fault.what());
        return 2;
    } catch (const std::exception& fault) {
        std::fprintf(stderr, "edge-dit-paint: failed (%s)\n", fault.what());
        return 1;
    }
}
