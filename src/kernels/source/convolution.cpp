#include "convolution.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace acnet {
namespace {

using dnnl::memory;
using dnnl::prop_kind;
using tag = memory::format_tag;
constexpr auto kDirect = dnnl::algorithm::convolution_direct;

// A convolution as oneDNN sees it. Groups of fewer channels than a block have no fast kernel: `merged` of them are computed as one, with
// zeros outside the diagonal blocks of its weights, at the full rate of dense ones.
struct Problem {
    Geometry geometry;
    int64_t n, block, source_block, merged;
    Type type;

    Problem(const Geometry &g, const Activation &x, int64_t block) : geometry(g), n(x.n), block(block), source_block(x.block), type(x.type) {
        int64_t channels = g.in_channels / g.groups;
        merged = g.groups > 1 && channels < block ? block / channels : 1;
    }

    int64_t groups() const { return geometry.groups / merged; }
    memory::desc source(bool any = false) const {
        auto desc = blocked(n, geometry.in_channels, geometry.height, geometry.width, source_block, type);
        return any ? anyhow(desc) : desc;
    }
    memory::desc target(bool any = false) const {
        auto desc = blocked(n, geometry.out_channels, geometry.out_height(), geometry.out_width(), block, type);
        return any ? anyhow(desc) : desc;
    }
    Dims weights_dims() const {
        const auto &g = geometry;
        int64_t groups = this->groups(), out = g.out_channels / groups, in = g.in_channels / groups;
        return groups > 1 ? Dims{groups, out, in, g.kernel_h, g.kernel_w} : Dims{out, in, g.kernel_h, g.kernel_w};
    }
    memory::desc plain_weights() const { return {weights_dims(), Type::f32, groups() > 1 ? tag::goihw : tag::oihw}; }
    memory::desc weights(Type of) const { return {weights_dims(), of, tag::any}; }
    Dims strides() const { return {geometry.stride_h, geometry.stride_w}; }
    Dims dilations() const { return {geometry.dilation_h - 1, geometry.dilation_w - 1}; }
    Dims before() const { return {geometry.top, geometry.left}; }
    Dims after() const { return {geometry.bottom, geometry.right}; }

    // The weights with zeros between merged groups, or themselves.
    const float *expanded(const float *weights) const {
        if (merged == 1) return weights;
        auto *wide = static_cast<float *>(scratch(Slot::Layout, plain_weights().get_size()));
        std::memset(wide, 0, plain_weights().get_size());
        each_row([&](int64_t narrow, int64_t at, int64_t size) { std::memcpy(wide + at, weights + narrow, size * sizeof(float)); });
        return wide;
    }

    void shrink(const float *wide, float *weights) const {
        each_row([&](int64_t narrow, int64_t at, int64_t size) { std::memcpy(weights + narrow, wide + at, size * sizeof(float)); });
    }

private:
    static memory::desc anyhow(const memory::desc &desc) { return {desc.get_dims(), desc.get_data_type(), tag::any}; }

    template <class Fn> void each_row(Fn fn) const {
        const auto &g = geometry;
        int64_t out = g.out_channels / g.groups, size = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
        for (int64_t o = 0; o < g.out_channels; ++o) fn(o * size, (o * merged + o / out % merged) * size, size);
    }
};

template <class Descriptor> bool usable(const Descriptor &descriptor) { return descriptor && !is_reference(descriptor.impl_info_str()); }

dnnl::primitive_attr with_epilogue(const Problem &problem, bool addend, bool relu) {
    auto result = attributes();
    dnnl::post_ops operations;
    if (addend) operations.append_binary(dnnl::algorithm::binary_add, problem.target());
    if (relu) operations.append_eltwise(dnnl::algorithm::eltwise_relu, 0.f, 0.f);
    result.set_post_ops(operations);
    return result;
}

dnnl::convolution_forward::primitive_desc forward_descriptor(const Problem &p, bool training, bool bias, bool addend, bool relu, bool any) {
    memory::desc of_bias = bias ? memory::desc({p.geometry.out_channels}, Type::f32, tag::a) : memory::desc();
    return {cpu(), training ? prop_kind::forward_training : prop_kind::forward_inference, kDirect, p.source(any), p.weights(p.type), of_bias,
            p.target(any), p.strides(), p.dilations(), p.before(), p.after(), with_epilogue(p, addend, relu), true};
}

struct Forward {
    Forward(const Problem &problem, bool training, bool bias, bool addend, bool relu)
        : descriptor(forward_descriptor(problem, training, bias, addend, relu, false)) {
        if (!usable(descriptor)) descriptor = forward_descriptor(problem, training, bias, addend, relu, true);
        if (!descriptor) throw std::runtime_error("oneDNN has no such convolution");
        primitive = dnnl::convolution_forward(descriptor);
    }
    dnnl::convolution_forward::primitive_desc descriptor;
    dnnl::convolution_forward primitive;
};

struct BackwardData {
    explicit BackwardData(const Problem &p, const Forward &hint) {
        for (bool any : {false, true}) {
            descriptor = {cpu(), kDirect, p.source(any), p.weights(p.type), p.target(any), p.strides(), p.dilations(), p.before(), p.after(),
                          hint.descriptor, attributes(), true};
            if (usable(descriptor)) break;
        }
        if (!descriptor) throw std::runtime_error("oneDNN has no such input gradient");
        primitive = dnnl::convolution_backward_data(descriptor);
    }
    dnnl::convolution_backward_data::primitive_desc descriptor;
    dnnl::convolution_backward_data primitive;
};

struct BackwardWeights {
    BackwardWeights(const Problem &p, bool bias, const Forward &hint) {
        memory::desc of_bias = bias ? memory::desc({p.geometry.out_channels}, Type::f32, tag::a) : memory::desc();
        for (bool any : {false, true}) {
            descriptor = {cpu(), kDirect, p.source(any), p.weights(Type::f32), of_bias, p.target(any), p.strides(), p.dilations(), p.before(),
                          p.after(), hint.descriptor, attributes(), true};
            if (usable(descriptor)) break;
        }
        if (!descriptor) throw std::runtime_error("oneDNN has no such weight gradient");
        primitive = dnnl::convolution_backward_weights(descriptor);
    }
    dnnl::convolution_backward_weights::primitive_desc descriptor;
    dnnl::convolution_backward_weights primitive;
};

// Primitives by what they depend on. They are few, one for each kind of layer, and stay for the life of the process.
template <class Primitive, class Make> const Primitive &kept(const Problem &p, int64_t variant, Make make) {
    static std::mutex mutex;
    static auto *const every = new std::map<std::vector<int64_t>, std::unique_ptr<Primitive>>;
    const auto &g = p.geometry;
    std::vector<int64_t> key{p.n, g.in_channels, g.out_channels, g.height, g.width, g.kernel_h, g.kernel_w, g.stride_h, g.stride_w,
                             g.dilation_h, g.dilation_w, g.top, g.bottom, g.left, g.right, g.groups, p.block, p.source_block,
                             static_cast<int64_t>(p.type), variant};
    std::lock_guard<std::mutex> lock(mutex);
    auto &found = (*every)[key];
    if (!found) found.reset(new Primitive(make()));
    return *found;
}

const Forward &forward(const Problem &p, bool training, bool bias, bool addend, bool relu) {
    return kept<Forward>(p, training | bias << 1 | addend << 2 | relu << 3, [&] { return Forward(p, training, bias, addend, relu); });
}

const BackwardData &backward_data(const Problem &p) {
    return kept<BackwardData>(p, 0, [&] { return BackwardData(p, forward(p, true, false, false, false)); });
}

const BackwardWeights &backward_weights(const Problem &p, bool bias) {
    return kept<BackwardWeights>(p, bias, [&] { return BackwardWeights(p, bias, forward(p, true, false, false, false)); });
}

// `data` of layout `from` in layout `to`: itself, or a copy in `slot`.
const void *in_layout(const memory::desc &from, const void *data, const memory::desc &to, Slot slot) {
    if (from == to) return data;
    void *copy = scratch(slot, to.get_size());
    reorder(from, data, to, copy);
    return copy;
}

void run_forward(const Problem &p, const Forward &f, const void *source, const void *packed, const Epilogue &epilogue, void *target) {
    const void *x = in_layout(p.source(), source, f.descriptor.src_desc(), Slot::Layout);
    bool direct = f.descriptor.dst_desc() == p.target();
    void *y = direct ? target : scratch(Slot::OtherLayout, f.descriptor.dst_desc().get_size());
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(f.descriptor.src_desc(), x)},
                                              {DNNL_ARG_WEIGHTS, view(f.descriptor.weights_desc(), packed)},
                                              {DNNL_ARG_DST, view(f.descriptor.dst_desc(), y)}};
    if (epilogue.bias) arguments[DNNL_ARG_BIAS] = view(f.descriptor.bias_desc(), epilogue.bias);
    if (epilogue.addend) arguments[DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1] = view(p.target(), epilogue.addend);
    execute(f.primitive, f.descriptor.scratchpad_desc(), arguments);
    if (!direct) reorder(f.descriptor.dst_desc(), y, p.target(), target);
}

const Forward &forward(const Problem &p, const Epilogue &epilogue, bool training) {
    return forward(p, training, epilogue.bias, epilogue.addend, epilogue.relu);
}

}  // namespace

void convolve(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const float *weights,
              const Epilogue &epilogue, void *target, bool training) {
    Problem p(geometry, x, block);
    const Forward &f = forward(p, epilogue, training);
    void *packed = scratch(Slot::Weights, f.descriptor.weights_desc().get_size());
    reorder(p.plain_weights(), p.expanded(weights), f.descriptor.weights_desc(), packed);
    run_forward(p, f, source, packed, epilogue, target);
}

size_t packed_size(const Geometry &geometry, const Activation &x, int64_t block, const Epilogue &epilogue) {
    return forward(Problem(geometry, x, block), epilogue, false).descriptor.weights_desc().get_size();
}

void pack(const Geometry &geometry, const Activation &x, int64_t block, const Epilogue &epilogue, const float *weights, void *packed) {
    Problem p(geometry, x, block);
    reorder(p.plain_weights(), p.expanded(weights), forward(p, epilogue, false).descriptor.weights_desc(), packed);
}

void convolve_packed(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const void *packed,
                     const Epilogue &epilogue, void *target) {
    Problem p(geometry, x, block);
    run_forward(p, forward(p, epilogue, false), source, packed, epilogue, target);
}

void gradient_of_input(const Geometry &geometry, const Activation &x, int64_t block, const void *gradient, const float *weights,
                       void *input_gradient) {
    Problem p(geometry, x, block);
    const BackwardData &b = backward_data(p);
    void *packed = scratch(Slot::Weights, b.descriptor.weights_desc().get_size());
    reorder(p.plain_weights(), p.expanded(weights), b.descriptor.weights_desc(), packed);
    const void *dy = in_layout(p.target(), gradient, b.descriptor.diff_dst_desc(), Slot::Layout);
    bool direct = b.descriptor.diff_src_desc() == p.source();
    void *dx = direct ? input_gradient : scratch(Slot::OtherLayout, b.descriptor.diff_src_desc().get_size());
    execute(b.primitive, b.descriptor.scratchpad_desc(),
            {{DNNL_ARG_DIFF_DST, view(b.descriptor.diff_dst_desc(), dy)}, {DNNL_ARG_WEIGHTS, view(b.descriptor.weights_desc(), packed)},
             {DNNL_ARG_DIFF_SRC, view(b.descriptor.diff_src_desc(), dx)}});
    if (!direct) reorder(b.descriptor.diff_src_desc(), dx, p.source(), input_gradient);
}

void gradient_of_weights(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const void *gradient,
                         float *weights_gradient, float *bias_gradient) {
    Problem p(geometry, x, block);
    const BackwardWeights &b = backward_weights(p, bias_gradient != nullptr);
    void *packed = scratch(Slot::Weights, b.descriptor.diff_weights_desc().get_size());
    const void *in = in_layout(p.source(), source, b.descriptor.src_desc(), Slot::Layout);
    const void *dy = in_layout(p.target(), gradient, b.descriptor.diff_dst_desc(), Slot::OtherLayout);
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(b.descriptor.src_desc(), in)},
                                              {DNNL_ARG_DIFF_DST, view(b.descriptor.diff_dst_desc(), dy)},
                                              {DNNL_ARG_DIFF_WEIGHTS, view(b.descriptor.diff_weights_desc(), packed)}};
    if (bias_gradient) arguments[DNNL_ARG_DIFF_BIAS] = view(b.descriptor.diff_bias_desc(), bias_gradient);
    if (p.type == Type::bf16 && geometry.out_width() == 1) {
        // oneDNN 3.10 pairs pixels in bfloat16 and reads a partner that it never wrote (found by tests/kernels/fuzz.py).
        size_t size = b.descriptor.scratchpad_desc().get_size();
        std::memset(scratch(Slot::Primitive, size), 0, size);
    }
    execute(b.primitive, b.descriptor.scratchpad_desc(), arguments);
    if (p.merged == 1) return reorder(b.descriptor.diff_weights_desc(), packed, p.plain_weights(), weights_gradient);
    auto *wide = static_cast<float *>(scratch(Slot::Layout, p.plain_weights().get_size()));
    reorder(b.descriptor.diff_weights_desc(), packed, p.plain_weights(), wide);
    p.shrink(wide, weights_gradient);
}

}  // namespace acnet
