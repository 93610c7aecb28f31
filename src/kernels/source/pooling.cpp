// Pooling of blocked activations: windows by oneDNN, whole planes here.
#include <map>
#include <memory>
#include <mutex>

#include "runtime.h"
#include "vectors.h"

namespace {

using namespace acnet;

enum Setting { kKernelH, kKernelW, kStrideH, kStrideW, kTop, kLeft, kBottom, kRight, kAverage };

struct Pooling {
    Pooling(const Arguments &a, const Activation &x, int64_t out_h, int64_t out_w, bool training) {
        auto algorithm = a.setting(kAverage) ? dnnl::algorithm::pooling_avg_exclude_padding : dnnl::algorithm::pooling_max;
        auto source = blocked(x.n, x.c, x.h, x.w, x.block, x.type), target = blocked(x.n, x.c, out_h, out_w, x.block, x.type);
        Dims kernel{a.setting(kKernelH), a.setting(kKernelW)}, strides{a.setting(kStrideH), a.setting(kStrideW)}, dilation{0, 0};
        Dims before{a.setting(kTop), a.setting(kLeft)}, after{a.setting(kBottom), a.setting(kRight)};
        forward = {cpu(), training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference, algorithm, source, target, strides,
                   kernel, dilation, before, after, attributes()};
        forwards = dnnl::pooling_forward(forward);
        if (!training) return;
        backward = {cpu(), algorithm, source, target, strides, kernel, dilation, before, after, forward, attributes()};
        backwards = dnnl::pooling_backward(backward);
    }
    dnnl::pooling_forward::primitive_desc forward;
    dnnl::pooling_forward forwards;
    dnnl::pooling_backward::primitive_desc backward;
    dnnl::pooling_backward backwards;
};

const Pooling &pooling(const Arguments &a, const Activation &x, int64_t out_h, int64_t out_w, bool training) {
    static std::mutex mutex;
    static auto *const every = new std::map<std::vector<int64_t>, std::unique_ptr<Pooling>>;
    std::vector<int64_t> key{x.n, x.c, x.h, x.w, x.block, static_cast<int64_t>(x.type), training};
    for (int index = kKernelH; index <= kAverage; ++index) key.push_back(a.setting(index));
    std::lock_guard<std::mutex> lock(mutex);
    auto &found = (*every)[key];
    if (!found) found.reset(new Pooling(a, x, out_h, out_w, training));
    return *found;
}

void pool(const Arguments &a, int output, bool training) {
    Activation x(a, 1);
    const Pooling &p = pooling(a, x, a.dim(output, 2), a.dim(output, 3), training);
    std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, view(p.forward.src_desc(), a.data<void>(1))},
                                                    {DNNL_ARG_DST, view(p.forward.dst_desc(), a.data<void>(output))}};
    if (training && !a.setting(kAverage)) {
        if (p.forward.workspace_desc().get_size() > static_cast<size_t>(a.size(output + 1))) throw std::runtime_error("too large a window");
        arguments[DNNL_ARG_WORKSPACE] = view(p.forward.workspace_desc(), a.data<void>(output + 1));
    }
    execute(p.forwards, p.forward.scratchpad_desc(), arguments);
}

template <class T> void average(const Activation &x, const T *from, float *to) {
    parallel_for(x.n * x.c / x.block, [&](int64_t index) {
        const T *plane = from + index * x.pixels() * x.block;
        for (int64_t v = 0; v < x.block; v += kLanes) {
            Floats sum{};
            for (int64_t i = 0; i < x.pixels(); ++i) sum += load(plane + i * x.block + v);
            store(to + index * x.block + v, sum / all(static_cast<float>(x.pixels())));
        }
    });
}

template <class T> void spread(const Activation &x, const float *gradient, T *to) {
    parallel_for(x.n * x.c / x.block, [&](int64_t index) {
        T *plane = to + index * x.pixels() * x.block;
        for (int64_t v = 0; v < x.block; v += kLanes) {
            Floats share = load(gradient + index * x.block + v) / all(static_cast<float>(x.pixels()));
            for (int64_t i = 0; i < x.pixels(); ++i) store(plane + i * x.block + v, share);
        }
    });
}

}  // namespace

// (settings, x) -> (y, which of its window each maximum was, uint8 of y's size; of averages one byte)
ACNET_KERNEL(pool_forward) { pool(a, 2, true); }

// (settings, x) -> y
ACNET_KERNEL(pool_inference) { pool(a, 2, false); }

// (settings, x for its shape, dy, which of its window each maximum was) -> dx
ACNET_KERNEL(pool_backward) {
    Activation x(a, 1);
    const Pooling &p = pooling(a, x, a.dim(2, 2), a.dim(2, 3), true);
    std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_DIFF_DST, view(p.backward.diff_dst_desc(), a.data<void>(2))},
                                                    {DNNL_ARG_DIFF_SRC, view(p.backward.diff_src_desc(), a.data<void>(4))}};
    if (!a.setting(kAverage)) arguments[DNNL_ARG_WORKSPACE] = view(p.forward.workspace_desc(), a.data<void>(3));
    execute(p.backwards, p.backward.scratchpad_desc(), arguments);
}

// x -> its mean over pixels (N, C) float32; the settings are not looked at
ACNET_KERNEL(global_average_forward) {
    Activation x(a, 1);
    if (x.type == Type::f32) average(x, a.data(1), a.data(2));
    else average(x, a.data<bfloat16>(1), a.data(2));
}

// (settings, x for its shape, gradient (N, C) float32) -> dx
ACNET_KERNEL(global_average_backward) {
    Activation x(a, 1);
    if (x.type == Type::f32) spread(x, a.data(2), a.data(3));
    else spread(x, a.data(2), a.data<bfloat16>(3));
}
