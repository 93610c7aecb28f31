// Convolutions with batch norm, a shortcut and ReLU, in training.
#include "conv_norm.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "ready_gradients.h"

namespace acnet {

int branches_of(const Arguments &a) {
    int64_t branches = a.attribute(kBranches);
    if (branches < 0 || branches > kMaxBranches) {
        throw std::invalid_argument(std::to_string(branches) + " branches; at most " +
                                    std::to_string(kMaxBranches) + " are computed together");
    }
    return static_cast<int>(branches);
}

int attributes_of(int branches) { return kPadding + 4 * branches; }

Convolution convolution_of(const Arguments &a, const Activation &x, int weight, int branch) {
    int padding = kPadding + 4 * branch;
    Geometry g{x.c,
               a.dim(weight, 0),
               x.h,
               x.w,
               a.dim(weight, 2),
               a.dim(weight, 3),
               a.attribute(kStrideH),
               a.attribute(kStrideW),
               a.attribute(kDilationH),
               a.attribute(kDilationW),
               {a.attribute(padding), a.attribute(padding + 1), a.attribute(padding + 2),
                a.attribute(padding + 3)},
               a.attribute(kGroups)};
    g.check();
    int64_t block = a.attribute(kBlock);
    if ((block != 8 && block != 16) || g.out_channels % block) {
        throw std::invalid_argument(std::to_string(g.out_channels) +
                                    " output channels do not make whole blocks of " +
                                    std::to_string(block));
    }
    return {g, x, block};
}

const float *weights_of(const Arguments &a, const Convolution &conv, int weight) {
    const Geometry &g = conv.geometry;
    return a.floats(weight, {g.out_channels, g.in_channels / g.groups, g.kernel_h, g.kernel_w});
}

const float *bias_of(const Arguments &a, const Convolution &conv, int bias) {
    return a.size(bias) == 1 ? nullptr : a.floats(bias, {conv.geometry.out_channels});
}

BatchNorm batch_norm_of(const Arguments &a, int first, int64_t channels) {
    BatchNorm norm{};
    norm.branches = std::max(branches_of(a), 1);
    norm.relu = a.relu(kRelu);
    norm.eps = a.real_attribute(kEps), norm.decay = a.real_attribute(kDecay);
    for (int b = 0; b < norm.branches; ++b) {
        Branch branch(first, b);
        norm.gamma[b] = a.floats(branch.gamma, {channels});
        norm.beta[b] = a.floats(branch.beta, {channels});
        norm.running_mean[b] = a.floats(branch.mean, {channels});
        norm.running_variance[b] = a.floats(branch.variance, {channels});
    }
    return norm;
}

}  // namespace acnet

using namespace acnet;

// (attributes, x, shortcut, [weight, gamma, beta, running mean, running variance] per branch)
// -> (y, statistics (branches, 2, C), convolution per branch,
//     [new running mean, new running variance] per branch)
ACNET_KERNEL(conv_norm_forward) {
    int branches = branches_of(a), y_index = 3 + 5 * branches;
    a.expect(attributes_of(branches), y_index, 2 + 3 * branches);
    Activation x = a.activation(1), y = convolution_of(a, x, Branch(3, 0).weight, 0).y();
    BatchNorm norm = batch_norm_of(a, 3, y.c);
    float *statistics = a.output_floats(y_index + 1, {branches, 2, y.c});
    void *convolved[kMaxBranches];
    float *running[2 * kMaxBranches];
    for (int b = 0; b < branches; ++b) {
        convolved[b] = a.output_activation(y_index + 2 + b, y);
        for (int part : {0, 1}) {
            int index = y_index + 2 + branches + 2 * b + part;
            running[2 * b + part] = a.output_floats(index, {y.c});
        }
        int weight = Branch(3, b).weight;
        Convolution conv = convolution_of(a, x, weight, b);
        convolve(conv, Pass::Training, a.activation_data(1, x), weights_of(a, conv, weight), {},
                 convolved[b]);
    }
    const void *shortcut = a.attribute(kShortcut) ? a.activation_data(2, y) : nullptr;
    batch_norm_forward(norm, y, convolved, shortcut, a.output_activation(y_index, y), statistics,
                       running);
}

// (attributes, x, dy, y, statistics,
//  [weight, gamma, beta, running mean, running variance] per branch, convolution per branch)
// -> (dx, gradient of the shortcut, [dweight, dgamma, dbeta] per branch)
ACNET_KERNEL(conv_norm_backward) {
    int branches = branches_of(a), first = 5, dx_index = first + 6 * branches;
    a.expect(attributes_of(branches), dx_index, 2 + 3 * branches);
    Activation x = a.activation(1), y = a.activation(3);
    bool shortcut = a.attribute(kShortcut);
    BatchNorm norm = batch_norm_of(a, first, y.c);
    // The gradients of the convolutions overwrite the convolutions. These are outputs of
    // conv_norm_forward that MindSpore hands to this kernel and to no other, and they are in the
    // cache here.
    void *convolved[kMaxBranches];
    float *dgamma[kMaxBranches], *dbeta[kMaxBranches];
    for (int b = 0; b < branches; ++b) {
        convolved[b] = a.overwritable_activation(first + 5 * branches + b, y);
        dgamma[b] = a.output_floats(dx_index + 3 + 3 * b, {y.c});
        dbeta[b] = a.output_floats(dx_index + 4 + 3 * b, {y.c});
    }
    batch_norm_backward(norm, y, a.activation_data(2, y), convolved,
                        shortcut && norm.relu != Relu::None ? a.activation_data(3, y) : nullptr,
                        a.floats(4, {branches, 2, y.c}), convolved,
                        shortcut ? a.output_activation(dx_index + 1, y) : nullptr, dgamma, dbeta);
    void *dx = a.output_activation(dx_index, x);
    for (int b = 0; b < branches; ++b) {
        int weight = Branch(first, b).weight, dweight_index = dx_index + 2 + 3 * b;
        Convolution conv = convolution_of(a, x, weight, b);
        const Geometry &g = conv.geometry;
        float *dweight = a.output_floats(
            dweight_index, {g.out_channels, g.in_channels / g.groups, g.kernel_h, g.kernel_w});
        weight_gradient(conv, a.activation_data(1, x), convolved[b], dweight, nullptr);
        gradient_ready(a, dweight_index, dweight);
        if (!a.attribute(kInputGradient)) {
            std::memset(dx, 0, x.bytes());
            continue;
        }
        void *part = b == 0 ? dx : scratch(Slot::Sum, x.bytes());
        input_gradient(conv, convolved[b], weights_of(a, conv, weight), part);
        if (b > 0) add(x.type, dx, part, dx, x.size());
    }
}

// (attributes, x, shortcut, weight, bias) -> y
ACNET_KERNEL(conv_forward) {
    a.expect(attributes_of(1), 5, 1);
    Activation x = a.activation(1);
    Convolution conv = convolution_of(a, x, 3, 0);
    Activation y = conv.y();
    Epilogue epilogue{bias_of(a, conv, 4),
                      a.attribute(kShortcut) ? a.activation_data(2, y) : nullptr, a.relu(kRelu)};
    convolve(conv, Pass::Training, a.activation_data(1, x), weights_of(a, conv, 3), epilogue,
             a.output_activation(5, y));
}

// (attributes, x, dy, y, weight, bias) -> (dx, gradient of the shortcut, dweight, dbias)
ACNET_KERNEL(conv_backward) {
    a.expect(attributes_of(1), 6, 4);
    Activation x = a.activation(1);
    Convolution conv = convolution_of(a, x, 4, 0);
    const Geometry &g = conv.geometry;
    Activation y = conv.y();
    const void *dy = a.activation_data(2, y);
    void *dshortcut = a.attribute(kShortcut) ? a.output_activation(7, y) : nullptr;
    if (Relu relu = a.relu(kRelu); relu != Relu::None) {
        void *to = dshortcut ? dshortcut : scratch(Slot::Gradient, y.bytes());
        relu_backward(y, relu, a.activation_data(3, y), dy, to);
        dy = to;
    } else if (dshortcut) {
        std::memcpy(dshortcut, dy, y.bytes());
    }
    float *dweight =
        a.output_floats(8, {g.out_channels, g.in_channels / g.groups, g.kernel_h, g.kernel_w});
    float *dbias = bias_of(a, conv, 5) ? a.output_floats(9, {g.out_channels}) : nullptr;
    weight_gradient(conv, a.activation_data(1, x), dy, dweight, dbias);
    gradient_ready(a, 8, dweight);
    void *dx = a.output_activation(6, x);
    if (a.attribute(kInputGradient)) input_gradient(conv, dy, weights_of(a, conv, 4), dx);
    else std::memset(dx, 0, x.bytes());
}

// (attributes, x, gamma, beta, running mean, running variance)
// -> (y, statistics (1, 2, C), new running mean, new running variance)
ACNET_KERNEL(norm_forward) {
    a.expect(attributes_of(0), 6, 4);
    Activation x = a.activation(1);
    const void *source[] = {a.activation_data(1, x)};
    float *running[] = {a.output_floats(8, {x.c}), a.output_floats(9, {x.c})};
    batch_norm_forward(batch_norm_of(a, 1, x.c), x, source, nullptr, a.output_activation(6, x),
                       a.output_floats(7, {1, 2, x.c}), running);
}

// (attributes, dy, x, gamma, beta, running mean, running variance, statistics)
// -> (dx, dgamma, dbeta)
ACNET_KERNEL(norm_backward) {
    a.expect(attributes_of(0), 8, 3);
    Activation x = a.activation(2);
    const void *source[] = {a.activation_data(2, x)};
    void *dx[] = {a.output_activation(8, x)};
    float *dgamma[] = {a.output_floats(9, {x.c})}, *dbeta[] = {a.output_floats(10, {x.c})};
    batch_norm_backward(batch_norm_of(a, 2, x.c), x, a.activation_data(1, x), source, nullptr,
                        a.floats(7, {1, 2, x.c}), dx, nullptr, dgamma, dbeta);
}
