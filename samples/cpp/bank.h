// The bank: stored draws, read one at a time.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "tensors.h"

namespace edge_dit {

class Bank {
public:
    /// Open the bank of a bundle's plan. Throws `BadInput` if it is none, incomplete or damaged, or
    /// of another plan.
    Bank(const Path& folder, const Bundle& bundle);

    const std::string& name() const { return name_; }
    /// SHA-256 of index.json, which every other file of the bank names.
    const std::string& identity() const { return identity_; }
    std::size_t size() const { return draws_.size(); }

    /// Number of the draw that a step trains on: each epoch is a permutation of the bank.
    std::size_t number(std::int64_t step);
    double sigma(std::size_t draw) const { return draws_.at(draw).sigma; }
    /// A draw for a message.
    std::string in_words(std::size_t draw) const;
    /// The batch tensors of a draw in the manifest's order, float32.
    Tensors read(std::size_t draw);

private:
    struct Draw {
        std::string image;
        std::size_t prompt;
        double sigma;
    };

    void read_index(const Json& index);
    const TensorFile& file(const Path& path);
    Path shard(std::size_t draw) const;
    /// A tensor of a draw or of its prompt; `path` is the file that is read.
    View tensor(std::size_t draw, const std::string& name, Path& path);

    Path folder_;
    std::string name_, identity_;
    std::vector<TensorSpec> batch_;
    std::uint64_t seed_;
    std::vector<Draw> draws_;
    std::size_t shard_ = 1;
    std::map<Path, std::unique_ptr<TensorFile>> files_;
    std::vector<std::size_t> order_;  // of the epoch in order_of_
    std::uint64_t order_of_ = 0;
};

}  // namespace edge_dit
