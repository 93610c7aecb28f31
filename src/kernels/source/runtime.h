// What every kernel needs: the arguments of a call, threads, scratch memory and oneDNN's engine.
#pragma once

#include <cstdint>
#include <functional>
#include <oneapi/dnnl/dnnl.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace acnet {

using Type = dnnl::memory::data_type;
using Dims = dnnl::memory::dims;

// Tensors of one call by MindSpore's Custom operation: inputs first, then outputs. The first input is a table of int64 settings, which begins
// with the name of the layer.
class Arguments {
public:
    Arguments(int count, void **data, int *ranks, int64_t **shapes, const char **types)
        : count_(count), data_(data), ranks_(ranks), shapes_(shapes), types_(types) {}

    int count() const { return count_; }
    int64_t setting(int index) const { return static_cast<const int64_t *>(data_[0])[kName + index]; }
    double real_setting(int index) const { return static_cast<const double *>(data_[0])[kName + index]; }
    std::string layer() const { return std::string(types_[0]) == "int64" ? static_cast<const char *>(data_[0]) : ""; }
    template <class T = float> T *data(int index) const { return static_cast<T *>(data_[index]); }
    int rank(int index) const { return ranks_[index]; }
    int64_t dim(int index, int axis) const { return shapes_[index][axis]; }
    int64_t size(int index) const;
    Type type(int index) const;

private:
    static constexpr int kName = 8;
    int count_;
    void **data_;
    int *ranks_;
    int64_t **shapes_;
    const char **types_;
};

// An activation: (N, C, H, W), or in blocks of b channels (N, C / b, H, W, b).
struct Activation {
    Activation(const Arguments &arguments, int index);
    int64_t n, c, h, w, block;  // block is 1 for (N, C, H, W)
    Type type;
    int64_t pixels() const { return h * w; }
};

// Memory of the calling thread that stays until the thread ends; what a slot holds is lost with the next call for that slot.
enum class Slot { Primitive, Weights, Layout, OtherLayout, Gradient, Sum, Count };
void *scratch(Slot slot, size_t bytes);

// fn(index) for all indices below count, shared out to the threads; what an index computes must not depend on the thread.
void parallel_for(int64_t count, const std::function<void(int64_t)> &fn);

const dnnl::engine &cpu();
dnnl::primitive_attr attributes();  // with scratch memory of ours
dnnl::memory::desc blocked(int64_t n, int64_t c, int64_t h, int64_t w, int64_t block, Type type);
dnnl::memory view(const dnnl::memory::desc &desc, const void *data);
void execute(const dnnl::primitive &primitive, const dnnl::memory::desc &scratchpad, std::unordered_map<int, dnnl::memory> arguments);
void reorder(const dnnl::memory::desc &from, const void *source, const dnnl::memory::desc &to, void *target);
bool is_reference(const char *implementation);

// Tells whoever waits in acnet_announced that tensor `index` of this call is complete, while the graph that it belongs to still computes.
void announce(const Arguments &arguments, int index);

// Runs a kernel for MindSpore: 0, or 1 and the reason kept for acnet_last_error.
int guarded(const std::string &what, const std::function<void()> &body);

}  // namespace acnet

#define ACNET_KERNEL(name)                                                                                               \
    static void name##_body(const acnet::Arguments &a);                                                                  \
    extern "C" int name(int count, void **data, int *ranks, int64_t **shapes, const char **types, void *, void *) {      \
        acnet::Arguments arguments(count, data, ranks, shapes, types);                                                   \
        return acnet::guarded(arguments.layer() + ": " #name, [&] { name##_body(arguments); });                          \
    }                                                                                                                    \
    static void name##_body(const acnet::Arguments &a)
