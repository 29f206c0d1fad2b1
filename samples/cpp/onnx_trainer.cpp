// The onnx target: the whole step in one graph, or block by block.
#include <algorithm>

#include "fault.h"
#include "onnx_program.h"
#include "trainer.h"

namespace edge_dit {

namespace {

using Names = std::vector<TensorSpec>;

// `tensors` is empty where a run does not keep them.
void feed(Feeds& feeds, const std::string& prefix, const Names& names, const Tensors& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i)
        feeds[prefix + names[i].name] = tensors[i].view();
}

void collect(Results& results, const std::string& prefix, const Names& names, Tensors& tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i) results[prefix + names[i].name] = &tensors[i];
}

void put(Feeds& feeds, const Feeds& more) {
    for (const auto& [name, view] : more) feeds[name] = view;
}

bool has(const std::vector<std::string>& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

/// What all layouts share: optimizer.onnx.
class OnnxTrainer : public Trainer {
public:
    OnnxTrainer(const Bundle& bundle, const Onnxruntime& ort, int threads)
        : batch_(bundle.batch),
          lora_(bundle.lora),
          optimizer_(ort, bundle.folder / "onnx" / "optimizer.onnx",
                     bundle.onnx->graphs.at("optimizer.onnx"), threads) {}

    void update(float lr, State& state, const Tensors& gradients) override {
        Tensor rate({1}), step({1});
        rate.values[0] = lr;
        step.values[0] = static_cast<float>(state.step);
        Feeds feeds = {{"lr", rate.view()}, {"step", step.view()}};
        feed(feeds, "", lora_, state.adapter);
        feed(feeds, "grad.", lora_, gradients);
        feed(feeds, "exp_avg.", lora_, state.exp_avg);
        feed(feeds, "exp_avg_sq.", lora_, state.exp_avg_sq);
        Results results;  // over the arguments: the graph reads all of a tensor before it writes it
        collect(results, "new.", lora_, state.adapter);
        collect(results, "new.exp_avg.", lora_, state.exp_avg);
        collect(results, "new.exp_avg_sq.", lora_, state.exp_avg_sq);
        optimizer_.run(feeds, results);
    }

protected:
    const Names batch_, lora_;

private:
    OnnxProgram optimizer_;
};

/// One graph for the step.
class WholeTrainer : public OnnxTrainer {
public:
    WholeTrainer(const Bundle& bundle, const std::string& file, const Onnxruntime& ort, int threads)
        : OnnxTrainer(bundle, ort, threads),
          step_(ort, bundle.folder / "onnx" / file, bundle.onnx->graphs.at(file), threads) {}

    float backward(const Tensors& batch, const Tensors& adapter, Tensors& gradients) override {
        Tensor loss(Shape{});
        Feeds feeds;
        feed(feeds, "", batch_, batch);
        feed(feeds, "", lora_, adapter);
        Results results = {{"loss", &loss}};
        collect(results, "grad.", lora_, gradients);
        step_.run(feeds, results);
        return loss.values[0];
    }

private:
    OnnxProgram step_;
};

/// Block by block. Memory holds the states between blocks and one block's activations; weights are
/// read from the mapped files, and the system may drop their pages.
class StreamedTrainer : public OnnxTrainer {
public:
    StreamedTrainer(const Bundle& bundle, const Onnxruntime& ort, int threads);

    float backward(const Tensors& batch, const Tensors& adapter, Tensors& gradients) override;

private:
    /// What flows between blocks: "entry" and, with joint attention, "entry_text".
    using Flow = std::map<std::string, Tensor>;
    /// A block with its weights in the mapped files and its LoRA tensors by number.
    struct Part {
        const OnnxProgram* forward;
        const OnnxProgram* backward;
        Feeds weights;
        std::vector<std::pair<std::string, std::size_t>> lora;
        Block::Names cond, residual;
    };

    Part part(const Block& block, bool with_backward);
    /// A batch tensor that a block has by another name.
    View conditioning(const Feeds& batch, const std::string& name) const;
    /// Add what skipped blocks add to a tensor of the state.
    void add(Flow& flow, const std::string& name, const Feeds& batch,
             const std::string& residual) const;
    Flow forward(const Part& part, Feeds feeds, const Flow& before) const;
    float head(Feeds feeds, const Flow& last, Flow& given) const;
    Flow backward(const Part& part, Feeds feeds, const Flow& before, const Flow& given,
                  Tensors& gradients) const;

    const Path folder_;
    const Frozen frozen_;
    std::map<std::string, OnnxProgram> programs_;  // by file
    std::vector<Part> parts_, forward_only_;
    Feeds head_weights_;
};

StreamedTrainer::StreamedTrainer(const Bundle& bundle, const Onnxruntime& ort, int threads)
    : OnnxTrainer(bundle, ort, threads), folder_(bundle.folder / "onnx"), frozen_(bundle) {
    const Streamed& facts = *bundle.onnx->streamed;
    for (const auto& [file, names] : facts.graphs)
        programs_.emplace(file, OnnxProgram(ort, folder_ / file, names, threads));
    for (const Block& block : facts.blocks) parts_.push_back(part(block, true));
    for (const Block& block : facts.forward_only)
        forward_only_.push_back(part(block, false));
    std::vector<bool> reached(lora_.size());
    for (const Part& part : parts_)
        for (const auto& [local, number] : part.lora) reached[number] = true;
    if (!std::all_of(reached.begin(), reached.end(), [](bool is) { return is; }))
        throw BadInput(bundle.folder.string(), "a LoRA tensor that no block has",
                       "blocks with all of the manifest's tensors", "export the bundle again");
    for (const std::string& name : facts.graphs.at("head.onnx").inputs)
        if (const View* weight = frozen_.find(name)) head_weights_[name] = *weight;
}

StreamedTrainer::Part StreamedTrainer::part(const Block& block, bool with_backward) {
    Part part{&programs_.at(block.file("forward")), nullptr, frozen_.named(block.weights), {},
              block.cond, block.residual};
    if (with_backward) part.backward = &programs_.at(block.file("backward"));
    for (const auto& [local, name] : block.lora) {
        std::size_t number = 0;
        while (number < lora_.size() && lora_[number].name != name) ++number;
        if (number == lora_.size())
            throw BadInput(folder_.parent_path().string(), "a block with LoRA '" + name + "'",
                           "one of the manifest's tensors", "export the bundle again");
        part.lora.emplace_back(local, number);
    }
    return part;
}

View StreamedTrainer::conditioning(const Feeds& batch, const std::string& name) const {
    const auto found = batch.find(name);
    if (found == batch.end())
        throw BadInput(folder_.string(), "a block that reads '" + name + "'",
                       "one of the manifest's batch tensors", "export the bundle again");
    return found->second;
}

void StreamedTrainer::add(Flow& flow, const std::string& name, const Feeds& batch,
                          const std::string& residual) const {
    const auto to = flow.find(name);
    const auto what = batch.find(residual);
    if (to == flow.end() || what == batch.end() || what->second.shape != to->second.shape)
        throw BadInput(folder_.string(), "a residual '" + residual + "' that does not fit " + name,
                       "a batch tensor of the state's shape", "export the bundle again");
    const auto* values = static_cast<const float*>(what->second.data);
    for (float& value : to->second.values) value += *values++;
}

StreamedTrainer::Flow StreamedTrainer::forward(const Part& part, Feeds feeds,
                                               const Flow& before) const {
    put(feeds, part.weights);
    for (const auto& [name, tensor] : before) feeds[name] = tensor.view();
    Flow after;
    Results results;
    for (const auto& [name, tensor] : before) {
        if (!has(part.forward->names().outputs, "new." + name)) continue;
        results["new." + name] = &after.emplace(name, Tensor(tensor.shape)).first->second;
    }
    part.forward->run(feeds, results);
    return after;
}

float StreamedTrainer::head(Feeds feeds, const Flow& last, Flow& given) const {
    put(feeds, head_weights_);
    for (const auto& [name, tensor] : last) feeds[name] = tensor.view();
    Tensor loss(Shape{});
    given["grad.entry"] = Tensor(last.at("entry").shape);
    programs_.at("head.onnx").run(feeds, {{"loss", &loss}, {"new.grad.entry", &given["grad.entry"]}});
    return loss.values[0];
}

StreamedTrainer::Flow StreamedTrainer::backward(const Part& part, Feeds feeds, const Flow& before,
                                                const Flow& given, Tensors& gradients) const {
    put(feeds, part.weights);
    for (const Flow* flow : {&before, &given})
        for (const auto& [name, tensor] : *flow) feeds[name] = tensor.view();
    Flow back;
    Results results;
    for (const auto& [name, tensor] : before) {
        if (!has(part.backward->names().outputs, "new.grad." + name)) continue;
        results["new.grad." + name] =
            &back.emplace("grad." + name, Tensor(tensor.shape)).first->second;
    }
    for (const auto& [local, number] : part.lora) results["grad." + local] = &gradients[number];
    part.backward->run(feeds, results);
    return back;
}

float StreamedTrainer::backward(const Tensors& batch, const Tensors& adapter, Tensors& gradients) {
    Feeds feeds;
    feed(feeds, "", batch_, batch);
    const auto with_lora = [&](const Part& part) {
        Feeds all = feeds;
        for (const auto& [local, name] : part.cond) all[local] = conditioning(feeds, name);
        for (const auto& [local, number] : part.lora) all[local] = adapter[number].view();
        return all;
    };
    std::vector<Flow> borders(1);
    for (std::size_t i = 0; i < batch_.size(); ++i)
        if (batch_[i].name == "entry" || batch_[i].name == "entry_text")
            borders[0][batch_[i].name] = batch[i];
    for (const Part& part : parts_) {
        for (const auto& [name, residual] : part.residual)
            add(borders.back(), name, feeds, residual);
        borders.push_back(forward(part, with_lora(part), borders.back()));
    }
    Flow last = std::move(borders.back());
    borders.pop_back();
    for (const Part& part : forward_only_) last = forward(part, with_lora(part), last);
    Flow given;
    const float loss = head(feeds, last, given);
    for (std::size_t i = parts_.size(); i-- > 0;) {
        given = backward(parts_[i], with_lora(parts_[i]), borders[i], given, gradients);
        borders.pop_back();
    }
    return loss;
}

}  // namespace

std::unique_ptr<Trainer> open_onnx(const Bundle& bundle, const std::string& layout,
                                   const Runtime& runtime) {
    const Onnxruntime& ort = Onnxruntime::open(runtime, layout == "streamed");
    if (bundle.onnx->int8_products && !int8_products_are_exact(ort))
        throw BadInput(bundle.folder.string(),
                       "products in int8, which this processor adds up in 16 bits",
                       "exact sums: a processor with VNNI or AMX, or a 64-bit Arm",
                       "export with [export] compute = \"float32\"");
    if (layout == "streamed")
        return std::make_unique<StreamedTrainer>(bundle, ort, runtime.threads);
    const std::string file = layout == "fused" ? "train_step.onnx" : "train_step.recompute.onnx";
    return std::make_unique<WholeTrainer>(bundle, file, ort, runtime.threads);
}

}  // namespace edge_dit
