// The operations that MindSpore calls; src/kernels/operations.py says what their tensors are.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "convolution.h"
#include "normalization.h"
#include "vectors.h"

namespace {

using namespace acnet;

// The table of settings of a convolution: as written by operations.py.
enum Setting { kBranches, kGroups, kStrideH, kStrideW, kDilationH, kDilationW, kRelu, kShortcut, kInputGradient, kBlock, kEps, kMomentum, kPadding };

Geometry geometry(const Arguments &a, const Activation &x, int weight, int branch) {
    int64_t at = kPadding + 4 * branch;
    return {x.c, a.dim(weight, 0), x.h, x.w, a.dim(weight, 2), a.dim(weight, 3), a.setting(kStrideH), a.setting(kStrideW), a.setting(kDilationH),
            a.setting(kDilationW), a.setting(at), a.setting(at + 1), a.setting(at + 2), a.setting(at + 3), a.setting(kGroups)};
}

// Where the weights of each branch are, then its gamma and beta, then its running mean and variance.
struct Branch {
    Branch(int first, int index) : weight(first + 5 * index), gamma(weight + 1), beta(weight + 2), mean(weight + 3), variance(weight + 4) {}
    int weight, gamma, beta, mean, variance;
};

Norm norm_of(const Arguments &a, int first) {
    // A batch norm alone has no branches of convolutions.
    Norm norm{std::max(static_cast<int>(a.setting(kBranches)), 1), a.setting(kRelu) != 0, a.real_setting(kEps), a.real_setting(kMomentum), {}, {}, {}, {}};
    if (norm.branches > kMostBranches) throw std::runtime_error("more than three branches");
    for (int b = 0; b < norm.branches; ++b) {
        Branch branch(first, b);
        norm.gamma[b] = a.data(branch.gamma), norm.beta[b] = a.data(branch.beta);
        norm.running_mean[b] = a.data(branch.mean), norm.running_variance[b] = a.data(branch.variance);
    }
    return norm;
}

size_t bytes(const Activation &x) { return x.n * x.c * x.pixels() * (x.type == Type::f32 ? 4 : 2); }

// fn(first, last) for parts of `size` elements, all but the last of a multiple of kLanes.
void in_parts(int64_t size, const std::function<void(int64_t, int64_t)> &fn) {
    constexpr int64_t kPart = 1 << 15;
    parallel_for((size + kPart - 1) / kPart, [&](int64_t part) { fn(part * kPart, std::min(size, (part + 1) * kPart)); });
}

template <class T> T plus(T one, T other) {
    T ones[kLanes] = {one}, others[kLanes] = {other};
    store(ones, load(ones) + load(others));
    return ones[0];
}

template <class T> void add(const T *one, const T *other, T *to, int64_t size) {
    in_parts(size, [&](int64_t i, int64_t last) {
        for (; i + kLanes <= last; i += kLanes) store(to + i, load(one + i) + load(other + i));
        for (; i < last; ++i) to[i] = plus(one[i], other[i]);
    });
}

void add(Type type, const void *one, const void *other, void *to, int64_t size) {
    if (type == Type::f32) add(static_cast<const float *>(one), static_cast<const float *>(other), static_cast<float *>(to), size);
    else add(static_cast<const bfloat16 *>(one), static_cast<const bfloat16 *>(other), static_cast<bfloat16 *>(to), size);
}

}  // namespace

// (settings, x, shortcut, [weight, gamma, beta, running mean, running variance] of each branch)
// -> (y, statistics (branches, 2, C), convolution of each branch, [new running mean, new running variance] of each branch)
ACNET_KERNEL(conv_norm_forward) {
    Activation x(a, 1);
    int branches = static_cast<int>(a.setting(kBranches)), output = 3 + 5 * branches;
    void *of_branches[kMostBranches];
    float *running[2 * kMostBranches];
    for (int b = 0; b < branches; ++b) {
        of_branches[b] = a.data<void>(output + 2 + b);
        for (int part : {0, 1}) running[2 * b + part] = a.data(output + 2 + branches + 2 * b + part);
        int weight = Branch(3, b).weight;
        convolve(geometry(a, x, weight, b), x, a.setting(kBlock), a.data<void>(1), a.data(weight), {}, of_branches[b], true);
    }
    normalize(norm_of(a, 3), Activation(a, output), of_branches, a.setting(kShortcut) ? a.data<void>(2) : nullptr, a.data<void>(output),
              a.data(output + 1), running);
}

// (settings, x, dy, y, statistics, [weight, gamma, beta, running mean, running variance] of each branch, convolution of each branch)
// -> (dx, gradient of the shortcut, [dweight, dgamma, dbeta] of each branch)
ACNET_KERNEL(conv_norm_backward) {
    Activation x(a, 1), of_y(a, 3);
    int branches = static_cast<int>(a.setting(kBranches)), first = 5, inputs = first + 6 * branches;
    bool shortcut = a.setting(kShortcut), relu = a.setting(kRelu);
    void *of_branches[kMostBranches];
    float *dgamma[kMostBranches], *dbeta[kMostBranches];
    for (int b = 0; b < branches; ++b) {
        of_branches[b] = a.data<void>(first + 5 * branches + b);
        dgamma[b] = a.data(inputs + 3 + 3 * b), dbeta[b] = a.data(inputs + 4 + 3 * b);
    }
    // The gradients of the convolutions take the place of what they were: nothing else reads it, and it is in the cache.
    void *const *gradients = of_branches;
    normalize_backward(norm_of(a, first), of_y, a.data<void>(2), of_branches, shortcut && relu ? a.data<void>(3) : nullptr, a.data(4), gradients,
                       shortcut ? a.data<void>(inputs + 1) : nullptr, dgamma, dbeta);
    for (int b = 0; b < branches; ++b) {
        int weight = Branch(first, b).weight;
        Geometry g = geometry(a, x, weight, b);
        gradient_of_weights(g, x, a.setting(kBlock), a.data<void>(1), gradients[b], a.data(inputs + 2 + 3 * b), nullptr);
        announce(a, inputs + 2 + 3 * b);
        if (!a.setting(kInputGradient)) {
            std::memset(a.data<void>(inputs), 0, bytes(x));
            continue;
        }
        void *dx = b == 0 ? a.data<void>(inputs) : scratch(Slot::Sum, bytes(x));
        gradient_of_input(g, x, a.setting(kBlock), gradients[b], a.data(weight), dx);
        if (b > 0) add(x.type, a.data<void>(inputs), dx, a.data<void>(inputs), x.n * x.c * x.pixels());
    }
}

// (settings, x, shortcut, weight, bias) -> y; a bias of one number is none
ACNET_KERNEL(conv_forward) {
    Activation x(a, 1);
    Geometry g = geometry(a, x, 3, 0);
    Epilogue epilogue{a.size(4) == g.out_channels ? a.data(4) : nullptr, a.setting(kShortcut) ? a.data<void>(2) : nullptr, a.setting(kRelu) != 0};
    convolve(g, x, a.setting(kBlock), a.data<void>(1), a.data(3), epilogue, a.data<void>(5), true);
}

namespace {

template <class T> void gate(const T *y, const T *gradient, T *to, int64_t size) {
    in_parts(size, [&](int64_t i, int64_t last) {
        for (; i < last; i += kLanes) store(to + i, where_positive(load(y + i), load(gradient + i)));
    });
}

// The gradient behind ReLU, which was open where y is positive. Blocks of channels are whole vectors.
void behind_relu(const Activation &y, const void *of_y, const void *gradient, void *to) {
    int64_t size = y.n * y.c * y.pixels();
    if (y.type == Type::f32) gate(static_cast<const float *>(of_y), static_cast<const float *>(gradient), static_cast<float *>(to), size);
    else gate(static_cast<const bfloat16 *>(of_y), static_cast<const bfloat16 *>(gradient), static_cast<bfloat16 *>(to), size);
}

}  // namespace

// (settings, x, dy, y, weight, bias) -> (dx, gradient of the shortcut, dweight, dbias)
ACNET_KERNEL(conv_backward) {
    Activation x(a, 1), y(a, 3);
    Geometry g = geometry(a, x, 4, 0);
    bool shortcut = a.setting(kShortcut);
    const void *dy = a.data<void>(2);
    if (a.setting(kRelu)) {
        void *to = shortcut ? a.data<void>(7) : scratch(Slot::Gradient, bytes(y));
        behind_relu(y, a.data<void>(3), dy, to);
        dy = to;
    } else if (shortcut) {
        std::memcpy(a.data<void>(7), dy, bytes(y));
    }
    gradient_of_weights(g, x, a.setting(kBlock), a.data<void>(1), dy, a.data(8), a.size(5) == g.out_channels ? a.data(9) : nullptr);
    announce(a, 8);
    if (a.setting(kInputGradient)) gradient_of_input(g, x, a.setting(kBlock), dy, a.data(4), a.data<void>(6));
    else std::memset(a.data<void>(6), 0, bytes(x));
}

// (settings, x, gamma, beta, running mean, running variance) 
// -> (y, statistics (1, 2, C), new running mean, new running variance)
ACNET_KERNEL(norm_forward) {
    void *x[] = {a.data<void>(1)};
    float *running[] = {a.data(8), a.data(9)};
    // As of a branch whose weights stand where x does.
    normalize(norm_of(a, 1), Activation(a, 1), x, nullptr, a.data<void>(6), a.data(7), running);
}

// (settings, dy, x, gamma, beta, running mean, running variance, statistics) -> (dx, dgamma, dbeta)
ACNET_KERNEL(norm_backward) {
    void *x[] = {a.data<void>(2)}, *dx[] = {a.data<void>(8)};
    float *dgamma[] = {a.data(9)}, *dbeta[] = {a.data(10)};
    normalize_backward(norm_of(a, 2), Activation(a, 2), a.data<void>(1), x, nullptr, a.data(7), dx, nullptr, dgamma, dbeta);
}

namespace {

template <class T> void scale_and_shift(const Activation &shape, const T *x, T *y, const float *scale, const float *shift, bool relu) {
    int64_t blocks = shape.c / shape.block, size = shape.pixels() * shape.block;
    parallel_for(shape.n * blocks, [&](int64_t index) {
        const float *a = scale + index % blocks * shape.block, *c = shift + index % blocks * shape.block;
        for (int64_t i = index * size, end = i + size; i < end; i += shape.block)
            for (int64_t v = 0; v < shape.block; v += kLanes) {
                Floats value = load(x + i + v) * load(a + v) + load(c + v);
                store(y + i + v, relu ? positive(value) : value);
            }
    });
}

// Scale and shift by which a batch norm in inference multiplies and adds.
void fold(const Norm &norm, int branch, int64_t channel, double &scale, double &shift) {
    scale = norm.gamma[branch][channel] / std::sqrt(static_cast<double>(norm.running_variance[branch][channel]) + norm.eps);
    shift = norm.beta[branch][channel] - norm.running_mean[branch][channel] * scale;
}

// The plain convolution that computes the same in inference: kernels scaled by their batch norms and added up around a common centre.
void fuse(const Arguments &a, const Norm &norm, const Geometry &g, float *weights, float *bias) {
    int64_t inputs = g.in_channels / g.groups, kernel = g.kernel_h * g.kernel_w;
    std::memset(weights, 0, g.weights() * sizeof(float));
    parallel_for(g.out_channels, [&](int64_t o) {
        double total = 0;
        for (int b = 0; b < norm.branches; ++b) {
            double scale, shift;
            fold(norm, b, o, scale, shift);
            total += shift;
            int weight = Branch(3, b).weight;
            int64_t rows = a.dim(weight, 2), columns = a.dim(weight, 3), top = (g.kernel_h - rows) / 2, left = (g.kernel_w - columns) / 2;
            const float *from = a.data(weight) + o * inputs * rows * columns;
            for (int64_t i = 0; i < inputs; ++i)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < columns; ++c)
                        weights[(o * inputs + i) * kernel + (top + r) * g.kernel_w + left + c] += static_cast<float>(scale * *from++);
        }
        bias[o] = static_cast<float>(total);
    });
}

uint64_t fingerprint_of_piece(const void *data, size_t size, uint64_t seed) {
    constexpr uint64_t kPrime = 0x9e3779b97f4a7c15ull;
    uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
    const char *from = static_cast<const char *>(data);
    for (; size >= 32; size -= 32, from += 32) {
        uint64_t words[4];
        std::memcpy(words, from, 32);
        for (int l = 0; l < 4; ++l) lanes[l] = (lanes[l] ^ words[l]) * kPrime + (lanes[l] >> 29);
    }
    uint64_t rest[4] = {};
    std::memcpy(rest, from, size);
    for (int l = 0; l < 4; ++l) lanes[l] = (lanes[l] ^ rest[l]) * kPrime;
    return lanes[0] ^ lanes[1] * 3 ^ lanes[2] * 5 ^ lanes[3] * 7;
}

// By all cores: of one image every weight is read twice, here and by its convolution.
uint64_t fingerprint(const void *data, size_t size, uint64_t seed) {
    constexpr size_t kPiece = 1 << 16;
    std::vector<uint64_t> pieces((size + kPiece - 1) / kPiece);
    parallel_for(pieces.size(), [&](int64_t i) {
        pieces[i] = fingerprint_of_piece(static_cast<const char *>(data) + i * kPiece, std::min(kPiece, size - i * kPiece), seed);
    });
    return fingerprint_of_piece(pieces.data(), pieces.size() * sizeof(uint64_t), seed);
}

// Weights as the kernel takes them, made anew when what they were made of has changed.
struct Packed {
    std::mutex mutex;
    uint64_t made_of = 0;
    std::unique_ptr<char, void (*)(void *)> weights{nullptr, std::free};
    std::vector<float> bias;
};

std::shared_ptr<Packed> packed_for(const std::vector<int64_t> &key) {
    constexpr size_t kMost = 1024;
    static std::mutex mutex;
    static auto *const every = new std::map<std::vector<int64_t>, std::shared_ptr<Packed>>;
    std::lock_guard<std::mutex> lock(mutex);
    // Weights of networks that are gone.
    if (every->size() > kMost) every->clear();
    auto &found = (*every)[key];
    if (!found) found = std::make_shared<Packed>();
    return found;
}

void infer(const Arguments &a, const Activation &x, const Geometry &g, Epilogue epilogue, void *y, int first, int last,
           const std::function<void(float *, float *)> &fill) {
    int64_t block = a.setting(kBlock);
    auto packed = packed_for({reinterpret_cast<int64_t>(a.data<void>(first)), x.n, x.h, x.w, x.block, block, static_cast<int64_t>(x.type),
                              epilogue.relu, epilogue.addend != nullptr});
    std::lock_guard<std::mutex> lock(packed->mutex);
    uint64_t made_of = 1;
    for (int index = first; index < last; ++index) made_of = fingerprint(a.data<void>(index), a.size(index) * sizeof(float), made_of);
    packed->bias.resize(g.out_channels);
    epilogue.bias = packed->bias.data();
    if (!packed->weights || packed->made_of != made_of) {
        std::vector<float> weights(g.weights());
        fill(weights.data(), packed->bias.data());
        size_t size = (packed_size(g, x, block, epilogue) + 63) / 64 * 64;
        packed->weights.reset(static_cast<char *>(std::aligned_alloc(64, size)));
        if (!packed->weights) throw std::bad_alloc();
        pack(g, x, block, epilogue, weights.data(), packed->weights.get());
        packed->made_of = made_of;
    }
    convolve_packed(g, x, block, a.data<void>(1), packed->weights.get(), epilogue, y);
}

}  // namespace

// As conv_norm_forward, with running statistics and in one convolution -> y
ACNET_KERNEL(conv_norm_inference) {
    Activation x(a, 1);
    Norm norm = norm_of(a, 3);
    int last = 3 + 5 * norm.branches;
    Geometry g = geometry(a, x, 3, 0);
    Epilogue epilogue{nullptr, a.setting(kShortcut) ? a.data<void>(2) : nullptr, norm.relu};
    infer(a, x, g, epilogue, a.data<void>(last), 3, last, [&](float *weights, float *bias) { fuse(a, norm, g, weights, bias); });
}

// As conv_forward
ACNET_KERNEL(conv_inference) {
    Activation x(a, 1);
    Geometry g = geometry(a, x, 3, 0);
    Epilogue epilogue{nullptr, a.setting(kShortcut) ? a.data<void>(2) : nullptr, a.setting(kRelu) != 0};
    infer(a, x, g, epilogue, a.data<void>(5), 3, 5, [&](float *weights, float *bias) {
        std::memcpy(weights, a.data(3), g.weights() * sizeof(float));
        for (int64_t o = 0; o < g.out_channels; ++o) bias[o] = a.size(4) == g.out_channels ? a.data(4)[o] : 0.f;
    });
}

// (settings, x, gamma, beta, running mean, running variance) -> y
ACNET_KERNEL(norm_inference) {
    Activation x(a, 1);
    Norm norm = norm_of(a, 1);
    std::vector<float> scales(x.c), shifts(x.c);
    for (int64_t c = 0; c < x.c; ++c) {
        double scale, shift;
        fold(norm, 0, c, scale, shift);
        scales[c] = static_cast<float>(scale), shifts[c] = static_cast<float>(shift);
    }
    if (x.type == Type::f32) scale_and_shift(x, a.data(1), a.data(6), scales.data(), shifts.data(), norm.relu);
    else scale_and_shift(x, a.data<bfloat16>(1), a.data<bfloat16>(6), scales.data(), shifts.data(), norm.relu);
}

// (a, b), of one shape -> a + b
ACNET_KERNEL(add) { add(a.type(0), a.data<void>(0), a.data<void>(1), a.data<void>(2), a.size(0)); }
