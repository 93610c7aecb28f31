// The arguments of one kernel call. MindSpore's Custom operation passes raw pointers, so everything
// about a tensor is checked here before its memory is used.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <oneapi/dnnl/dnnl.hpp>

namespace acnet {

using Type = dnnl::memory::data_type;
using Dims = dnnl::memory::dims;

// Strides, kernels and paddings above this are refused.
constexpr int64_t kMaxGeometry = 1 << 15;

// How an activation ends: as it is, max(x, 0), or min(max(x, 0), 6) (ReLU6).
enum class Relu { None, Plain, Six };

// An activation: (N, C, H, W), or (N, C / b, H, W, b) in blocks of b channels.
struct Activation {
    int64_t n, c, h, w, block;  // block is 1 for (N, C, H, W)
    Type type;

    int64_t pixels() const { return h * w; }
    int64_t size() const { return n * c * h * w; }
    size_t bytes() const { return size() * (type == Type::f32 ? 4 : 2); }
};

// Tensors of one call, inputs first. Input 0 of most kernels is a table of int64 attributes, which
// begins with the name of the layer (src/kernels/attributes.py).
class Arguments {
public:
    Arguments(int count, void **data, int *ranks, int64_t **shapes, const char **types)
        : count_(count), data_(data), ranks_(ranks), shapes_(shapes), types_(types) {}

    // Every kernel begins with one of these two. They throw if the number of tensors is wrong;
    // `attributes` is how many attributes the table must hold.
    void expect(int inputs, int outputs);
    void expect(int attributes, int inputs, int outputs);

    int64_t attribute(int index) const;
    double real_attribute(int index) const;
    Relu relu(int attribute) const;

    // Checked views. They throw if the index, type, rank or shape differs from what is asked for.
    const float *floats(int input, std::initializer_list<int64_t> shape) const;
    const uint8_t *bytes(int input, std::initializer_list<int64_t> shape) const;
    float *output_floats(int output, std::initializer_list<int64_t> shape) const;
    uint8_t *output_bytes(int output, int64_t least) const;
    Activation activation(int index) const;
    const void *activation_data(int input, const Activation &like) const;
    void *output_activation(int output, const Activation &like) const;

    // An input that the kernel may overwrite. Say at the call why nothing else reads it.
    void *overwritable_activation(int input, const Activation &like) const;

    int rank(int index) const;
    int64_t dim(int index, int axis) const;
    int64_t size(int index) const;
    // First output: outputs have the indices that follow the inputs.
    int first_output() const { return inputs_; }
    // "" if the call has no table of attributes.
    const char *layer() const noexcept;

private:
    const void *input_data(int index) const;
    void *output_data(int index) const;
    void check_shape(int index, const char *type, std::initializer_list<int64_t> shape) const;
    void check_like(int index, const Activation &like) const;
    [[noreturn]] void fail(int index, const std::string &problem) const;

    int count_, inputs_ = 0, attributes_ = 0;
    void **data_;
    int *ranks_;
    int64_t **shapes_;
    const char **types_;
};

// Keeps "LAYER: KERNEL: REASON" for acnet_last_error.
void record_error(const char *layer, const char *kernel, const char *reason) noexcept;

// Runs `body`; returns 0, or 1 after recording the error. No exception leaves it.
template <class Body>
int guarded(const char *layer, const char *kernel, Body &&body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        record_error(layer, kernel, "out of memory");
    } catch (const std::exception &failure) {
        record_error(layer, kernel, failure.what());
    } catch (...) {
        record_error(layer, kernel, "unknown error");
    }
    return 1;
}

}  // namespace acnet

#define ACNET_KERNEL(name)                                                                        \
    static void name##_body(acnet::Arguments &a);                                                 \
    extern "C" int name(int count, void **data, int *ranks, int64_t **shapes, const char **types, \
                        void *, void *) {                                                         \
        acnet::Arguments arguments(count, data, ranks, shapes, types);                            \
        return acnet::guarded(arguments.layer(), #name, [&] { name##_body(arguments); });         \
    }                                                                                             \
    static void name##_body(acnet::Arguments &a)
