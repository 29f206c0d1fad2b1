// ONNX graphs in onnxruntime, by its C API. The library is found when it is needed, so nothing here
// is linked against it.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "bundle.h"
#include "fault.h"
#include "tensors.h"
#include "third_party/onnxruntime/onnxruntime_c_api.h"
#include "trainer.h"

namespace edge_dit {

/// onnxruntime in this process. All sessions share one arena of memory.
class Onnxruntime {
public:
    /// The library, loaded at the first call. Switches its telemetry off.
    ///
    /// `doubling`: every chunk of the arena is twice as large as the one before. Sessions that take
    /// turns then use the same memory. Otherwise it grows by what is needed, which is less for one
    /// large session. The first call decides.
    static const Onnxruntime& open(const Runtime& runtime, bool doubling);

    const OrtApi& api() const { return *api_; }
    const OrtEnv* env() const { return env_; }
    const OrtMemoryInfo* memory() const { return memory_; }
    /// Throw `Malformed` with onnxruntime's message if there is one.
    void check(OrtStatus* status) const;
    /// Options of every session: the same bits in every run and as in Python, no waiting thread that
    /// spins, no second copy of any weight.
    std::shared_ptr<OrtSessionOptions> options(int threads) const;

private:
    Onnxruntime(const Runtime& runtime, bool doubling);

    const OrtApi* api_ = nullptr;
    OrtEnv* env_ = nullptr;
    OrtMemoryInfo* memory_ = nullptr;
};

/// Arguments of a graph by name. More than the graph reads may be given.
using Feeds = std::map<std::string, View>;
/// Where results go, by name. A result may be written over an argument if the graph allows it.
using Results = std::map<std::string, Tensor*>;

class OnnxProgram {
public:
    /// Throws `BadInput` if onnxruntime cannot load the graph.
    OnnxProgram(const Onnxruntime& ort, const Path& path, GraphNames names, int threads);

    const GraphNames& names() const { return names_; }
    /// Run the graph on memory of the caller's; nothing is copied. Throws `BadInput`.
    void run(const Feeds& feeds, const Results& results) const;
    /// Run the graph where the shapes of its float32 results are not known; copies of them, by name.
    std::map<std::string, Tensor> run(const Feeds& feeds) const;

private:
    /// Run on values of the graph's results, null where onnxruntime is to make them.
    void run(const Feeds& feeds, OrtValue** results) const;
    [[noreturn]] void refuse(const Malformed& fault) const;

    const Onnxruntime& ort_;
    Path path_;
    GraphNames names_;
    std::shared_ptr<OrtSession> session_;
};

/// The frozen weights of a bundle, in mapped files.
class Frozen {
public:
    /// Throws `BadInput` if a file is damaged.
    explicit Frozen(const Bundle& bundle);
    /// A weight by its key, or null.
    const View* find(const std::string& key) const;
    /// A weight by its key. Throws `BadInput` if there is none.
    const View& at(const std::string& key) const;
    /// Weights by the names of a graph's inputs.
    Feeds named(const Block::Names& names) const;

private:
    Path folder_;
    std::vector<std::unique_ptr<TensorFile>> files_;
};

/// Whether the largest sum of int8 products is right. x86 processors with AVX2 but without VNNI add
/// pairs of products in 16 bits.
bool int8_products_are_exact(const Onnxruntime& ort);

}  // namespace edge_dit
