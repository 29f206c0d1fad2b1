// The bundle: its manifest, and whether its files are those that the manifest lists.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "tensors.h"

namespace edge_dit {

/// A JSON document of ours, whose digest is right. Throws `BadInput` if it is missing, damaged, or
/// of a schema newer than `schema`; `remedy` says what makes one. A document without schemas has 0.
Json read_document(const Path& path, int schema, const std::string& remedy);
/// Write a JSON document with its digest, as Python does.
void write_document(const Path& path, Json document);

struct TensorSpec {
    std::string name;
    Shape shape;
};

/// Names of a graph's arguments and results, in order.
struct GraphNames {
    std::vector<std::string> inputs, outputs;
};

/// A block of the streamed layout. Each map is from a name in the graphs of its kind.
struct Block {
    using Names = std::vector<std::pair<std::string, std::string>>;

    std::string kind;
    Names weights;   // to a key in the files of frozen weights
    Names lora;      // to a LoRA name
    Names cond;      // to a batch tensor, where it has another name there
    Names residual;  // from a tensor of the state to the batch tensor that is added to it before

    std::string file(const std::string& direction) const {
        return "block." + kind + "." + direction + ".onnx";
    }
};

struct Streamed {
    std::map<std::string, GraphNames> graphs;  // by file
    std::vector<Block> blocks;
    std::vector<Block> forward_only;
};

/// A graph of the loop that is not a block's, with its weights.
struct LoopGraph {
    GraphNames names;
    Block::Names weights;  // input -> key in the files of frozen weights
};

/// How the autoencoder's latents and the transformer's differ: (raw - shift) * scale by channel; if
/// packed, 2 x 2 of them are a token, and the channels that are scaled may be those of tokens.
struct Latents {
    std::vector<float> shift, scale;
    bool packed = false, of_tokens = false;
    std::int64_t factor = 1;  // pixels a side

    /// Channels of the autoencoder's latents.
    std::int64_t channels() const {
        return static_cast<std::int64_t>(scale.size()) / (of_tokens ? 4 : 1);
    }
};

/// A step of the scheduler: the sum of earlier latents and guided predictions times their factors.
struct PaintStep {
    double timestep = 0;
    std::vector<std::pair<std::size_t, float>> latents, predictions;  // number of a step, factor
};

struct Painting {
    std::int64_t side = 0;  // of the picture, in pixels
    std::vector<PaintStep> steps;
    std::string guidance;  // "none", "classifier-free" or "rescaled"
    float scale = 0;
};

/// What paints pictures. The parts that read pictures are left out.
struct Loop {
    std::map<std::string, LoopGraph> graphs;        // by file
    std::map<std::string, GraphNames> block_graphs;  // by file
    std::vector<Block> paint_blocks;
    Latents latents;
    double timestep_factor = 1;
    std::int64_t tile = 1;  // pixels a side that the decoder takes at once
    std::vector<std::string> prompts;
    std::vector<std::size_t> negatives;
    std::optional<std::size_t> negative;
    std::optional<Painting> painting;
    std::string no_painting;  // why not
};

struct OnnxFacts {
    std::vector<std::string> frozen;  // files of frozen weights
    bool int8_products = false;
    std::map<std::string, GraphNames> graphs;
    std::optional<Streamed> streamed;
    std::optional<Loop> loop;
};

struct Bundle {
    Path folder;
    std::string sha256;  // of manifest.json
    std::string family, plan_hash;
    std::vector<TensorSpec> batch, lora;  // in the order of the graphs' arguments
    double lr = 0;
    double beta1 = 0;  // of AdamW; at 0 a run keeps no first moment
    std::vector<std::string> targets;
    std::optional<OnnxFacts> onnx;

    // of the plan
    std::string model_name, planned_layout;
    std::string schedule = "decay";  // of the learning rate
    std::int64_t warmup = 0;         // its first steps
    std::int64_t accumulate = 1;     // draws of an update
    double ema = 0;                  // decay of the adapter's average; 0: there is none
    std::int64_t rank = 0, steps = 0;
    double alpha = 0;
    std::uint64_t seed = 0;

    struct File {
        std::string path;
        std::uint64_t bytes;
        std::string sha256;
    };
    std::vector<File> files;

    /// Layouts of a target, the default first; none if the bundle lacks the target.
    std::vector<std::string> layouts(const std::string& target) const;
    /// The LoRA tensors that training starts from, and the metadata of their file.
    std::pair<Tensors, TensorFile::Metadata> adapter() const;
};

/// Open a bundle. Throws `BadInput` if its manifest is missing, damaged, or of a newer schema.
Bundle open_bundle(const Path& folder);

/// Largest file that is hashed each time a bundle is opened.
constexpr std::uint64_t kSmallFile = std::uint64_t{16} << 20;

/// Throw `BadInput` unless the files that a target loads are plain files in the bundle, of the size
/// that the manifest says, and not changed.
///
/// `all`: hash the large files too. That reads all weights once.
void check_bundle(const Bundle& bundle, const std::string& target, bool all);

}  // namespace edge_dit
