#include "training.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "fault.h"

namespace edge_dit {

namespace {

constexpr std::int64_t kSaveEvery = 100;  // steps
/// Steps in a row without finite loss and gradients after which training stops.
constexpr int kMostSkipped = 10;
/// Share of a run's steps, at its end, over which the learning rate falls.
constexpr double kDecayShare = 0.4;
constexpr double kPi = 3.14159265358979323846;

/// By the plan's schedule and warm-up (edge_dit/contract/adamw.py).
double learning_rate(std::int64_t step, std::int64_t steps, const Bundle& bundle) {
    double course = 1.0;
    if (bundle.schedule == "decay")
        course = std::min(1.0, double(steps - step) / (kDecayShare * double(steps)));
    else if (bundle.schedule == "linear")
        course = double(steps - step) / double(steps);
    else if (bundle.schedule == "cosine")
        course = (1 + std::cos(kPi * double(step) / double(steps))) / 2;
    const double risen = double(step + 1) / double(bundle.warmup + 1);
    return bundle.lr * course * std::min(1.0, risen);
}

std::string name_of(const Path& folder) {
    return std::filesystem::canonical(folder).filename().string();
}

std::string in_words(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : " or ") + name;
    return text;
}

/// Target and layout of a run: those asked for, else those of the resumed run, else the bundle's
/// first target in the planned layout.
std::pair<std::string, std::string> target_and_layout(const Bundle& bundle,
                                                      const std::string& asked,
                                                      const std::optional<Run>& previous) {
    const std::size_t colon = asked.find(':');
    std::string target = asked.substr(0, colon);
    std::string layout = colon == asked.npos ? "" : asked.substr(colon + 1);
    if (target.empty())
        target = previous ? previous->target : bundle.targets.empty() ? "onnx" : bundle.targets[0];
    const std::vector<std::string> layouts = bundle.layouts(target);
    if (layouts.empty() || (target != "onnx" && target != "executorch"))
        throw BadInput(bundle.folder.string(), "target '" + target + "'",
                       "onnx or executorch, and one of the bundle's: " + in_words(bundle.targets),
                       "name another --target");
    const auto has = [&](const std::string& name) {
        return std::find(layouts.begin(), layouts.end(), name) != layouts.end();
    };
    if (layout.empty() && previous && previous->target == target) layout = previous->layout;
    if (layout.empty() && has(bundle.planned_layout)) layout = bundle.planned_layout;
    if (layout.empty()) layout = layouts[0];
    if (!has(layout))
        throw BadInput(bundle.folder.string(), "no layout '" + layout + "' of target " + target,
                       in_words(layouts), "name another --target");
    return {target, layout};
}

Run new_run(const Bundle& bundle, const Bank& bank, const std::string& target,
            const std::string& layout) {
    Run run;
    run.bundle = name_of(bundle.folder);
    run.bank = bank.name();
    run.target = target;
    run.layout = layout;
    run.manifest_sha256 = bundle.sha256;
    run.bank_sha256 = bank.identity();
    run.family = bundle.family;
    run.base_model = bundle.model_name;
    run.rank = bundle.rank;
    run.alpha = bundle.alpha;
    run.steps = bundle.steps;
    return run;
}

State new_state(const Bundle& bundle) {
    State state;
    state.adapter = bundle.adapter().first;
    if (bundle.ema > 0) state.average = state.adapter;
    for (const TensorSpec& spec : bundle.lora) {
        if (bundle.beta1 > 0) state.exp_avg.emplace_back(spec.shape);
        state.exp_avg_sq.emplace_back(spec.shape);
    }
    return state;
}

class Training {
public:
    Training(const Bundle& bundle, Bank& bank, const RunFolder& folder, const Run& run)
        : bundle_(bundle), bank_(bank), folder_(folder), run_(run), state_(new_state(bundle)) {
        for (const TensorSpec& spec : bundle.lora) gradients_.emplace_back(spec.shape);
    }

    void restore() { losses_ = folder_.restore(bundle_, run_, state_); }
    std::int64_t done() const { return losses_.size(); }
    void save() const { folder_.save(bundle_, bank_, run_, state_, losses_); }
    void finish() const { folder_.finish(bundle_, state_); }

    void loop(Trainer& trainer, const Hooks& hooks) {
        while (done() < run_.steps && may_go_on(hooks)) {
            step(trainer);
            if (hooks.after_step) hooks.after_step(progress());
            if (done() % kSaveEvery == 0 && done() < run_.steps) save();
        }
    }

private:
    Progress progress() const {
        return {done(), run_.steps, losses_.losses.empty() ? NAN : losses_.losses.back()};
    }

    /// Ask the app; wait while it wants a pause. A pause may be long, so it begins with a checkpoint.
    bool may_go_on(const Hooks& hooks) const {
        if (!hooks.before_step) return true;
        for (bool saved = false;; saved = true) {
            const Answer answer = hooks.before_step(progress());
            if (answer != Answer::pause) return answer == Answer::go_on;
            if (!saved) save();
            std::this_thread::sleep_for(std::chrono::duration<double>(hooks.pause_seconds));
        }
    }

    void step(Trainer& trainer) {
        const std::size_t draw = bank_.number(done());
        const double lr = learning_rate(done(), run_.steps, bundle_);
        double loss = trainer.backward(bank_.read(draw), state_.adapter, gradients_);
        if (std::isfinite(loss) && all_finite(gradients_)) {
            learn(trainer, static_cast<float>(lr));
            skipped_ = 0;
        } else {
            loss = NAN;
            ++skipped_;
        }
        losses_.draws.push_back(static_cast<std::int64_t>(draw));
        losses_.losses.push_back(loss);
        if (skipped_ == kMostSkipped)
            throw BadInput(folder_.path().string(),
                           std::to_string(kMostSkipped) +
                               " steps in a row without finite loss and gradients, the last on " +
                               bank_.in_words(draw),
                           "numbers; the last checkpoint is kept",
                           "plan with a lower lr; if it is always the same draws, precompute again");
    }

    /// Count the gradients of a draw; if they are the last of a group, update (edge_dit_runtime's
    /// sessions/smoothed.py).
    void learn(Trainer& trainer, float lr) {
        if (bundle_.accumulate > 1) {
            for (std::size_t i = 0; i < state_.sum.size(); ++i)
                for (std::size_t k = 0; k < gradients_[i].values.size(); ++k)
                    gradients_[i].values[k] += state_.sum[i].values[k];
            if (++state_.summed < bundle_.accumulate) {
                state_.sum = gradients_;
                return;
            }
            state_.sum.clear();
            state_.summed = 0;
            for (Tensor& gradient : gradients_)
                for (float& value : gradient.values) value /= float(bundle_.accumulate);
        }
        trainer.update(lr, state_, gradients_);
        const double updates = double(++state_.step);
        const double decay = std::min(bundle_.ema, (1 + updates) / (10 + updates));
        const float rest = float(1 - decay);
        for (std::size_t i = 0; i < state_.average.size(); ++i) {
            const float* now = state_.adapter[i].values.data();
            for (float& mean : state_.average[i].values) mean += rest * (*now++ - mean);
        }
    }

    const Bundle& bundle_;
    Bank& bank_;
    const RunFolder& folder_;
    const Run run_;
    State state_;
    Tensors gradients_;
    Losses losses_;
    int skipped_ = 0;
};

}  // namespace

Run train(const Options& options, const Hooks& hooks) {
    const Bundle bundle = open_bundle(options.bundle);
    Bank bank(options.bank, bundle);
    const RunFolder folder(options.run);
    folder.previous(options.resume);  // before the folder is touched
    const FolderLock lock(options.run);
    const std::optional<Run> previous = folder.previous(options.resume);
    const auto [target, layout] = target_and_layout(bundle, options.target, previous);
    check_bundle(bundle, target, /*all=*/!previous);
    Run run = new_run(bundle, bank, target, layout);
    if (options.steps > 0) run.steps = options.steps;
    else if (previous) run.steps = previous->steps;
    if (run.steps % bundle.accumulate)
        throw BadInput("--steps", std::to_string(run.steps),
                       "a multiple of " + std::to_string(bundle.accumulate) +
                           ", the draws of an update",
                       "name another number of steps");
    Training training(bundle, bank, folder, run);
    if (previous) training.restore();
    const auto trainer = target == "onnx" ? open_onnx(bundle, layout, options.runtime)
                                          : open_executorch(bundle, options.runtime);
    if (!training.done()) folder.begin(run);
    training.loop(*trainer, hooks);
    training.save();
    if (training.done() == run.steps) training.finish();
    run.done = training.done();
    return run;
}

}  // namespace edge_dit
