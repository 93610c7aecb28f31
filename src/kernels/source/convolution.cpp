#include "convolution.h"

#include <cstring>

namespace acnet {
namespace {

using dnnl::memory;
using dnnl::prop_kind;
using tag = memory::format_tag;
constexpr auto kDirect = dnnl::algorithm::convolution_direct;

memory::desc any_format(const memory::desc &desc) {
    return {desc.get_dims(), desc.get_data_type(), tag::any};
}

// A convolution as oneDNN sees it. Groups of one channel in and out (depthwise) have a kernel of
// their own. Other groups narrower than a block have no fast kernel: `merged` groups are computed
// as one, with zeros outside the diagonal blocks of its weights, at the full rate of dense ones.
struct Problem {
    Geometry geometry;
    int64_t n, block, x_block, merged;
    Type type;

    explicit Problem(const Convolution &conv)
        : geometry(conv.geometry),
          n(conv.x.n),
          block(conv.block),
          x_block(conv.x.block),
          type(conv.x.type) {
        const auto &g = geometry;
        int64_t channels = g.in_channels / g.groups;
        bool depthwise = channels == 1 && g.out_channels == g.groups;
        merged = g.groups > 1 && channels < block && !depthwise ? block / channels : 1;
        if (merged > 1 && (block % channels || g.groups % merged)) {
            throw std::invalid_argument("groups of " + std::to_string(channels) +
                                        " channels do not fit into blocks");
        }
    }

    int64_t groups() const { return geometry.groups / merged; }
    memory::desc x_md(bool any = false) const {
        auto desc =
            blocked_md(n, geometry.in_channels, geometry.height, geometry.width, x_block, type);
        return any ? any_format(desc) : desc;
    }
    memory::desc y_md(bool any = false) const {
        auto desc = blocked_md(n, geometry.out_channels, geometry.out_height(),
                               geometry.out_width(), block, type);
        return any ? any_format(desc) : desc;
    }
    Dims weights_dims() const {
        const auto &g = geometry;
        int64_t groups = this->groups(), out = g.out_channels / groups, in = g.in_channels / groups;
        return groups > 1 ? Dims{groups, out, in, g.kernel_h, g.kernel_w}
                          : Dims{out, in, g.kernel_h, g.kernel_w};
    }
    memory::desc plain_weights_md() const {
        return {weights_dims(), Type::f32, groups() > 1 ? tag::goihw : tag::oihw};
    }
    memory::desc weights_md(Type of) const { return {weights_dims(), of, tag::any}; }
    memory::desc bias_md(bool bias) const {
        return bias ? memory::desc({geometry.out_channels}, Type::f32, tag::a) : memory::desc();
    }
    Dims strides() const { return {geometry.stride_h, geometry.stride_w}; }
    Dims dilations() const { return {geometry.dilation_h - 1, geometry.dilation_w - 1}; }
    Dims padding_l() const { return {geometry.padding.top, geometry.padding.left}; }
    Dims padding_r() const { return {geometry.padding.bottom, geometry.padding.right}; }

    // The weights with zeros between merged groups, or the weights themselves.
    const float *expanded(const float *weights) const {
        if (merged == 1) return weights;
        size_t size = plain_weights_md().get_size();
        auto *wide = static_cast<float *>(scratch(Slot::Layout, size));
        std::memset(wide, 0, size);
        each_row([&](int64_t narrow, int64_t at, int64_t count) {
            std::memcpy(wide + at, weights + narrow, count * sizeof(float));
        });
        return wide;
    }

    void shrink(const float *wide, float *weights) const {
        each_row([&](int64_t narrow, int64_t at, int64_t count) {
            std::memcpy(weights + narrow, wide + at, count * sizeof(float));
        });
    }

    Key key(int64_t variant) const {
        const auto &g = geometry;
        return {n,
                g.in_channels,
                g.out_channels,
                g.height,
                g.width,
                g.kernel_h,
                g.kernel_w,
                g.stride_h,
                g.stride_w,
                g.dilation_h,
                g.dilation_w,
                g.padding.top,
                g.padding.bottom,
                g.padding.left,
                g.padding.right,
                g.groups,
                block,
                x_block,
                static_cast<int64_t>(type),
                variant};
    }

private:
    template <class Fn>
    void each_row(Fn fn) const {
        const auto &g = geometry;
        int64_t out = g.out_channels / g.groups;
        int64_t size = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
        for (int64_t o = 0; o < g.out_channels; ++o) {
            fn(o * size, (o * merged + o / out % merged) * size, size);
        }
    }
};

template <class Descriptor>
bool usable(const Descriptor &pd) {
    return pd && !is_reference(pd.impl_info_str());
}

dnnl::primitive_attr with_epilogue(const Problem &problem, bool addend, Relu relu) {
    auto attributes = own_scratchpad();
    dnnl::post_ops operations;
    if (addend) operations.append_binary(dnnl::algorithm::binary_add, problem.y_md());
    if (relu == Relu::Plain) operations.append_eltwise(dnnl::algorithm::eltwise_relu, 0.f, 0.f);
    if (relu == Relu::Six) operations.append_eltwise(dnnl::algorithm::eltwise_clip, 0.f, 6.f);
    attributes.set_post_ops(operations);
    return attributes;
}

// Each primitive first asks for the activations' own layouts; if oneDNN has only reference code for
// those, it chooses the layouts and activations are reordered around it.
struct Forward {
    Forward(const Problem &p, Pass pass, bool bias, bool addend, Relu relu) {
        auto kind =
            pass == Pass::Training ? prop_kind::forward_training : prop_kind::forward_inference;
        for (bool any : {false, true}) {
            pd = {cpu(),
                  kind,
                  kDirect,
                  p.x_md(any),
                  p.weights_md(p.type),
                  p.bias_md(bias),
                  p.y_md(any),
                  p.strides(),
                  p.dilations(),
                  p.padding_l(),
                  p.padding_r(),
                  with_epilogue(p, addend, relu),
                  true};
            if (usable(pd)) break;
        }
        if (!pd) throw std::runtime_error("oneDNN has no such convolution");
        primitive = dnnl::convolution_forward(pd);
    }
    dnnl::convolution_forward::primitive_desc pd;
    dnnl::convolution_forward primitive;
};

struct BackwardData {
    BackwardData(const Problem &p, const Forward &hint) {
        for (bool any : {false, true}) {
            pd = {cpu(),         kDirect,     p.x_md(any),      p.weights_md(p.type),
                  p.y_md(any),   p.strides(), p.dilations(),    p.padding_l(),
                  p.padding_r(), hint.pd,     own_scratchpad(), true};
            if (usable(pd)) break;
        }
        if (!pd) throw std::runtime_error("oneDNN has no such input gradient");
        primitive = dnnl::convolution_backward_data(pd);
    }
    dnnl::convolution_backward_data::primitive_desc pd;
    dnnl::convolution_backward_data primitive;
};

struct BackwardWeights {
    BackwardWeights(const Problem &p, bool bias, const Forward &hint) {
        for (bool any : {false, true}) {
            pd = {cpu(),
                  kDirect,
                  p.x_md(any),
                  p.weights_md(Type::f32),
                  p.bias_md(bias),
                  p.y_md(any),
                  p.strides(),
                  p.dilations(),
                  p.padding_l(),
                  p.padding_r(),
                  hint.pd,
                  own_scratchpad(),
                  true};
            if (usable(pd)) break;
        }
        if (!pd) throw std::runtime_error("oneDNN has no such weight gradient");
        primitive = dnnl::convolution_backward_weights(pd);
    }
    dnnl::convolution_backward_weights::primitive_desc pd;
    dnnl::convolution_backward_weights primitive;
};

std::shared_ptr<const Forward> forward(const Problem &p, Pass pass, bool bias, bool addend,
                                       Relu relu) {
    int64_t variant =
        (pass == Pass::Training) | bias << 1 | addend << 2 | static_cast<int64_t>(relu) << 3;
    return cache<Forward>().get_or_create(p.key(variant),
                                          [&] { return Forward(p, pass, bias, addend, relu); });
}

std::shared_ptr<const Forward> forward(const Problem &p, Pass pass, const Epilogue &epilogue) {
    return forward(p, pass, epilogue.bias, epilogue.addend, epilogue.relu);
}

std::shared_ptr<const BackwardData> backward_data(const Problem &p) {
    return cache<BackwardData>().get_or_create(p.key(0), [&] {
        return BackwardData(p, *forward(p, Pass::Training, false, false, Relu::None));
    });
}

std::shared_ptr<const BackwardWeights> backward_weights(const Problem &p, bool bias) {
    return cache<BackwardWeights>().get_or_create(p.key(bias), [&] {
        return BackwardWeights(p, bias, *forward(p, Pass::Training, false, false, Relu::None));
    });
}

// `data` in layout `to_md`: itself, or a copy in `slot`.
const void *in_layout(const memory::desc &from_md, const void *data, const memory::desc &to_md,
                      Slot slot) {
    if (from_md == to_md) return data;
    void *copy = scratch(slot, to_md.get_size());
    reorder(from_md, data, to_md, copy);
    return copy;
}

void run_forward(const Problem &p, const Forward &f, const void *x, const void *packed,
                 const Epilogue &epilogue, void *y) {
    const auto &pd = f.pd;
    const void *source = in_layout(p.x_md(), x, pd.src_desc(), Slot::Layout);
    bool direct = pd.dst_desc() == p.y_md();
    void *target = direct ? y : scratch(Slot::OtherLayout, pd.dst_desc().get_size());
    std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, view(pd.src_desc(), source)},
                                              {DNNL_ARG_WEIGHTS, view(pd.weights_desc(), packed)},
                                              {DNNL_ARG_DST, view(pd.dst_desc(), target)}};
    if (epilogue.bias) arguments[DNNL_ARG_BIAS] = view(pd.bias_desc(), epilogue.bias);
    if (epilogue.addend) {
        arguments[DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1] =
            view(p.y_md(), epilogue.addend);
    }
    execute(f.primitive, pd.scratchpad_desc(), arguments);
    if (!direct) reorder(pd.dst_desc(), target, p.y_md(), y);
}

}  // namespace

void Geometry::check() const {
    auto require = [](bool holds, const char *what) {
        if (!holds) throw std::invalid_argument(std::string("no such convolution: ") + what);
    };
    require(in_channels >= 1 && out_channels >= 1, "it has no channels");
    require(groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0,
            "groups must divide the channels");
    auto require_range = [&](int64_t value, int64_t least, const char *what) {
        require(value >= least && value <= kMaxGeometry, what);
    };
    require_range(stride_h, 1, "strides must be positive");
    require_range(stride_w, 1, "strides must be positive");
    require_range(dilation_h, 1, "dilations must be positive");
    require_range(dilation_w, 1, "dilations must be positive");
    require(kernel_h >= 1 && kernel_w >= 1, "the kernel is empty");
    for (int64_t side : {padding.top, padding.bottom, padding.left, padding.right}) {
        require_range(side, 0, "padding must not be negative");
    }
    require(height + padding.top + padding.bottom > dilation_h * (kernel_h - 1) &&
                width + padding.left + padding.right > dilation_w * (kernel_w - 1),
            "the kernel is larger than the padded input");
}

void convolve(const Convolution &conv, Pass pass, const void *x, const float *weights,
              const Epilogue &epilogue, void *y) {
    Problem p(conv);
    auto f = forward(p, pass, epilogue);
    void *packed = scratch(Slot::Weights, f->pd.weights_desc().get_size());
    reorder(p.plain_weights_md(), p.expanded(weights), f->pd.weights_desc(), packed);
    run_forward(p, *f, x, packed, epilogue, y);
}

Key packed_layout(const Convolution &conv, const Epilogue &epilogue) {
    Problem p(conv);
    auto desc = forward(p, Pass::Inference, epilogue)->pd.weights_desc();
    Key layout{static_cast<int64_t>(desc.get_data_type()), p.merged, conv.geometry.groups};
    for (const Dims &part : {desc.get_dims(), desc.get_padded_dims(), desc.get_strides(),
                             desc.get_inner_blks(), desc.get_inner_idxs()}) {
        layout.push_back(static_cast<int64_t>(part.size()));
        layout.insert(layout.end(), part.begin(), part.end());
    }
    return layout;
}

size_t packed_size(const Convolution &conv, const Epilogue &epilogue) {
    return forward(Problem(conv), Pass::Inference, epilogue)->pd.weights_desc().get_size();
}

void pack(const Convolution &conv, const Epilogue &epilogue, const float *weights, void *packed) {
    Problem p(conv);
    auto f = forward(p, Pass::Inference, epilogue);
    reorder(p.plain_weights_md(), p.expanded(weights), f->pd.weights_desc(), packed);
}

void convolve_packed(const Convolution &conv, const void *x, const void *packed,
                     const Epilogue &epilogue, void *y) {
    Problem p(conv);
    run_forward(p, *forward(p, Pass::Inference, epilogue), x, packed, epilogue, y);
}

void input_gradient(const Convolution &conv, const void *dy, const float *weights, void *dx) {
    Problem p(conv);
    auto b = backward_data(p);
    const auto &pd = b->pd;
    void *packed = scratch(Slot::Weights, pd.weights_desc().get_size());
    reorder(p.plain_weights_md(), p.expanded(weights), pd.weights_desc(), packed);
    const void *source = in_layout(p.y_md(), dy, pd.diff_dst_desc(), Slot::Layout);
    bool direct = pd.diff_src_desc() == p.x_md();
    void *target = direct ? dx : scratch(Slot::OtherLayout, pd.diff_src_desc().get_size());
    execute(b->primitive, pd.scratchpad_desc(),
            {{DNNL_ARG_DIFF_DST, view(pd.diff_dst_desc(), source)},
             {DNNL_ARG_WEIGHTS, view(pd.weights_desc(), packed)},
             {DNNL_ARG_DIFF_SRC, view(pd.diff_src_desc(), target)}});
    if (!direct) reorder(pd.diff_src_desc(), target, p.x_md(), dx);
}

void weight_gradient(const Convolution &conv, const void *x, const void *dy, float *dweights,
                     float *dbias) {
    Problem p(conv);
    auto b = backward_weights(p, dbias != nullptr);
    const auto &pd = b->pd;
    void *packed = scratch(Slot::Weights, pd.diff_weights_desc().get_size());
    const void *source = in_layout(p.x_md(), x, pd.src_desc(), Slot::Layout);
    const void *gradient = in_layout(p.y_md(), dy, pd.diff_dst_desc(), Slot::OtherLayout);
    std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC, view(pd.src_desc(), source)},
        {DNNL_ARG_DIFF_DST, view(pd.diff_dst_desc(), gradient)},
        {DNNL_ARG_DIFF_WEIGHTS, view(pd.diff_weights_desc(), packed)}};
    if (dbias) arguments[DNNL_ARG_DIFF_BIAS] = view(pd.diff_bias_desc(), dbias);
    if (p.type == Type::bf16 && conv.geometry.out_width() == 1) {
        // oneDNN 3.10 pairs pixels in bfloat16 and reads a partner that it never wrote (found by
        // tests/kernels/fuzz.py). execute() takes the same slot, so clear it first.
        size_t size = pd.scratchpad_desc().get_size();
        std::memset(scratch(Slot::Primitive, size), 0, size);
    }
    execute(b->primitive, pd.scratchpad_desc(), arguments);
    if (p.merged == 1) {
        return reorder(pd.diff_weights_desc(), packed, p.plain_weights_md(), dweights);
    }
    auto *wide = static_cast<float *>(scratch(Slot::Layout, p.plain_weights_md().get_size()));
    reorder(pd.diff_weights_desc(), packed, p.plain_weights_md(), wide);
    p.shrink(wide, dweights);
}

}  // namespace acnet
