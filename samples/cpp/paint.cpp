#include "paint.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <stdexcept>

#include "fault.h"
#include "noise.h"
#include "onnx_program.h"
#include "run_folder.h"
#include "tiles.h"

namespace edge_dit {

namespace {

using Named = std::map<std::string, Tensor>;

void put(Feeds& feeds, const Named& tensors) {
    for (const auto& [name, tensor] : tensors) feeds[name] = tensor.view();
}

/// What is known of a prompt at a step: the state between blocks, and conditioning.
struct Begun {
    Named state, cond;
};

/// Drop what no step after the first `done` reads.
void forget(std::vector<Tensor>& kept, const std::vector<PaintStep>& steps, std::size_t done,
            std::vector<std::pair<std::size_t, float>> PaintStep::* read) {
    for (std::size_t number = 0; number < kept.size(); ++number) {
        bool needed = number == done;  // the latents that the next step begins with
        for (std::size_t later = done; later < steps.size(); ++later)
            for (const auto& [wanted, factor] : steps[later].*read)
                needed = needed || wanted == number;
        if (!needed) kept[number] = Tensor();
    }
}

class Painter {
public:
    Painter(const Bundle& bundle, const Runtime& runtime)
        : bundle_(bundle),
          loop_(*bundle.onnx->loop),
          painting_(*loop_.painting),
          runtime_(runtime),
          ort_(Onnxruntime::open(runtime, /*doubling=*/true)),
          frozen_(bundle) {
        const Path path = bundle.folder / "onnx" / "loop.safetensors";
        try {
            tables_ = std::make_unique<TensorFile>(path);
        } catch (const Malformed& fault) {
            throw BadInput(path.string(), fault.what(), "the encoded prompts",
                           "copy the bundle again, or export it again");
        }
    }

    std::size_t prompt(const std::string& text, bool negative) const;
    Tensor latents(std::size_t prompt, std::size_t negative, std::uint64_t seed,
                   const Tensors& adapter,
                   const std::function<void(std::size_t, std::size_t)>& advance);
    Picture decode(const Tensor& latents);

private:
    OnnxProgram& program(const std::string& file);
    Named part(const std::string& file, Feeds feeds);
    Begun begin(const Tensor& latents, double timestep, std::size_t prompt);
    std::vector<Tensor> predict(const Tensor& latents, double timestep,
                                const std::vector<std::size_t>& prompts, const Tensors& adapter);
    Tensor guided(const std::vector<Tensor>& predictions) const;
    /// Shape of the transformer's latents.
    Shape shape() const;

    const Bundle& bundle_;
    const Loop& loop_;
    const Painting& painting_;
    const Runtime runtime_;
    const Onnxruntime& ort_;
    const Frozen frozen_;
    std::unique_ptr<TensorFile> tables_;
    std::map<std::string, OnnxProgram> programs_;
};

std::size_t Painter::prompt(const std::string& text, bool negative) const {
    std::string known;
    for (std::size_t number = 0; number < loop_.prompts.size(); ++number) {
        const bool is_negative = std::count(loop_.negatives.begin(), loop_.negatives.end(), number);
        if (is_negative != negative) continue;
        if (loop_.prompts[number] == text) return number;
        known += (known.empty() ? "'" : "; '") + loop_.prompts[number].substr(0, 60) + "'";
    }
    throw BadInput(bundle_.folder.string(),
                   std::string("no ") + (negative ? "negative " : "") + "prompt '" +
                       text.substr(0, 80) + "'",
                   "one that was encoded when it was exported: " + known.substr(0, 400),
                   "add it to the job's [export] and export again");
}

OnnxProgram& Painter::program(const std::string& file) {
    const auto found = programs_.find(file);
    if (found != programs_.end()) return found->second;
    const auto part = loop_.graphs.find(file);
    const auto block = loop_.block_graphs.find(file);
    if (part == loop_.graphs.end() && block == loop_.block_graphs.end())
        throw BadInput(bundle_.folder.string(), "no graph '" + file + "' in its manifest",
                       "every part of the loop", "export the bundle again");
    const GraphNames& names = part == loop_.graphs.end() ? block->second : part->second.names;
    const Path path = bundle_.folder / "onnx" / file;
    return programs_.emplace(file, OnnxProgram(ort_, path, names, runtime_.threads)).first->second;
}

Named Painter::part(const std::string& file, Feeds feeds) {
    const OnnxProgram& graph = program(file);
    for (const auto& [local, view] : frozen_.named(loop_.graphs.at(file).weights))
        feeds[local] = view;
    return graph.run(feeds);
}

Begun Painter::begin(const Tensor& latents, double timestep, std::size_t prompt) {
    Tensor scaled({1});
    scaled.values[0] = static_cast<float>(timestep * loop_.timestep_factor);
    Feeds feeds = {{"latents", latents.view()}, {"timestep", scaled.view()}};
    const std::string prefix = "prompt." + std::to_string(prompt) + ".";
    for (const auto& [name, view] : tables_->tensors())
        if (name.compare(0, prefix.size(), prefix) == 0)
            feeds["prompt." + name.substr(prefix.size())] = view;
    Begun begun;
    for (auto& [name, tensor] : part("paint.begin.onnx", feeds))
        (name.compare(0, 5, "cond.") == 0 ? begun.cond : begun.state)[name] = std::move(tensor);
    return begun;
}

std::vector<Tensor> Painter::predict(const Tensor& latents, double timestep,
                                     const std::vector<std::size_t>& prompts,
                                     const Tensors& adapter) {
    std::vector<Begun> begun;
    for (const std::size_t prompt : prompts) begun.push_back(begin(latents, timestep, prompt));
    for (const Block& block : loop_.paint_blocks) {
        const OnnxProgram& graph = program("paint." + block.kind + ".forward.onnx");
        Feeds shared = frozen_.named(block.weights);
        for (const auto& [local, name] : block.lora)
            for (std::size_t i = 0; i < bundle_.lora.size(); ++i)
                if (bundle_.lora[i].name == name) shared[local] = adapter[i].view();
        for (Begun& each : begun) {
            Feeds feeds = shared;
            put(feeds, each.state);
            put(feeds, each.cond);
            for (const auto& [local, name] : block.cond) {
                const auto found = each.cond.find(name);
                if (found == each.cond.end())
                    throw BadInput(bundle_.folder.string(), "a block that reads '" + name + "'",
                                   "a result of paint.begin.onnx", "export the bundle again");
                feeds[local] = found->second.view();
            }
            Named after;
            for (auto& [name, tensor] : graph.run(feeds))
                after[name.substr(4)] = std::move(tensor);  // "new.entry"
            each.state = std::move(after);
        }
    }
    std::vector<Tensor> predictions;
    for (const Begun& each : begun) {
        Feeds feeds;
        put(feeds, each.cond);
        feeds["entry"] = each.state.at("entry").view();
        predictions.push_back(part("predict.onnx", feeds).at("prediction"));
        if (predictions.back().shape != shape())
            throw BadInput(bundle_.folder.string(), "a prediction of another shape",
                           in_words(shape()), "export the bundle again");
    }
    return predictions;
}

Tensor Painter::guided(const std::vector<Tensor>& predictions) const {
    Tensor result = predictions[0];
    if (predictions.size() == 1) return result;
    const Tensor &wanted = predictions[0], &unwanted = predictions[1];
    for (std::size_t i = 0; i < result.values.size(); ++i)
        result.values[i] = unwanted.values[i] +
                           painting_.scale * (wanted.values[i] - unwanted.values[i]);
    if (painting_.guidance != "rescaled") return result;
    const auto row = static_cast<std::size_t>(result.shape.back());
    const auto norm = [row](const float* values) {
        double sum = 0;
        for (std::size_t i = 0; i < row; ++i) sum += double(values[i]) * values[i];
        return static_cast<float>(std::sqrt(sum));
    };
    for (std::size_t i = 0; i < result.values.size(); i += row) {
        const float share = norm(&wanted.values[i]) / norm(&result.values[i]);
        for (std::size_t j = i; j < i + row; ++j) result.values[j] *= share;
    }
    return result;
}

Shape Painter::shape() const {
    const std::int64_t side = painting_.side / loop_.latents.factor;
    const std::int64_t channels = loop_.latents.channels();
    return loop_.latents.packed ? Shape{1, side * side / 4, 4 * channels}
                                : Shape{1, channels, side, side};
}

Tensor Painter::latents(std::size_t prompt, std::size_t negative, std::uint64_t seed,
                        const Tensors& adapter,
                        const std::function<void(std::size_t, std::size_t)>& advance) {
    std::vector<std::size_t> prompts = {prompt};
    if (painting_.guidance != "none") prompts.push_back(negative);
    std::vector<Tensor> latents(1, Tensor(shape())), predictions;
    latents[0].values = normal(seed, Stream::noise, latents[0].values.size());
    for (const PaintStep& step : painting_.steps) {
        predictions.push_back(guided(predict(latents.back(), step.timestep, prompts, adapter)));
        Tensor next(shape());
        bool first = true;
        const auto add = [&](const Tensor& term, float factor) {
            for (std::size_t i = 0; i < next.values.size(); ++i) {
                const float product = factor * term.values[i];
                next.values[i] = first ? product : next.values[i] + product;
            }
            first = false;
        };
        for (const auto& [number, factor] : step.latents) add(latents[number], factor);
        for (const auto& [number, factor] : step.predictions) add(predictions[number], factor);
        latents.push_back(std::move(next));
        forget(latents, painting_.steps, predictions.size(), &PaintStep::latents);
        forget(predictions, painting_.steps, predictions.size(), &PaintStep::predictions);
        if (advance) advance(predictions.size(), painting_.steps.size());
    }
    return latents.back();
}

Picture Painter::decode(const Tensor& latents) {
    const Tensor raw = unpacked(latents, loop_.latents, painting_.side / loop_.latents.factor);
    const auto run = [&](const Tensor& tile) {
        return part("vae_decoder.onnx", {{"latents", tile.view()}}).at("pixels");
    };
    const std::int64_t factor = loop_.latents.factor;
    const Tensor pixels = enlarged_by_tiles(raw, run, loop_.tile / factor, factor);
    Picture picture{painting_.side, {}};
    const auto area = static_cast<std::size_t>(picture.side * picture.side);
    if (pixels.values.size() != 3 * area)
        throw BadInput(bundle_.folder.string(), "pixels of shape " + in_words(pixels.shape),
                       "a picture of " + std::to_string(picture.side) + " pixels a side",
                       "export the bundle again");
    picture.rgb.resize(3 * area);
    for (std::size_t i = 0; i < area; ++i)
        for (std::size_t c = 0; c < 3; ++c) {
            const float share = pixels.values[c * area + i] / 2.0f + 0.5f;
            const float whole = std::nearbyint(std::min(std::max(share, 0.0f), 1.0f) * 255.0f);
            picture.rgb[3 * i + c] = static_cast<unsigned char>(whole);
        }
    return picture;
}

/// The adapter of a run; of none the bundle's untrained one, whose B is zero.
Tensors adapter_of(const Bundle& bundle, const std::optional<Path>& run) {
    if (run) return RunFolder(*run).adapter(bundle);
    Tensors adapter = bundle.adapter().first;
    for (std::size_t i = 0; i < adapter.size(); ++i)
        if (bundle.lora[i].name.find(".lora_B.") != std::string::npos)
            adapter[i] = Tensor(adapter[i].shape);
    return adapter;
}

Picture painted(const Bundle& bundle, const Request& request,
                const std::function<void(std::size_t, std::size_t)>& advance) {
    Painter painter(bundle, request.runtime);
    const std::size_t prompt = painter.prompt(request.prompt, false);
    std::size_t negative = bundle.onnx->loop->negative.value_or(0);
    if (request.negative) negative = painter.prompt(*request.negative, true);
    const Tensors adapter = adapter_of(bundle, request.run);
    return painter.decode(painter.latents(prompt, negative, request.seed, adapter, advance));
}

}  // namespace

Picture paint(const Request& request,
              const std::function<void(std::size_t, std::size_t)>& advance) {
    const Bundle bundle = open_bundle(request.bundle);
    if (!bundle.onnx || !bundle.onnx->loop)
        throw BadInput(bundle.folder.string(), "no parts of the loop",
                       "a bundle that paints by itself",
                       "put loop = true under [export] in the job, and export it again");
    if (!bundle.onnx->loop->painting)
        throw BadInput(bundle.folder.string(),
                       "it cannot paint: " + bundle.onnx->loop->no_painting,
                       "a model whose scheduler's steps can be written down",
                       "paint with diffusers: edge-dit adapter RUN -o lora/");
    check_bundle(bundle, "onnx", /*all=*/false);
    try {
        return painted(bundle, request, advance);
    } catch (const Malformed& fault) {
        throw BadInput(bundle.folder.string(), fault.what(), "parts that fit each other",
                       "export the bundle again");
    } catch (const std::out_of_range&) {
        throw BadInput(bundle.folder.string(), "a part of the loop without a result it should have",
                       "parts that fit each other", "export the bundle again");
    }
}

}  // namespace edge_dit
