// Dense layers, y = x W^T + b, all tensors plain float32: x (N, I), W (O, I), b (O), y (N, O).
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "runtime.h"

namespace {

using namespace acnet;
using dnnl::memory;

// A matrix as it lies in memory, by rows, or its transpose.
struct Matrix {
    int64_t rows, columns;
    bool transposed;
    memory::desc desc() const { return {{rows, columns}, Type::f32, transposed ? Dims{1, rows} : Dims{columns, 1}}; }
};

const dnnl::matmul::primitive_desc &descriptor(const Matrix &one, const Matrix &other, bool bias) {
    static std::mutex mutex;
    static auto *const every = new std::map<std::vector<int64_t>, std::unique_ptr<dnnl::matmul::primitive_desc>>;
    std::lock_guard<std::mutex> lock(mutex);
    auto &found = (*every)[{one.rows, one.columns, one.transposed, other.columns, other.transposed, bias}];
    if (!found) {
        Matrix product{one.rows, other.columns, false};
        memory::desc of_bias = bias ? memory::desc({1, other.columns}, Type::f32, memory::format_tag::ab) : memory::desc();
        found.reset(new dnnl::matmul::primitive_desc(cpu(), one.desc(), other.desc(), of_bias, product.desc(), attributes()));
    }
    return *found;
}

void multiply(const Matrix &one, const float *a, const Matrix &other, const float *b, const float *bias, float *product) {
    const auto &described = descriptor(one, other, bias);
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(described.src_desc(), a)},
                                              {DNNL_ARG_WEIGHTS, view(described.weights_desc(), b)},
                                              {DNNL_ARG_DST, view(described.dst_desc(), product)}};
    if (bias) arguments[DNNL_ARG_BIAS] = view(described.bias_desc(), bias);
    execute(dnnl::matmul(described), described.scratchpad_desc(), arguments);
}

}  // namespace

// (settings, x, weight, bias) -> y
ACNET_KERNEL(dense_forward) {
    int64_t n = a.dim(1, 0), inputs = a.dim(1, 1), outputs = a.dim(2, 0);
    multiply({n, inputs, false}, a.data(1), {inputs, outputs, true}, a.data(2), a.data(3), a.data(4));
}

// (settings, x, dy, weight) -> (dx, dweight, dbias)
ACNET_KERNEL(dense_backward) {
    int64_t n = a.dim(1, 0), inputs = a.dim(1, 1), outputs = a.dim(3, 0);
    multiply({outputs, n, true}, a.data(2), {n, inputs, false}, a.data(1), nullptr, a.data(5));
    announce(a, 5);
    float *dbias = a.data(6);
    const float *dy = a.data(2);
    std::fill_n(dbias, outputs, 0.f);
    for (int64_t row = 0; row < n; ++row)
        for (int64_t column = 0; column < outputs; ++column) dbias[column] += dy[row * outputs + column];
    multiply({n, outputs, false}, dy, {outputs, inputs, false}, a.data(3), nullptr, a.data(4));
}
