// A run folder: what training keeps, so that it can be stopped or killed at any moment. Its files
// are those of `edge-dit train`, byte for byte: either program goes on with a run of the other.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bank.h"
#include "trainer.h"

namespace edge_dit {

/// What a run trains, and how far it is.
struct Run {
    std::string bundle, bank, target, layout, manifest_sha256, bank_sha256, family, base_model;
    std::int64_t rank = 0;
    double alpha = 0;
    std::int64_t steps = 0, done = 0;

    /// Whether this run may continue another.
    bool same_as(const Run& other) const;
    Json json() const;
    /// Throws `Malformed`.
    static Run from(const Json& json);
};

/// Draw and loss of every step done; nan where it was skipped.
struct Losses {
    std::vector<std::int64_t> draws;
    std::vector<double> losses;

    std::int64_t size() const { return static_cast<std::int64_t>(draws.size()); }
};

class RunFolder {
public:
    explicit RunFolder(const Path& path) : path_(path) {}

    const Path& path() const { return path_; }
    /// The run to continue; none for a new one. Throws `BadInput` if there is none to resume, or
    /// one is there and `resume` is off.
    std::optional<Run> previous(bool resume) const;
    /// Write run.json before the first step.
    void begin(const Run& run) const;
    /// Load the checkpoint; no losses and an unchanged state if there is none yet. Throws `BadInput`
    /// if it is damaged, or belongs to another bundle, bank, target or layout.
    Losses restore(const Bundle& bundle, const Run& run, State& state) const;
    /// Write a checkpoint, loss.csv and run.json. Throws `BadInput`, and keeps the last checkpoint,
    /// if the state is not finite.
    void save(const Bundle& bundle, const Bank& bank, const Run& run, const State& state,
              const Losses& losses) const;
    /// The LoRA tensors as last saved. Throws `BadInput` if nothing was, or by another bundle.
    Tensors adapter(const Bundle& bundle) const;
    /// Write the trained adapter.
    void finish(const Bundle& bundle, const State& state) const;

private:
    Run read() const;

    Path path_;
};

}  // namespace edge_dit
