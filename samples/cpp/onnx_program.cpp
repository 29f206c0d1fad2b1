#include "onnx_program.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "fault.h"

namespace edge_dit {

namespace {

/// The oldest C API that has all functions used here (SetDeterministicCompute); newer libraries
/// have it too.
constexpr std::uint32_t kApi = 17;
constexpr std::size_t kFirstChunk = std::size_t{64} << 20;
/// Most unused bytes in a chunk of the arena. onnxruntime's default is 128 MiB.
constexpr std::size_t kSpare = std::size_t{1} << 20;

using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();

/// OrtGetApiBase of a library, or of the process if an app links onnxruntime.
GetApiBase api_base(const std::string& path) {
    if (path.empty()) {
        if (void* symbol = ::dlsym(RTLD_DEFAULT, "OrtGetApiBase"))
            return reinterpret_cast<GetApiBase>(symbol);
    }
    const std::vector<std::string> names =
        path.empty() ? std::vector<std::string>{"libonnxruntime.so.1", "libonnxruntime.so",
                                                "libonnxruntime.dylib"}
                     : std::vector<std::string>{path};
    std::string why;
    for (const std::string& name : names) {
        void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);  // stays for good
        void* symbol = library ? ::dlsym(library, "OrtGetApiBase") : nullptr;
        if (symbol) return reinterpret_cast<GetApiBase>(symbol);
        if (why.empty()) why = library ? "it has no OrtGetApiBase" : ::dlerror();
    }
    throw BadInput(path.empty() ? "onnxruntime" : path, "cannot be loaded (" + why + ")",
                   "the shared library of onnxruntime 1.19 or newer",
                   "name it: --onnxruntime /path/to/libonnxruntime.so");
}

ONNXTensorElementDataType onnx_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::f64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
        case Dtype::f32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        case Dtype::f16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case Dtype::i64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case Dtype::i32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        case Dtype::i8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        case Dtype::u8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case Dtype::boolean: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

/// Values that onnxruntime reads and writes in memory of ours.
class Values {
public:
    explicit Values(const Onnxruntime& ort) : ort_(ort) {}
    ~Values() {
        for (OrtValue* value : values_) ort_.api().ReleaseValue(value);
    }
    Values(const Values&) = delete;
    Values& operator=(const Values&) = delete;

    /// `name` must outlive this object.
    void add(const char* name, const View& view) {
        OrtValue* value = nullptr;
        // onnxruntime takes arguments without const; it does not write to those of a graph.
        ort_.check(ort_.api().CreateTensorWithDataAsOrtValue(
            ort_.memory(), const_cast<void*>(view.data), view.bytes(), view.shape.data(),
            view.shape.size(), onnx_type(view.dtype), &value));
        values_.push_back(value);
        names_.push_back(name);
    }
    const char* const* names() const { return names_.data(); }
    OrtValue** values() { return values_.data(); }
    std::size_t size() const { return values_.size(); }

private:
    const Onnxruntime& ort_;
    std::vector<OrtValue*> values_;
    std::vector<const char*> names_;
};

/// Shape of a float32 result.
Shape shape_of(const Onnxruntime& ort, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    ort.check(ort.api().GetTensorTypeAndShape(value, &raw));
    const std::shared_ptr<OrtTensorTypeAndShapeInfo> info(
        raw, ort.api().ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t sides = 0;
    ort.check(ort.api().GetTensorElementType(raw, &type));
    ort.check(ort.api().GetDimensionsCount(raw, &sides));
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw Malformed("a result that is no float32");
    Shape shape(sides);
    ort.check(ort.api().GetDimensions(raw, shape.data(), sides));
    return shape;
}

}  // namespace

// ---------------------------------------------------------------- the library

const Onnxruntime& Onnxruntime::open(const Runtime& runtime, bool doubling) {
    // Never released: the sessions of a program may outlive all that knows of it.
    static const Onnxruntime* opened = new Onnxruntime(runtime, doubling);
    return *opened;
}

Onnxruntime::Onnxruntime(const Runtime& runtime, bool doubling) {
    // From 1.29 on official builds send events, unless this is set before the environment is made.
    ::setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite=*/0);
    const OrtApiBase* base = api_base(runtime.onnxruntime)();
    api_ = base->GetApi(kApi);
    if (!api_)
        throw BadInput("onnxruntime", std::string("version ") + base->GetVersionString(),
                       "1.19 or newer", "name another library: --onnxruntime");
    check(api_->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edge-dit", &env_));
    check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
    const char* const keys[] = {"max_mem", "arena_extend_strategy", "initial_chunk_size_bytes",
                                "max_dead_bytes_per_chunk"};
    const std::size_t values[] = {0, doubling ? 0u : 1u, doubling ? kFirstChunk : std::size_t(-1),
                                  kSpare};
    OrtArenaCfg* arena = nullptr;
    check(api_->CreateArenaCfgV2(keys, values, 4, &arena));
    // Refused where the app that this is part of has registered one: its own serves as well.
    if (OrtStatus* refused = api_->CreateAndRegisterAllocator(env_, memory_, arena))
        api_->ReleaseStatus(refused);
    api_->ReleaseArenaCfg(arena);
}

void Onnxruntime::check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    throw Malformed(message);
}

std::shared_ptr<OrtSessionOptions> Onnxruntime::options(int threads) const {
    OrtSessionOptions* raw = nullptr;
    check(api_->CreateSessionOptions(&raw));
    std::shared_ptr<OrtSessionOptions> options(raw, api_->ReleaseSessionOptions);
    check(api_->SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_ERROR));
    check(api_->SetDeterministicCompute(raw, true));
    check(api_->DisableMemPattern(raw));  // a plan would take memory of its own
    if (threads > 0) check(api_->SetIntraOpNumThreads(raw, threads));
    const std::pair<const char*, const char*> entries[] = {
        {"session.intra_op.allow_spinning", "0"},
        {"session.inter_op.allow_spinning", "0"},
        {"session.use_env_allocators", "1"},
        {"session.disable_prepacking", "1"},
        // Folding would keep turned copies of weights, the other one values computed twice.
        {"optimization.disable_specified_optimizers",
         "CommonSubexpressionElimination;ConstantFolding"},
    };
    for (const auto& [key, value] : entries) check(api_->AddSessionConfigEntry(raw, key, value));
    return options;
}

// ---------------------------------------------------------------- a graph

OnnxProgram::OnnxProgram(const Onnxruntime& ort, const Path& path, GraphNames names, int threads)
    : ort_(ort), path_(path), names_(std::move(names)) {
    try {
        OrtSession* session = nullptr;
        const auto options = ort.options(threads);
        ort.check(ort.api().CreateSession(ort.env(), path.c_str(), options.get(), &session));
        session_ = std::shared_ptr<OrtSession>(session, ort.api().ReleaseSession);
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), std::string("onnxruntime cannot load it: ") + fault.what(),
                       "a graph as exported", "export the bundle again");
    }
}

void OnnxProgram::run(const Feeds& feeds, OrtValue** results) const {
    Values in(ort_);
    for (const std::string& name : names_.inputs) {
        const auto feed = feeds.find(name);
        if (feed == feeds.end()) throw Malformed("nothing known of input '" + name + "'");
        in.add(name.c_str(), feed->second);
    }
    std::vector<const char*> names;
    for (const std::string& name : names_.outputs) names.push_back(name.c_str());
    ort_.check(ort_.api().Run(session_.get(), nullptr, in.names(), in.values(), in.size(),
                              names.data(), names.size(), results));
}

void OnnxProgram::run(const Feeds& feeds, const Results& results) const {
    try {
        Values out(ort_);
        for (const std::string& name : names_.outputs) {
            const auto result = results.find(name);
            if (result == results.end()) throw Malformed("nothing known of result '" + name + "'");
            out.add(name.c_str(), result->second->view());
        }
        run(feeds, out.values());
    } catch (const Malformed& fault) {
        refuse(fault);
    }
}

std::map<std::string, Tensor> OnnxProgram::run(const Feeds& feeds) const {
    std::map<std::string, Tensor> results;
    std::vector<OrtValue*> made(names_.outputs.size());
    const auto release = [this](std::vector<OrtValue*>* values) {
        for (OrtValue* value : *values)
            if (value) ort_.api().ReleaseValue(value);
    };
    const std::unique_ptr<std::vector<OrtValue*>, decltype(release)> owned(&made, release);
    try {
        run(feeds, made.data());
        for (std::size_t i = 0; i < made.size(); ++i) {
            Tensor& tensor = results[names_.outputs[i]] = Tensor(shape_of(ort_, made[i]));
            void* data = nullptr;
            ort_.check(ort_.api().GetTensorMutableData(made[i], &data));
            std::memcpy(tensor.values.data(), data, tensor.view().bytes());
        }
    } catch (const Malformed& fault) {
        refuse(fault);
    }
    return results;
}

void OnnxProgram::refuse(const Malformed& fault) const {
    throw BadInput(path_.string(), std::string("onnxruntime cannot run it: ") + fault.what(),
                   "a graph that fits its manifest", "export the bundle again");
}

// ---------------------------------------------------------------- weights

Frozen::Frozen(const Bundle& bundle) : folder_(bundle.folder / "onnx") {
    for (const std::string& name : bundle.onnx->frozen) {
        try {
            files_.push_back(std::make_unique<TensorFile>(folder_ / name));
        } catch (const Malformed& fault) {
            throw BadInput((folder_ / name).string(), fault.what(), "a file of frozen weights",
                           "copy the bundle again, or export it again");
        }
    }
}

const View* Frozen::find(const std::string& key) const {
    for (const auto& file : files_) {
        const auto found = file->tensors().find(key);
        if (found != file->tensors().end()) return &found->second;
    }
    return nullptr;
}

const View& Frozen::at(const std::string& key) const {
    if (const View* view = find(key)) return *view;
    throw BadInput(folder_.string(), "no weight '" + key + "'", "the weights that the manifest names",
                   "export the bundle again");
}

Feeds Frozen::named(const Block::Names& names) const {
    Feeds feeds;
    for (const auto& [local, key] : names) feeds[local] = at(key);
    return feeds;
}

// ---------------------------------------------------------------- int8

bool int8_products_are_exact(const Onnxruntime& ort) {
    // An ONNX model: y = MatMulInteger(x, w); x uint8 [1, 4], w int8 [4, 1], y int32 [1, 1].
    static constexpr unsigned char probe[] = {
        0x08, 0x0A, 0x12, 0x00, 0x3A, 0x5C, 0x0A, 0x18, 0x0A, 0x01, 0x78, 0x0A, 0x01, 0x77,
        0x12, 0x01, 0x79, 0x22, 0x0D, 0x4D, 0x61, 0x74, 0x4D, 0x75, 0x6C, 0x49, 0x6E, 0x74,
        0x65, 0x67, 0x65, 0x72, 0x12, 0x01, 0x67, 0x5A, 0x13, 0x0A, 0x01, 0x78, 0x12, 0x0E,
        0x0A, 0x0C, 0x08, 0x02, 0x12, 0x08, 0x0A, 0x02, 0x08, 0x01, 0x0A, 0x02, 0x08, 0x04,
        0x5A, 0x13, 0x0A, 0x01, 0x77, 0x12, 0x0E, 0x0A, 0x0C, 0x08, 0x03, 0x12, 0x08, 0x0A,
        0x02, 0x08, 0x04, 0x0A, 0x02, 0x08, 0x01, 0x62, 0x13, 0x0A, 0x01, 0x79, 0x12, 0x0E,
        0x0A, 0x0C, 0x08, 0x06, 0x12, 0x08, 0x0A, 0x02, 0x08, 0x01, 0x0A, 0x02, 0x08, 0x01,
        0x42, 0x04, 0x0A, 0x00, 0x10, 0x12};
    OrtSession* raw = nullptr;
    const auto options = ort.options(1);
    ort.check(ort.api().CreateSessionFromArray(ort.env(), probe, sizeof probe, options.get(), &raw));
    const std::shared_ptr<OrtSession> session(raw, ort.api().ReleaseSession);
    const std::uint8_t x[] = {255, 255, 255, 255};
    const std::int8_t w[] = {127, 127, 127, 127};
    std::int32_t y[] = {0};
    Values in(ort), out(ort);
    in.add("x", {Dtype::u8, {1, 4}, x});
    in.add("w", {Dtype::i8, {4, 1}, w});
    out.add("y", {Dtype::i32, {1, 1}, y});
    ort.check(ort.api().Run(raw, nullptr, in.names(), in.values(), in.size(), out.names(),
                            out.size(), out.values()));
    return y[0] == 4 * 255 * 127;
}

}  // namespace edge_dit
