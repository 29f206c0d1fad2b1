#include "run_folder.h"

#include <algorithm>
#include <cstring>

#include "fault.h"

namespace edge_dit {

namespace {

const char* const kRun = "run.json";
const char* const kState = "state.safetensors";
const std::string kDraws = "run.draw", kLosses = "run.loss";

/// Prefix in the file -> part of a state.
const std::pair<const char*, Tensors State::*> kParts[] = {
    {"adapter.", &State::adapter}, {"exp_avg.", &State::exp_avg}, {"exp_avg_sq.", &State::exp_avg_sq}};
/// Whether a run keeps a part: without beta1 there is no first moment.
bool keeps(const Bundle& bundle, Tensors State::*part) {
    return part != &State::exp_avg || bundle.beta1 > 0;
}
/// Of a run that is smoothed: the adapter's average, sums of gradients, number of their draws.
const std::string kAverage = "ema.", kSum = "sum.", kSummed = "summed";

/// A one-dimensional tensor of a checkpoint.
template <class T>
std::vector<T> row(const TensorFile& file, const std::string& name, Dtype dtype) {
    const View& view = file.checked(name);
    if (view.dtype != dtype || view.shape.size() != 1) throw Malformed("'" + name + "' is no row");
    std::vector<T> values(count_of(view.shape));
    if (!values.empty()) std::memcpy(values.data(), view.data, view.bytes());
    return values;
}

/// The run in a checkpoint's metadata.
Run run_of(const TensorFile& file) {
    const std::string* text = file.find("run");
    if (!text || !file.hashed()) throw Malformed("it does not say what it belongs to");
    return Run::from(parse_json(*text));
}

Tensors lora_of(const TensorFile& file, const Bundle& bundle, const std::string& prefix) {
    Tensors tensors;
    for (const TensorSpec& spec : bundle.lora) {
        const std::string name = prefix + spec.name;
        tensors.push_back(as_float32(file.checked(name)));
        if (tensors.back().shape != spec.shape)
            throw Malformed("'" + name + "' is not " + in_words(spec.shape));
    }
    return tensors;
}

std::int64_t count_in(const TensorFile& file, const std::string& name) {
    const auto number = row<std::int64_t>(file, name, Dtype::i64);
    if (number.size() != 1 || number[0] < 0) throw Malformed("'" + name + "' is no number");
    return number[0];
}

State state_of(const TensorFile& file, const Bundle& bundle) {
    State state;
    for (const auto& [prefix, part] : kParts)
        if (keeps(bundle, part)) state.*part = lora_of(file, bundle, prefix);
    if (bundle.ema > 0) state.average = lora_of(file, bundle, kAverage);
    state.step = count_in(file, "step");
    if (file.tensors().count(kSummed)) {
        state.summed = count_in(file, kSummed);
        state.sum = lora_of(file, bundle, kSum);
    }
    return state;
}

std::string csv_of(const Losses& losses, const Bank& bank) {
    std::string text = "step,draw,sigma,loss\n";
    for (std::size_t i = 0; i < losses.draws.size(); ++i) {
        const auto draw = static_cast<std::size_t>(losses.draws[i]);
        text += std::to_string(i) + "," + std::to_string(draw) + "," + repr(bank.sigma(draw)) +
                "," + repr(losses.losses[i]) + "\n";
    }
    return text;
}

}  // namespace

bool Run::same_as(const Run& other) const {
    return manifest_sha256 == other.manifest_sha256 && bank_sha256 == other.bank_sha256 &&
           target == other.target && layout == other.layout;
}

Json Run::json() const {
    Json json = Json::object();
    json.add("bundle", Json::of(bundle));
    json.add("bank", Json::of(bank));
    json.add("target", Json::of(target));
    json.add("layout", Json::of(layout));
    json.add("manifest_sha256", Json::of(manifest_sha256));
    json.add("bank_sha256", Json::of(bank_sha256));
    json.add("family", Json::of(family));
    json.add("base_model", Json::of(base_model));
    json.add("rank", Json::of_whole(rank));
    json.add("alpha", Json::of_real(alpha));
    json.add("steps", Json::of_whole(steps));
    json.add("done", Json::of_whole(done));
    return json;
}

Run Run::from(const Json& json) {
    Run run;
    run.bundle = json.at("bundle").text();
    run.bank = json.at("bank").text();
    run.target = json.at("target").text();
    run.layout = json.at("layout").text();
    run.manifest_sha256 = json.at("manifest_sha256").text();
    run.bank_sha256 = json.at("bank_sha256").text();
    run.family = json.at("family").text();
    run.base_model = json.at("base_model").text();
    run.rank = static_cast<std::int64_t>(json.at("rank").natural());
    run.alpha = json.at("alpha").real();
    run.steps = static_cast<std::int64_t>(json.at("steps").natural());
    run.done = static_cast<std::int64_t>(json.at("done").natural());
    return run;
}

Run RunFolder::read() const {
    const std::string remedy = "start a run in another folder: -o";
    try {
        return Run::from(read_document(path_ / kRun, 0, remedy));
    } catch (const Malformed& fault) {
        throw BadInput((path_ / kRun).string(), fault.what(), "a run's run.json", remedy);
    }
}

std::optional<Run> RunFolder::previous(bool resume) const {
    bool empty = true;  // hidden files do not count
    if (std::filesystem::exists(path_) && !std::filesystem::is_directory(path_)) empty = false;
    else if (std::filesystem::exists(path_))
        for (const auto& entry : std::filesystem::directory_iterator(path_))
            empty = empty && entry.path().filename().string()[0] == '.';
    if (empty && resume)
        throw BadInput(path_.string(), "no run to resume", "a run folder",
                       "leave out --resume to start one");
    if (empty) return std::nullopt;
    Run run = read();
    if (!resume)
        throw BadInput(path_.string(),
                       "a run is there already (" + std::to_string(run.done) + " of " +
                           std::to_string(run.steps) + " steps)",
                       "a new or empty folder", "--resume continues it; or choose another -o");
    return run;
}

void RunFolder::begin(const Run& run) const { write_document(path_ / kRun, run.json()); }

Losses RunFolder::restore(const Bundle& bundle, const Run& run, State& state) const {
    const Path path = path_ / kState;
    if (!std::filesystem::exists(path)) return {};
    Losses losses;
    Run saved;
    try {
        const TensorFile file(path);
        saved = run_of(file);
        losses.draws = row<std::int64_t>(file, kDraws, Dtype::i64);
        losses.losses = row<double>(file, kLosses, Dtype::f64);
        if (saved.done != losses.size() || losses.losses.size() != losses.draws.size())
            throw Malformed(std::to_string(saved.done) + " steps, " +
                            std::to_string(losses.size()) + " losses");
        if (saved.same_as(run) && read().same_as(run)) {
            state = state_of(file, bundle);
            return losses;
        }
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), std::string("damaged checkpoint (") + fault.what() + ")",
                       "a whole one", "start a new run with another -o");
    }
    throw BadInput(path_.string(),
                   "a run of target " + saved.target + ", " + saved.layout + ", of " +
                       saved.bundle + " and " + saved.bank,
                   "the bundle, bank, target and layout it was started with",
                   "pass those, or start a new run with another -o");
}

void RunFolder::save(const Bundle& bundle, const Bank& bank, const Run& run, const State& state,
                     const Losses& losses) const {
    std::map<std::string, View> tensors;
    const auto put = [&](const std::string& prefix, const Tensors& values) {
        if (!all_finite(values))
            throw BadInput(path_.string(),
                           "training diverged before step " + std::to_string(losses.size()) +
                               ": the adapter is not finite",
                           "numbers; the last checkpoint is kept", "plan with a lower lr");
        for (std::size_t i = 0; i < values.size(); ++i)
            tensors[prefix + bundle.lora[i].name] = values[i].view();
    };
    for (const auto& [prefix, part] : kParts) put(prefix, state.*part);
    put(kAverage, state.average);
    put(kSum, state.sum);
    if (state.summed) tensors[kSummed] = {Dtype::i64, {1}, &state.summed};
    const Shape steps = {losses.size()};
    tensors["step"] = {Dtype::i64, {1}, &state.step};
    tensors[kDraws] = {Dtype::i64, steps, losses.draws.data()};
    tensors[kLosses] = {Dtype::f64, steps, losses.losses.data()};
    Run saved = run;
    saved.done = losses.size();
    write_tensors(path_ / kState, tensors, {{"run", dump_json(saved.json(), JsonStyle::plain)}});
    write_whole(path_ / "loss.csv", {csv_of(losses, bank)});
    write_document(path_ / kRun, saved.json());
}

Tensors RunFolder::adapter(const Bundle& bundle) const {
    const Path path = path_ / kState;
    try {
        const TensorFile file(path);
        const Run saved = run_of(file);
        if (saved.manifest_sha256 == bundle.sha256) return state_of(file, bundle).trained();
        throw BadInput(path_.string(), "a run of another bundle (" + saved.bundle + ")",
                       "a run of " + bundle.folder.string(), "name the bundle that it trained");
    } catch (const Malformed& fault) {
        throw BadInput(path.string(), std::string("no whole checkpoint (") + fault.what() + ")", "",
                       "train first");
    }
}

void RunFolder::finish(const Bundle& bundle, const State& state) const {
    std::map<std::string, View> tensors;
    for (std::size_t i = 0; i < bundle.lora.size(); ++i)
        tensors[bundle.lora[i].name] = state.trained()[i].view();
    write_tensors(path_ / "adapter.safetensors", tensors, bundle.adapter().second);
}

}  // namespace edge_dit
