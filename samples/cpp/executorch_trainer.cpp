// The executorch target. Without ExecuTorch's headers this file refuses it.
#include "fault.h"
#include "trainer.h"

#ifndef EDGE_DIT_EXECUTORCH

namespace edge_dit {

std::unique_ptr<Trainer> open_executorch(const Bundle& bundle, const Runtime&) {
    throw BadInput(bundle.folder.string(), "target executorch, which this build leaves out",
                   "a build with ExecuTorch", "cmake -DEDGE_DIT_EXECUTORCH=...; or --target onnx");
}

}  // namespace edge_dit

#else

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstring>
#include <string>
#include <vector>

namespace edge_dit {

namespace {

using executorch::extension::Module;
using executorch::runtime::BackendOptions;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::LoadBackendOptionsMap;

/// Options by which XNNPACK keeps its packed matrices in a file.
LoadBackendOptionsMap cached_in(const std::string& file) {
    if (file.size() >= executorch::runtime::kMaxOptionValueLength)
        throw BadInput(file, "a path that is too long for ExecuTorch", "at most 255 bytes");
    static BackendOptions<2> options;  // the map refers to it
    LoadBackendOptionsMap map;
    if (options.set_option("weight_cache_enabled", true) != Error::Ok ||
        options.set_option("packed_cache_path", file.c_str()) != Error::Ok ||
        map.set_options("XnnpackBackend", options.view()) != Error::Ok)
        throw BadInput(file, "ExecuTorch does not take it for a file of packed matrices");
    return map;
}

/// The "forward" of a .pte file.
class Program {
public:
    /// `packed`: see `Runtime::packed`.
    Program(const Path& path, const std::string& packed)
        : path_(path.string()), module_(path_, Module::LoadMode::Mmap) {
        auto error = packed.empty() ? module_.load() : module_.load(cached_in(packed));
        if (error == Error::Ok) error = module_.load_forward();
        if (error != Error::Ok)
            throw BadInput(path_, "ExecuTorch cannot load it: error " + std::to_string(int(error)),
                           "a program of ExecuTorch 1.5", "export the bundle again");
    }

    /// Run it on arguments and copy its results, both in the order of the export.
    void run(const std::vector<const Tensor*>& arguments, const std::vector<Tensor*>& results) {
        std::vector<executorch::extension::TensorPtr> owned;
        std::vector<EValue> values;
        for (const Tensor* argument : arguments) {
            const std::vector<executorch::aten::SizesType> sizes(argument->shape.begin(),
                                                                 argument->shape.end());
            owned.push_back(executorch::extension::from_blob(
                const_cast<float*>(argument->values.data()), sizes));
            values.emplace_back(*owned.back());
        }
        const auto outputs = module_.forward(values);
        if (!outputs.ok()) fail("error " + std::to_string(int(outputs.error())));
        if (outputs->size() != results.size())
            fail(std::to_string(outputs->size()) + " results instead of " +
                 std::to_string(results.size()));
        for (std::size_t i = 0; i < results.size(); ++i) {
            const EValue& output = (*outputs)[i];
            const std::size_t bytes = results[i]->values.size() * sizeof(float);
            if (!output.isTensor() || output.toTensor().nbytes() != bytes)
                fail("result " + std::to_string(i) + " of another size");
            std::memcpy(results[i]->values.data(), output.toTensor().const_data_ptr(), bytes);
        }
    }

private:
    [[noreturn]] void fail(const std::string& why) const {
        throw BadInput(path_, "ExecuTorch cannot run it: " + why, "a program that fits its manifest",
                       "export the bundle again");
    }

    const std::string path_;
    Module module_;
};

void add(std::vector<const Tensor*>& to, const Tensors& tensors) {
    for (const Tensor& tensor : tensors) to.push_back(&tensor);
}

void add(std::vector<Tensor*>& to, Tensors& tensors) {
    for (Tensor& tensor : tensors) to.push_back(&tensor);
}

class ExecuTorchTrainer : public Trainer {
public:
    ExecuTorchTrainer(const Path& folder, const std::string& packed)
        : step_(folder / "train.pte", packed), optimizer_(folder / "optimizer.pte", "") {}

    float backward(const Tensors& batch, const Tensors& adapter, Tensors& gradients) override {
        Tensor loss(Shape{});
        std::vector<const Tensor*> arguments;
        std::vector<Tensor*> results = {&loss};
        add(arguments, batch);
        add(arguments, adapter);
        add(results, gradients);
        step_.run(arguments, results);
        return loss.values[0];
    }

    void update(float lr, State& state, const Tensors& gradients) override {
        Tensor rate({1}), step({1});
        rate.values[0] = lr;
        step.values[0] = static_cast<float>(state.step);
        std::vector<const Tensor*> arguments = {&rate, &step};
        std::vector<Tensor*> results;
        add(arguments, state.adapter);
        add(arguments, gradients);
        for (Tensors* moments : {&state.exp_avg, &state.exp_avg_sq}) add(arguments, *moments);
        for (Tensors* changed : {&state.adapter, &state.exp_avg, &state.exp_avg_sq})
            add(results, *changed);
        optimizer_.run(arguments, results);
    }

private:
    Program step_, optimizer_;
};

}  // namespace

std::unique_ptr<Trainer> open_executorch(const Bundle& bundle, const Runtime& runtime) {
    return std::make_unique<ExecuTorchTrainer>(bundle.folder / "executorch", runtime.packed);
}

}  // namespace edge_dit

#endif
