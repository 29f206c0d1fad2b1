// edge-dit-train: trains a bundle over its bank, without Python.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "fault.h"
#include "training.h"

namespace {

using namespace edge_dit;

const char* const kUsage =
    "edge-dit-train bundle/ --bank bank/ -o run/ [options]\n"
    "  --target onnx|onnx:streamed|onnx:recompute|executorch   default: the bundle's first\n"
    "  --steps N             of the whole run; default: the plan's\n"
    "  --resume              go on with the run in -o, also with one of `edge-dit train`\n"
    "  --onnxruntime PATH    its shared library; default: $EDGE_DIT_ONNXRUNTIME, else the system's\n"
    "  --threads N           of onnxruntime; default: its own choice\n"
    "  --packed FILE         where ExecuTorch keeps packed matrices, to save memory\n"
    "Ctrl-C stops it with a checkpoint. SIGUSR1 pauses it, and lets it go on.\n";

volatile std::sig_atomic_t stopped = 0, paused = 0;

void on_stop(int number) {
    stopped = 1;
    std::signal(number, SIG_DFL);  // a second Ctrl-C ends it at once
}

void on_pause(int) { paused = !paused; }

std::int64_t natural(const std::string& option, const std::string& text) {
    if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != text.npos ||
        std::atoi(text.c_str()) == 0)
        throw BadInput(option, "'" + text + "'", "a whole number above 0");
    return std::atoi(text.c_str());
}

Options parse(const std::vector<std::string>& arguments) {
    Options options;
    if (const char* path = std::getenv("EDGE_DIT_ONNXRUNTIME")) options.runtime.onnxruntime = path;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& name = arguments[i];
        const auto value = [&]() -> const std::string& {
            if (i + 1 == arguments.size()) throw BadInput(name, "nothing after it", "a value");
            return arguments[++i];
        };
        if (name == "--bank") options.bank = value();
        else if (name == "-o") options.run = value();
        else if (name == "--target") options.target = value();
        else if (name == "--steps") options.steps = natural(name, value());
        else if (name == "--threads") options.runtime.threads = int(natural(name, value()));
        else if (name == "--onnxruntime") options.runtime.onnxruntime = value();
        else if (name == "--packed") options.runtime.packed = value();
        else if (name == "--resume") options.resume = true;
        else if (name[0] == '-' || !options.bundle.empty())
            throw BadInput(name, "not an option", "those of --help");
        else options.bundle = name;
    }
    if (options.bundle.empty() || options.bank.empty() || options.run.empty())
        throw BadInput("edge-dit-train", "no bundle, no --bank or no -o", "all three",
                       "edge-dit-train bundle/ --bank bank/ -o run/");
    return options;
}

void say(const char* what, const Progress& progress) {
    std::printf("%s %lld\n", what, static_cast<long long>(progress.done));
    std::fflush(stdout);
}

void report(const Progress& progress) {
    if (progress.done % 10 && progress.done != progress.steps) return;
    std::printf("step %lld of %lld, loss %.4f\n", static_cast<long long>(progress.done),
                static_cast<long long>(progress.steps), progress.loss);
    std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
    const std::vector<std::string> given(arguments + 1, arguments + count);
    for (const std::string& argument : given)
        if (argument == "--help" || argument == "-h") return std::fputs(kUsage, stdout) < 0;
    Hooks hooks;
    hooks.pause_seconds = 0.2;
    hooks.before_step = [asked = 0](const Progress& progress) mutable {
        if (stopped) return Answer::stop;
        if (paused && ++asked == 2) say("paused after step", progress);  // asked again: it is saved
        if (paused) return Answer::pause;
        if (asked > 1) say("goes on after step", progress);
        asked = 0;
        return Answer::go_on;
    };
    hooks.after_step = report;
    try {
        const Options options = parse(given);
        std::signal(SIGINT, on_stop);
        std::signal(SIGTERM, on_stop);
        std::signal(SIGUSR1, on_pause);
        const Run run = train(options, hooks);
        std::printf("%s: %lld of %lld steps done\n", options.run.c_str(),
                    static_cast<long long>(run.done), static_cast<long long>(run.steps));
        return 0;
    } catch (const BadInput& fault) {
        std::fprintf(stderr, "edge-dit-train: %s\n", fault.what());
        return 2;
    } catch (const std::exception& fault) {
        std::fprintf(stderr, "edge-dit-train: failed (%s)\n", fault.what());
        return 1;
    }
}
