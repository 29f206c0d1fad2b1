// What a target computes. The loop, the state and the run folder are the same for all targets.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bundle.h"
#include "tensors.h"

namespace edge_dit {

/// What training changes: LoRA tensors and AdamW's moments, in the manifest's order.
struct State {
    Tensors adapter, exp_avg, exp_avg_sq;  // exp_avg is empty where beta1 is 0
    Tensors average;          // of the adapter; empty where the plan wants none
    Tensors sum;              // of gradients, within a group of draws; else empty
    std::int64_t summed = 0;  // its draws
    std::int64_t step = 0;    // updates done

    /// What a run gives.
    const Tensors& trained() const { return average.empty() ? adapter : average; }
};

class Trainer {
public:
    virtual ~Trainer() = default;
    /// Loss and gradients of a draw.
    ///
    /// `batch`, `adapter`: in the manifest's order. `gradients`: like `adapter`; overwritten.
    virtual float backward(const Tensors& batch, const Tensors& adapter, Tensors& gradients) = 0;
    /// One AdamW step, clipping included. Changes adapter and moments, not `state.step`.
    virtual void update(float lr, State& state, const Tensors& gradients) = 0;
};

/// Where the libraries are, and how many threads they may use.
struct Runtime {
    std::string onnxruntime;  // path of its library; empty: in the process, or where the system looks
    int threads = 0;          // 0: as many as onnxruntime takes by itself
    /// File in which ExecuTorch keeps its matrices as XNNPACK packs them, one for each bundle. They are
    /// then pages that the system may drop, and later starts are faster. Empty: they are in memory.
    std::string packed;
};

/// The onnx target. `layout`: "fused", "recompute" or "streamed". Throws `BadInput` if onnxruntime
/// cannot be found or cannot load a graph, or this processor cannot multiply in int8.
std::unique_ptr<Trainer> open_onnx(const Bundle& bundle, const std::string& layout,
                                   const Runtime& runtime);

/// The executorch target. Throws `BadInput` if this build lacks ExecuTorch, or it cannot load a
/// program.
std::unique_ptr<Trainer> open_executorch(const Bundle& bundle, const Runtime& runtime);

}  // namespace edge_dit
