// Pooling of blocked activations: windows by oneDNN, whole planes here.
#include "cache.h"
#include "onednn.h"
#include "thread_pool.h"
#include "vectors.h"

namespace {

using namespace acnet;

// The attributes of a pooling layer, in the order of src/kernels/attributes.py.
enum Attribute {
    kKernelH,
    kKernelW,
    kStrideH,
    kStrideW,
    kTop,
    kBottom,
    kLeft,
    kRight,
    kAverage,
    kAttributes
};

struct Pooling {
    Pooling(const Arguments &a, const Activation &x, const Activation &y) {
        auto algorithm = a.attribute(kAverage) ? dnnl::algorithm::pooling_avg_exclude_padding
                                               : dnnl::algorithm::pooling_max;
        auto x_md = activation_md(x), y_md = activation_md(y);
        Dims kernel{a.attribute(kKernelH), a.attribute(kKernelW)};
        Dims strides{a.attribute(kStrideH), a.attribute(kStrideW)}, dilation{0, 0};
        Dims padding_l{a.attribute(kTop), a.attribute(kLeft)};
        Dims padding_r{a.attribute(kBottom), a.attribute(kRight)};
        inference_pd = {cpu(),
                        dnnl::prop_kind::forward_inference,
                        algorithm,
                        x_md,
                        y_md,
                        strides,
                        kernel,
                        dilation,
                        padding_l,
                        padding_r,
                        own_scratchpad()};
        forward_pd = {cpu(),
                      dnnl::prop_kind::forward_training,
                      algorithm,
                      x_md,
                      y_md,
                      strides,
                      kernel,
                      dilation,
                      padding_l,
                      padding_r,
                      own_scratchpad()};
        backward_pd = {cpu(),    algorithm, x_md,      y_md,       strides,         kernel,
                       dilation, padding_l, padding_r, forward_pd, own_scratchpad()};
        inference = dnnl::pooling_forward(inference_pd);
        forward = dnnl::pooling_forward(forward_pd);
        backward = dnnl::pooling_backward(backward_pd);
    }
    dnnl::pooling_forward::primitive_desc inference_pd, forward_pd;
    dnnl::pooling_backward::primitive_desc backward_pd;
    dnnl::pooling_forward inference, forward;
    dnnl::pooling_backward backward;
};

Activation pooled(const Arguments &a, const Activation &x) {
    // oneDNN computes with 32 bits.
    for (int index = kKernelH; index <= kRight; ++index) {
        int64_t value = a.attribute(index), least = index < kTop ? 1 : 0;
        if (value < least || value > kMaxGeometry) {
            throw std::invalid_argument("pooling attribute " + std::to_string(index) + " is " +
                                        std::to_string(value));
        }
    }
    int64_t stride_h = a.attribute(kStrideH), stride_w = a.attribute(kStrideW);
    int64_t room_h = x.h + a.attribute(kTop) + a.attribute(kBottom) - a.attribute(kKernelH);
    int64_t room_w = x.w + a.attribute(kLeft) + a.attribute(kRight) - a.attribute(kKernelW);
    if (room_h < 0 || room_w < 0) {
        throw std::invalid_argument("the window does not fit the input");
    }
    return {x.n, x.c, room_h / stride_h + 1, room_w / stride_w + 1, x.block, x.type};
}

std::shared_ptr<const Pooling> pooling(const Arguments &a, const Activation &x) {
    Activation y = pooled(a, x);
    Key key{x.n, x.c, x.h, x.w, x.block, static_cast<int64_t>(x.type)};
    for (int index = 0; index < kAttributes; ++index) key.push_back(a.attribute(index));
    return cache<Pooling>().get_or_create(key, [&] { return Pooling(a, x, y); });
}

template <class T>
void average(const Activation &x, const T *from, float *to) {
    parallel_for(x.n * x.c / x.block, [&](int64_t index) {
        const T *plane = from + index * x.pixels() * x.block;
        for (int64_t v = 0; v < x.block; v += kLanes) {
            Floats sum{};
            for (int64_t i = 0; i < x.pixels(); ++i) sum += load(plane + i * x.block + v);
            store(to + index * x.block + v, sum / broadcast(static_cast<float>(x.pixels())));
        }
    });
}

template <class T>
void average_backward(const Activation &x, const float *gradient, T *to) {
    parallel_for(x.n * x.c / x.block, [&](int64_t index) {
        T *plane = to + index * x.pixels() * x.block;
        for (int64_t v = 0; v < x.block; v += kLanes) {
            Floats value =
                load(gradient + index * x.block + v) / broadcast(static_cast<float>(x.pixels()));
            for (int64_t i = 0; i < x.pixels(); ++i) store(plane + i * x.block + v, value);
        }
    });
}

Activation blocked_input(const Arguments &a) {
    Activation x = a.activation(1);
    if (x.block == 1)
        throw std::invalid_argument("global average pooling needs blocks of channels");
    return x;
}

}  // namespace

// (attributes, x) -> (y, the argmax within each window as uint8, of y's size; one byte for
// averages)
ACNET_KERNEL(pool_forward) {
    a.expect(kAttributes, 2, 2);
    Activation x = a.activation(1);
    auto p = pooling(a, x);
    const auto &pd = p->forward_pd;
    std::unordered_map<int, dnnl::memory> arguments{
        {DNNL_ARG_SRC, view(pd.src_desc(), a.activation_data(1, x))},
        {DNNL_ARG_DST, view(pd.dst_desc(), a.output_activation(2, pooled(a, x)))}};
    if (!a.attribute(kAverage)) {
        uint8_t *workspace = a.output_bytes(3, pd.workspace_desc().get_size());
        arguments[DNNL_ARG_WORKSPACE] = view(pd.workspace_desc(), workspace);
    }
    execute(p->forward, pd.scratchpad_desc(), arguments);
}

// (attributes, x) -> y
ACNET_KERNEL(pool_inference) {
    a.expect(kAttributes, 2, 1);
    Activation x = a.activation(1);
    auto p = pooling(a, x);
    const auto &pd = p->inference_pd;
    execute(p->inference, pd.scratchpad_desc(),
            {{DNNL_ARG_SRC, view(pd.src_desc(), a.activation_data(1, x))},
             {DNNL_ARG_DST, view(pd.dst_desc(), a.output_activation(2, pooled(a, x)))}});
}

// (attributes, x for its shape, dy, the argmax within each window) -> dx
ACNET_KERNEL(pool_backward) {
    a.expect(kAttributes, 4, 1);
    Activation x = a.activation(1), y = pooled(a, x);
    auto p = pooling(a, x);
    const auto &pd = p->backward_pd;
    std::unordered_map<int, dnnl::memory> arguments{
        {DNNL_ARG_DIFF_DST, view(pd.diff_dst_desc(), a.activation_data(2, y))},
        {DNNL_ARG_DIFF_SRC, view(pd.diff_src_desc(), a.output_activation(4, x))}};
    if (!a.attribute(kAverage)) {
        const uint8_t *workspace = a.bytes(3, {y.n, y.c / y.block, y.h, y.w, y.block});
        arguments[DNNL_ARG_WORKSPACE] = view(p->forward_pd.workspace_desc(), workspace);
    }
    execute(p->backward, pd.scratchpad_desc(), arguments);
}

// (attributes, x) -> mean over pixels, (N, C) float32
ACNET_KERNEL(global_average_forward) {
    a.expect(0, 2, 1);
    Activation x = blocked_input(a);
    const void *from = a.activation_data(1, x);
    float *to = a.output_floats(2, {x.n, x.c});
    if (x.type == Type::f32) average(x, static_cast<const float *>(from), to);
    else average(x, static_cast<const bfloat16 *>(from), to);
}

// (attributes, x for its shape, gradient (N, C) float32) -> dx
ACNET_KERNEL(global_average_backward) {
    a.expect(0, 3, 1);
    Activation x = blocked_input(a);
    const float *gradient = a.floats(2, {x.n, x.c});
    void *to = a.output_activation(3, x);
    if (x.type == Type::f32) average_backward(x, gradient, static_cast<float *>(to));
    else average_backward(x, gradient, static_cast<bfloat16 *>(to));
}
