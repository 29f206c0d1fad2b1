// The training loop over a bank.
#pragma once

#include <functional>
#include <string>

#include "bank.h"
#include "bundle.h"
#include "run_folder.h"
#include "trainer.h"

namespace edge_dit {

struct Progress {
    std::int64_t done = 0, steps = 0;
    double loss = 0;  // of the last step; nan before the first one, and if the last was skipped
};

enum class Answer {
    go_on,
    pause,  // save, then ask again after `pause_seconds`
    stop,   // save and return
};

/// What an app is asked and told. Both are called between steps, in the thread that trains.
struct Hooks {
    /// Asked before each step: is the phone charging, is it cool enough, does its user want it?
    std::function<Answer(const Progress&)> before_step;
    std::function<void(const Progress&)> after_step;
    double pause_seconds = 1;
};

struct Options {
    Path bundle, bank, run;
    std::string target;      // "onnx", "onnx:streamed", "executorch"; empty: the resumed run's, else
                             // the bundle's first one
    std::int64_t steps = 0;  // of the whole run; 0: the resumed run's, else the plan's
    bool resume = false;
    Runtime runtime;
};

/// Train until all steps are done or `hooks` stops it; a checkpoint is written every 100 steps and
/// at the end. Throws `BadInput`.
Run train(const Options& options, const Hooks& hooks);

}  // namespace edge_dit
