#include "bundle.h"

#include <algorithm>
#include <set>

#include "external_data.h"
#include "fault.h"
#include "sha256.h"

namespace edge_dit {

namespace {

constexpr int kSchema = 2;
constexpr std::size_t kDocumentLimit = std::size_t{64} << 20;
/// Most pixels of a side, and most steps and prompts.
constexpr std::uint64_t kMostSide = 65536;
const std::string kExportAgain = "copy the bundle again, or export it again";

/// Whether a name is a plain file name: no path, not hidden.
bool is_plain(const std::string& name) {
    return !name.empty() && name.size() < 256 && name[0] != '.' &&
           std::none_of(name.begin(), name.end(), [](unsigned char c) {
               return c < 0x20 || c == '/' || c == '\\' || c == ':';
           });
}

const std::string& plain(const std::string& name) {
    if (!is_plain(name)) throw Malformed("'" + name.substr(0, 80) + "' is no plain file name");
    return name;
}

std::vector<std::string> plain_names(const Json& value) {
    std::vector<std::string> names;
    for (const std::string& name : value.texts()) names.push_back(plain(name));
    return names;
}

Block::Names names_of(const Json& object) {
    Block::Names names;
    for (const auto& [name, value] : object.members()) names.emplace_back(name, value.text());
    return names;
}

std::map<std::string, GraphNames> graphs_of(const Json& object) {
    std::map<std::string, GraphNames> graphs;
    for (const auto& [file, graph] : object.members())
        graphs[plain(file)] = {graph.at("inputs").texts(), graph.at("outputs").texts()};
    return graphs;
}

std::vector<Block> blocks_of(const Json& list) {
    std::vector<Block> blocks;
    for (const Json& entry : list.items()) {
        Block block;
        block.kind = plain(entry.at("kind").text());
        block.weights = names_of(entry.at("weights"));
        block.lora = names_of(entry.at("lora"));
        if (const Json* cond = entry.find("cond")) block.cond = names_of(*cond);
        if (const Json* residual = entry.find("residual")) block.residual = names_of(*residual);
        blocks.push_back(std::move(block));
    }
    return blocks;
}

Streamed streamed_of(const Json& entry) {
    Streamed streamed;
    streamed.graphs = graphs_of(entry.at("graphs"));
    streamed.blocks = blocks_of(entry.at("blocks"));
    if (const Json* more = entry.find("forward_only")) streamed.forward_only = blocks_of(*more);
    std::vector<std::string> wanted = {"head.onnx"};
    for (const Block& block : streamed.blocks) {
        wanted.push_back(block.file("forward"));
        wanted.push_back(block.file("backward"));
    }
    for (const Block& block : streamed.forward_only) wanted.push_back(block.file("forward"));
    for (const std::string& file : wanted)
        if (!streamed.graphs.count(file)) throw Malformed("no graph '" + file + "'");
    return streamed;
}

bool is_there(const Json* value) { return value && value->kind() != Json::Kind::null; }

std::vector<float> floats(const Json& list) {
    std::vector<float> values;
    for (const Json& item : list.items()) values.push_back(static_cast<float>(item.real()));
    return values;
}

Latents latents_of(const Json& entry) {
    Latents latents{floats(entry.at("shift")), floats(entry.at("scale")),
                    entry.at("packed").boolean(),
                    entry.find("of_tokens") && entry.at("of_tokens").boolean(),
                    static_cast<std::int64_t>(entry.at("factor").natural(kMostSide))};
    if (latents.shift.empty() || latents.shift.size() != latents.scale.size() || !latents.factor ||
        !latents.channels())
        throw Malformed("latents without channels");
    return latents;
}

/// Factors of a step, which reads results of steps that are done.
std::vector<std::pair<std::size_t, float>> factors_of(const Json& object, std::size_t known) {
    std::vector<std::pair<std::size_t, float>> factors;
    for (const auto& [number, factor] : object.members()) {
        const std::size_t step = parse_json(number).natural(kMostSide);
        if (step >= known) throw Malformed("a step of painting that reads a later one");
        factors.emplace_back(step, static_cast<float>(factor.real()));
    }
    return factors;
}

Painting painting_of(const Json& entry) {
    Painting painting;
    painting.side = static_cast<std::int64_t>(entry.at("side").natural(kMostSide));
    painting.guidance = entry.at("guidance").text();
    painting.scale = static_cast<float>(entry.at("scale").real());
    for (const Json& step : entry.at("steps").items()) {
        const std::size_t known = painting.steps.size() + 1;
        painting.steps.push_back({step.at("timestep").real(),
                                  factors_of(step.at("latents"), known),
                                  factors_of(step.at("predictions"), known)});
        if (painting.steps.back().latents.empty()) throw Malformed("a step without latents");
    }
    if (painting.steps.empty() || !painting.side) throw Malformed("a painting without steps");
    return painting;
}

Loop loop_of(const Json& entry) {
    Loop loop;
    for (const auto& [file, graph] : entry.at("graphs").members())
        loop.graphs[plain(file)] = {{graph.at("inputs").texts(), graph.at("outputs").texts()},
                                    names_of(graph.at("weights"))};
    loop.block_graphs = graphs_of(entry.at("block_graphs"));
    loop.paint_blocks = blocks_of(entry.at("paint_blocks"));
    loop.latents = latents_of(entry.at("latents"));
    loop.timestep_factor = entry.at("timestep_factor").real();
    loop.tile = static_cast<std::int64_t>(entry.at("tile").natural(kMostSide));
    loop.prompts = entry.at("prompts").texts();
    for (const Json& number : entry.at("negatives").items())
        loop.negatives.push_back(number.natural(kMostSide));
    if (is_there(entry.find("negative"))) loop.negative = entry.at("negative").natural(kMostSide);
    if (is_there(entry.find("painting"))) loop.painting = painting_of(entry.at("painting"));
    if (is_there(entry.find("no_painting"))) loop.no_painting = entry.at("no_painting").text();
    return loop;
}

OnnxFacts onnx_of(const Json& entry) {
    OnnxFacts facts;
    const Json& frozen = entry.at("frozen");  // schema 1 has one name, not a list
    if (frozen.kind() == Json::Kind::text)
        facts.frozen = {plain(frozen.text())};
    else
        facts.frozen = plain_names(frozen);
    if (facts.frozen.empty()) throw Malformed("no files of frozen weights");
    if (const Json* compute = entry.find("compute"))
        facts.int8_products = compute->text() != "float32";  // "int8" or "int8-rotated"
    facts.graphs = graphs_of(entry.at("graphs"));
    if (is_there(entry.find("streamed"))) facts.streamed = streamed_of(entry.at("streamed"));
    if (is_there(entry.find("loop"))) facts.loop = loop_of(entry.at("loop"));
    if (!facts.graphs.count("optimizer.onnx")) throw Malformed("no graph 'optimizer.onnx'");
    return facts;
}

void read_plan(const Json& plan, Bundle& bundle) {
    bundle.model_name = plan.at("model_name").text();
    bundle.rank = std::int64_t(plan.at("rank").natural());
    bundle.alpha = plan.at("alpha").real();
    bundle.steps = std::int64_t(plan.at("steps").natural());
    bundle.seed = plan.at("seed").natural(UINT64_MAX);
    if (const Json* layout = plan.find("layout")) bundle.planned_layout = layout->text();
    if (const Json* schedule = plan.find("schedule")) bundle.schedule = schedule->text();
    if (const Json* warmup = plan.find("warmup")) bundle.warmup = std::int64_t(warmup->natural());
    if (const Json* draws = plan.find("accumulate"))
        bundle.accumulate = std::int64_t(draws->natural());
    if (const Json* decay = plan.find("ema")) bundle.ema = decay->real();
    if (bundle.accumulate < 1 || !(bundle.ema >= 0 && bundle.ema < 1))
        throw Malformed("no draws of an update, or no decay below 1");
}

void read_tensors(const Json& list, Bundle& bundle) {
    for (const Json& entry : list.items()) {
        TensorSpec spec{entry.at("name").text(), {}};
        for (const Json& side : entry.at("shape").items())
            spec.shape.push_back(std::int64_t(side.natural(INT32_MAX)));
        count_of(spec.shape);
        const std::string& role = entry.at("role").text();
        if (role == "batch") bundle.batch.push_back(std::move(spec));
        else if (role == "lora") bundle.lora.push_back(std::move(spec));
    }
    if (bundle.batch.empty() || bundle.lora.empty()) throw Malformed("no batch or no LoRA");
}

void read_files(const Json& list, Bundle& bundle) {
    for (const Json& entry : list.items()) {
        const std::string& path = entry.at("path").text();
        std::size_t begin = 0;
        while (begin <= path.size()) {
            const std::size_t end = std::min(path.find('/', begin), path.size());
            plain(path.substr(begin, end - begin));
            begin = end + 1;
        }
        bundle.files.push_back({path, entry.at("bytes").natural(), entry.at("sha256").text()});
    }
}

void check_file(const Bundle& bundle, const Bundle::File& file, bool all) {
    const Path path = bundle.folder / file.path;
    std::error_code error;
    const Path real = std::filesystem::canonical(path, error);
    if (error || !std::filesystem::is_regular_file(real))
        throw BadInput(path.string(), "missing", "a file", kExportAgain);
    const Path root = std::filesystem::canonical(bundle.folder);
    if (std::mismatch(root.begin(), root.end(), real.begin(), real.end()).first != root.end())
        throw BadInput(path.string(), "leads out of the bundle", "files within the bundle",
                       "copy the files themselves into the bundle (cp -RL)");
    const auto size = std::filesystem::file_size(real);
    if (size != file.bytes)
        throw BadInput(path.string(), std::to_string(size) + " bytes",
                       std::to_string(file.bytes) + " bytes", kExportAgain);
    if ((all || size <= kSmallFile) && sha256_of(real) != file.sha256)
        throw BadInput(path.string(), "damaged or replaced",
                       "SHA-256 " + file.sha256.substr(0, 16) + "..., as the manifest says",
                       kExportAgain);
}

/// onnxruntime 1.19 follows a graph's reference to its weights out of the bundle.
void check_references(const Path& graph) {
    for (const std::string& name : external_locations(MappedFile(graph).bytes()))
        if (!is_plain(name))
            throw BadInput(graph.string(), "its weights lie in '" + name.substr(0, 80) + "'",
                           "names of files in the same folder",
                           "do not use this bundle; export one from the model");
}

}  // namespace

Json read_document(const Path& path, int schema, const std::string& remedy) {
    if (!std::filesystem::exists(path))
        throw BadInput(path.parent_path().string(), "no " + path.filename().string() + " in it", "",
                       remedy);
    Json document;
    std::string claimed;
    try {
        const MappedFile file(path);
        if (file.size() > kDocumentLimit) throw Malformed("larger than 64 MiB");
        document = parse_json(file.bytes());
        if (schema) {
            const auto version = document.at("schema_version").natural();
            if (version < 1 || version > std::uint64_t(schema))
                throw BadInput(path.string(), "schema version " + std::to_string(version),
                               "at most " + std::to_string(schema),
                               "take a newer edge-dit-train, or one that fits this file");
        }
        claimed = document.at("sha256").text();
        document.take("sha256");
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), std::string("unreadable (") + fault.what() + ")", "", remedy);
    }
    if (json_digest(document) != claimed)
        throw BadInput(path.string(), "damaged or edited: not the content it was written with",
                       "content of SHA-256 " + claimed.substr(0, 16) + "...", remedy);
    return document;
}

void write_document(const Path& path, Json document) {
    document.add("sha256", Json::of(json_digest(document)));
    write_whole(path, {dump_json(document, JsonStyle::indented), "\n"});
}

std::vector<std::string> Bundle::layouts(const std::string& target) const {
    if (std::find(targets.begin(), targets.end(), target) == targets.end()) return {};
    if (target != "onnx") return {"fused"};
    std::vector<std::string> all;
    if (onnx->graphs.count("train_step.onnx")) all.push_back("fused");
    if (onnx->graphs.count("train_step.recompute.onnx")) all.push_back("recompute");
    if (onnx->streamed) all.push_back("streamed");
    return all;
}

std::pair<Tensors, TensorFile::Metadata> Bundle::adapter() const {
    const Path path = folder / "adapter.safetensors";
    try {
        const TensorFile file(path);
        Tensors tensors;
        for (const TensorSpec& spec : lora) {
            tensors.push_back(as_float32(file.checked(spec.name)));
            if (tensors.back().shape != spec.shape)
                throw Malformed("'" + spec.name + "' of shape " + in_words(tensors.back().shape) +
                                ", not " + in_words(spec.shape));
        }
        TensorFile::Metadata metadata;
        for (const auto& [key, value] : file.metadata())
            if (key.compare(0, 6, "sha256") != 0) metadata.emplace_back(key, value);
        return {std::move(tensors), std::move(metadata)};
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), fault.what(), "the LoRA of this bundle", kExportAgain);
    }
}

Bundle open_bundle(const Path& folder) {
    const Path path = folder / "manifest.json";
    const std::string remedy = "make a bundle: edge-dit export JOB --plan plan.json -o bundle/";
    const Json manifest = read_document(path, kSchema, remedy);
    Bundle bundle;
    bundle.folder = folder;
    bundle.sha256 = sha256_of(path);
    try {
        bundle.family = manifest.at("family").text();
        bundle.plan_hash = manifest.at("plan_hash").text();
        bundle.lr = manifest.at("optimizer").at("lr").real();
        bundle.beta1 = manifest.at("optimizer").at("beta1").real();
        read_plan(manifest.at("plan"), bundle);
        read_tensors(manifest.at("tensors"), bundle);
        read_files(manifest.at("files"), bundle);
        for (const auto& [target, entry] : manifest.at("targets").members()) {
            bundle.targets.push_back(target);
            if (target == "onnx") bundle.onnx = onnx_of(entry);
        }
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), fault.what(), "the manifest of a bundle", remedy);
    }
    return bundle;
}

void check_bundle(const Bundle& bundle, const std::string& target, bool all) {
    std::set<std::string> listed;
    for (const Bundle::File& file : bundle.files) {
        if (file.path != "adapter.safetensors" && file.path.rfind(target + "/", 0) != 0) continue;
        check_file(bundle, file, all);
        listed.insert(file.path);
        const Path path = bundle.folder / file.path;
        try {
            if (path.extension() == ".onnx") check_references(path);
        } catch (const Malformed& fault) {
            throw BadInput(path.string(), std::string("not an ONNX file (") + fault.what() + ")",
                           "a graph as exported", kExportAgain);
        }
    }
    if (!listed.count("adapter.safetensors"))
        throw BadInput((bundle.folder / "manifest.json").string(), "lists no adapter.safetensors",
                       "every file of the bundle", kExportAgain);
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(bundle.folder / target, error)) {
        const std::string name = entry.path().filename().string();
        if (name[0] != '.' && !listed.count(target + "/" + name))
            throw BadInput(entry.path().string(), "not in the manifest",
                           "only files that the manifest lists", kExportAgain);
    }
    if (error)
        throw BadInput((bundle.folder / target).string(), "missing", "a folder", kExportAgain);
}

}  // namespace edge_dit
