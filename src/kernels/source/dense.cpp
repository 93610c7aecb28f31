// Dense layers, y = x W^T + b. All tensors are plain float32: x (N, I), W (O, I), b (O), y (N, O).
#include <algorithm>

#include "cache.h"
#include "onednn.h"
#include "ready_gradients.h"

namespace {

using namespace acnet;
using dnnl::memory;

// A matrix stored by rows, or its transpose.
struct Matrix {
    int64_t rows, columns;
    bool transposed;
    memory::desc md() const {
        return {{rows, columns}, Type::f32, transposed ? Dims{1, rows} : Dims{columns, 1}};
    }
};

struct MatMul {
    MatMul(const Matrix &lhs, const Matrix &rhs, bool bias) {
        Matrix product{lhs.rows, rhs.columns, false};
        memory::desc bias_md =
            bias ? memory::desc({1, rhs.columns}, Type::f32, memory::format_tag::ab)
                 : memory::desc();
        pd = {cpu(), lhs.md(), rhs.md(), bias_md, product.md(), own_scratchpad()};
        primitive = dnnl::matmul(pd);
    }
    dnnl::matmul::primitive_desc pd;
    dnnl::matmul primitive;
};

// product = lhs rhs [+ bias]; `bias` may be null.
void multiply(const Matrix &lhs, const float *a, const Matrix &rhs, const float *b,
              const float *bias, float *product) {
    Key key{lhs.rows, lhs.columns, lhs.transposed, rhs.columns, rhs.transposed, bias != nullptr};
    auto matmul = cache<MatMul>().get_or_create(key, [&] { return MatMul(lhs, rhs, bias); });
    const auto &pd = matmul->pd;
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(pd.src_desc(), a)},
                                              {DNNL_ARG_WEIGHTS, view(pd.weights_desc(), b)},
                                              {DNNL_ARG_DST, view(pd.dst_desc(), product)}};
    if (bias) arguments[DNNL_ARG_BIAS] = view(pd.bias_desc(), bias);
    execute(matmul->primitive, pd.scratchpad_desc(), arguments);
}

}  // namespace

// (attributes, x, weight, bias) -> y
ACNET_KERNEL(dense_forward) {
    a.expect(0, 4, 1);
    int64_t n = a.dim(1, 0), inputs = a.dim(1, 1), outputs = a.dim(2, 0);
    multiply({n, inputs, false}, a.floats(1, {n, inputs}), {inputs, outputs, true},
             a.floats(2, {outputs, inputs}), a.floats(3, {outputs}),
             a.output_floats(4, {n, outputs}));
}

// (attributes, x, dy, weight) -> (dx, dweight, dbias)
ACNET_KERNEL(dense_backward) {
    a.expect(0, 4, 3);
    int64_t n = a.dim(1, 0), inputs = a.dim(1, 1), outputs = a.dim(3, 0);
    const float *x = a.floats(1, {n, inputs}), *dy = a.floats(2, {n, outputs});
    const float *weight = a.floats(3, {outputs, inputs});
    float *dx = a.output_floats(4, {n, inputs});
    float *dweight = a.output_floats(5, {outputs, inputs}), *dbias = a.output_floats(6, {outputs});
    multiply({outputs, n, true}, dy, {n, inputs, false}, x, nullptr, dweight);
    gradient_ready(a, 5, dweight);
    std::fill_n(dbias, outputs, 0.f);
    for (int64_t row = 0; row < n; ++row) {
        for (int64_t column = 0; column < outputs; ++column) {
            dbias[column] += dy[row * outputs + column];
        }
    }
    multiply({n, outputs, false}, dy, {outputs, inputs, false}, weight, nullptr, dx);
}
