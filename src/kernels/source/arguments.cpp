#include "arguments.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace acnet {
namespace {

// The layer's name takes the first 8 numbers of the table, 64 bytes of UTF-8.
constexpr int kName = 8;

bool is(const char *type, const char *name) { return std::strcmp(type, name) == 0; }

std::string written(const int64_t *shape, int rank) {
    std::string text = "(";
    for (int axis = 0; axis < rank; ++axis) {
        text += (axis ? ", " : "") + std::to_string(shape[axis]);
    }
    return text + ")";
}

struct LastError {
    std::mutex mutex;
    char text[512] = "";
};

LastError &last_error() {
    // Never destroyed: threads of MindSpore may still compute while the process ends.
    static LastError *const value = new LastError;
    return *value;
}

}  // namespace

void record_error(const char *layer, const char *kernel, const char *reason) noexcept {
    LastError &error = last_error();
    std::lock_guard<std::mutex> lock(error.mutex);
    std::snprintf(error.text, sizeof error.text, "%s%s%s: %s", layer, *layer ? ": " : "", kernel,
                  reason);
}

void Arguments::fail(int index, const std::string &problem) const {
    throw std::invalid_argument("tensor " + std::to_string(index) + " " + problem);
}

void Arguments::expect(int inputs, int outputs) {
    if (count_ != inputs + outputs) {
        throw std::invalid_argument("called with " + std::to_string(count_) + " tensors, takes " +
                                    std::to_string(inputs) + " and " + std::to_string(outputs));
    }
    inputs_ = inputs;
}

void Arguments::expect(int attributes, int inputs, int outputs) {
    expect(inputs, outputs);
    if (!is(types_[0], "int64") || ranks_[0] != 1 || shapes_[0][0] != kName + attributes) {
        fail(0, "must be a table of " + std::to_string(attributes) + " attributes");
    }
    attributes_ = attributes;
}

int64_t Arguments::attribute(int index) const {
    if (count_ < 1 || !is(types_[0], "int64") || ranks_[0] != 1 || index < 0 ||
        kName + index >= shapes_[0][0]) {
        fail(0, "has no attribute " + std::to_string(index));
    }
    return static_cast<const int64_t *>(data_[0])[kName + index];
}

double Arguments::real_attribute(int index) const {
    int64_t bits = attribute(index);
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

Relu Arguments::relu(int index) const {
    int64_t kind = attribute(index);
    if (kind < 0 || kind > static_cast<int64_t>(Relu::Six)) {
        throw std::invalid_argument("there is no ReLU number " + std::to_string(kind));
    }
    return static_cast<Relu>(kind);
}

const char *Arguments::layer() const noexcept {
    if (count_ < 1 || !is(types_[0], "int64") || ranks_[0] != 1 || shapes_[0][0] < kName) return "";
    const char *name = static_cast<const char *>(data_[0]);
    return std::memchr(name, 0, kName * sizeof(int64_t)) ? name : "";
}

int Arguments::rank(int index) const {
    if (index < 0 || index >= count_) fail(index, "is missing");
    return ranks_[index];
}

int64_t Arguments::dim(int index, int axis) const {
    if (axis < 0 || axis >= rank(index)) fail(index, "has no axis " + std::to_string(axis));
    return shapes_[index][axis];
}

int64_t Arguments::size(int index) const {
    int64_t size = 1;
    for (int axis = 0; axis < rank(index); ++axis) size *= shapes_[index][axis];
    return size;
}

const void *Arguments::input_data(int index) const {
    if (index < 0 || index >= inputs_) fail(index, "is not an input");
    return data_[index];
}

void *Arguments::output_data(int index) const {
    if (index < inputs_ || index >= count_) fail(index, "is not an output");
    return data_[index];
}

void Arguments::check_shape(int index, const char *type,
                            std::initializer_list<int64_t> shape) const {
    if (!is(types_[index], type)) {
        fail(index, std::string("is of type ") + types_[index] + " instead of " + type);
    }
    int rank = static_cast<int>(shape.size());
    if (ranks_[index] != rank || !std::equal(shape.begin(), shape.end(), shapes_[index])) {
        fail(index, "has shape " + written(shapes_[index], ranks_[index]) + " instead of " +
                        written(shape.begin(), rank));
    }
}

const float *Arguments::floats(int input, std::initializer_list<int64_t> shape) const {
    const void *data = input_data(input);
    check_shape(input, "float32", shape);
    return static_cast<const float *>(data);
}

const uint8_t *Arguments::bytes(int input, std::initializer_list<int64_t> shape) const {
    const void *data = input_data(input);
    check_shape(input, "uint8", shape);
    return static_cast<const uint8_t *>(data);
}

float *Arguments::output_floats(int output, std::initializer_list<int64_t> shape) const {
    void *data = output_data(output);
    check_shape(output, "float32", shape);
    return static_cast<float *>(data);
}

uint8_t *Arguments::output_bytes(int output, int64_t least) const {
    void *data = output_data(output);
    if (!is(types_[output], "uint8") || size(output) < least) {
        fail(output, "must hold " + std::to_string(least) + " bytes");
    }
    return static_cast<uint8_t *>(data);
}

Activation Arguments::activation(int index) const {
    int rank = this->rank(index);
    if (rank != 4 && rank != 5) fail(index, "has rank " + std::to_string(rank) + ", not 4 or 5");
    const int64_t *shape = shapes_[index];
    if (std::any_of(shape, shape + rank, [](int64_t length) { return length < 1; })) {
        fail(index, "is empty: " + written(shape, rank));
    }
    int64_t block = rank == 5 ? shape[4] : 1;
    if (rank == 5 && block != 8 && block != 16) {
        fail(index, "has blocks of " + std::to_string(block) + " channels, not of 8 or 16");
    }
    bool single = is(types_[index], "float32");
    if (!single && !is(types_[index], "bfloat16")) {
        fail(index, std::string("is of type ") + types_[index] + ", not float32 or bfloat16");
    }
    return {shape[0], shape[1] * block, shape[2], shape[3], block, single ? Type::f32 : Type::bf16};
}

void Arguments::check_like(int index, const Activation &like) const {
    Activation x = activation(index);
    if (x.n != like.n || x.c != like.c || x.h != like.h || x.w != like.w || x.block != like.block ||
        x.type != like.type) {
        const int64_t expected[] = {like.n, like.c / like.block, like.h, like.w, like.block};
        fail(index, std::string(types_[index]) + " of shape " +
                        written(shapes_[index], ranks_[index]) + " instead of " +
                        (like.type == Type::f32 ? "float32 " : "bfloat16 ") +
                        written(expected, like.block > 1 ? 5 : 4));
    }
}

const void *Arguments::activation_data(int input, const Activation &like) const {
    const void *data = input_data(input);
    check_like(input, like);
    return data;
}

void *Arguments::output_activation(int output, const Activation &like) const {
    void *data = output_data(output);
    check_like(output, like);
    return data;
}

void *Arguments::overwritable_activation(int input, const Activation &like) const {
    return const_cast<void *>(activation_data(input, like));
}

}  // namespace acnet

// "LAYER: KERNEL: REASON" of the kernel that failed last. The copy stays until the calling thread
// asks again.
extern "C" const char *acnet_last_error() {
    static thread_local char copy[sizeof(acnet::LastError::text)];
    acnet::LastError &error = acnet::last_error();
    std::lock_guard<std::mutex> lock(error.mutex);
    std::memcpy(copy, error.text, sizeof copy);
    return copy;
}
