#include "bank.h"

#include <cstdio>

#include "fault.h"
#include "noise.h"

namespace edge_dit {

namespace {

constexpr int kSchema = 2;
const char* const kPrompts = "prompts.safetensors";
constexpr std::size_t kMostDraws = std::size_t{1} << 20;

}  // namespace

Bank::Bank(const Path& folder, const Bundle& bundle)
    : folder_(folder), batch_(bundle.batch), seed_(bundle.seed) {
    const Path path = folder / "index.json";
    const std::string remedy = "make a bank: edge-dit precompute JOB --plan plan.json -o bank/";
    const Json index = read_document(path, kSchema, remedy);
    name_ = std::filesystem::canonical(folder).filename().string();
    identity_ = sha256_of(path);
    std::string plan;
    try {
        plan = index.at("plan_hash").text();
        read_index(index);
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), fault.what(), "the index of a bank", remedy);
    }
    if (plan != bundle.plan_hash)
        throw BadInput(folder.string(), "a bank that belongs to plan " + plan.substr(0, 12),
                       "plan " + bundle.plan_hash.substr(0, 12),
                       "precompute again with the plan the bundle was exported for");
    std::vector<Path> wanted = {folder / kPrompts};
    for (std::size_t first = 0; first < draws_.size(); first += shard_)
        wanted.push_back(shard(first));
    for (const Path& file : wanted)
        if (!std::filesystem::is_regular_file(file))
            throw BadInput(folder.string(), "incomplete: no " + file.filename().string(),
                           std::to_string(wanted.size()) + " files besides index.json",
                           "run the same edge-dit precompute again, or copy the bank again");
}

void Bank::read_index(const Json& index) {
    shard_ = index.at("shard").natural(kMostDraws);
    const std::size_t prompts = index.at("prompts").items().size();
    const auto& images = index.at("images").items();
    for (const Json& entry : index.at("draws").items()) {
        Draw draw{"", entry.at("prompt").natural(), entry.at("sigma").real()};
        const std::uint64_t image = entry.at("image").natural();
        if (image < images.size()) draw.image = images[image].at("name").text();
        if (draw.prompt >= prompts) throw Malformed("a draw has a prompt that it does not list");
        draws_.push_back(std::move(draw));
    }
    if (draws_.empty() || draws_.size() > kMostDraws || shard_ == 0)
        throw Malformed(std::to_string(draws_.size()) + " draws, " + std::to_string(shard_) +
                        " a file");
}

std::size_t Bank::number(std::int64_t step) {
    const std::uint64_t epoch = std::uint64_t(step) / draws_.size();
    if (order_.empty() || epoch != order_of_) order_ = permutation(draws_.size(), seed_, epoch);
    order_of_ = epoch;
    return order_[std::uint64_t(step) % draws_.size()];
}

std::string Bank::in_words(std::size_t draw) const {
    char sigma[32];
    std::snprintf(sigma, sizeof sigma, "%.3f", draws_.at(draw).sigma);
    return "draw " + std::to_string(draw) + " (image " + draws_[draw].image + ", sigma " + sigma +
           ")";
}

Path Bank::shard(std::size_t draw) const {
    char name[64];
    std::snprintf(name, sizeof name, "shard-%05zu.safetensors", draw / shard_);
    return folder_ / name;
}

const TensorFile& Bank::file(const Path& path) {
    auto& file = files_[path];
    if (!file) {
        auto opened = std::make_unique<TensorFile>(path);
        const std::string* index = opened->find("index");
        if (!opened->hashed()) throw Malformed("it has no digests");
        if (!index || *index != identity_) throw Malformed("it belongs to another bank");
        file = std::move(opened);
    }
    return *file;
}

View Bank::tensor(std::size_t draw, const std::string& name, Path& path) {
    path = folder_ / kPrompts;
    const TensorFile& prompts = file(path);
    const std::string shared = std::to_string(draws_.at(draw).prompt) + "." + name;
    if (prompts.tensors().count(shared)) return prompts.checked(shared);
    path = shard(draw);
    return file(path).checked(std::to_string(draw) + "." + name);
}

Tensors Bank::read(std::size_t draw) {
    Tensors tensors;
    for (const TensorSpec& spec : batch_) {
        Path path;
        try {
            tensors.push_back(as_float32(tensor(draw, spec.name, path)));
        } catch (const Malformed& fault) {
            throw BadInput(path.string(), std::string("damaged (") + fault.what() + ")", "",
                           "remove it and run the same edge-dit precompute again, or copy it again");
        }
        const Shape& shape = tensors.back().shape;
        if (shape != spec.shape)
            throw BadInput(in_words(draw) + ", " + spec.name, "shape " + edge_dit::in_words(shape),
                           "shape " + edge_dit::in_words(spec.shape) + ", as the bundle takes it",
                           "precompute the bank again with the bundle's plan");
    }
    return tensors;
}

}  // namespace edge_dit
