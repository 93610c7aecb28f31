// Convolutions in inference: batch norms are folded into the weights, and the packed weights are
// kept from call to call.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "conv_norm.h"
#include "elementwise.h"
#include "thread_pool.h"

namespace {

using namespace acnet;

// Batch norm in inference is x * scale + shift.
struct ScaleShift {
    double scale, shift;
};

ScaleShift fold(const BatchNorm &norm, int branch, int64_t channel) {
    double variance = norm.running_variance[branch][channel];
    double scale = norm.gamma[branch][channel] / std::sqrt(variance + norm.eps);
    return {scale, norm.beta[branch][channel] - norm.running_mean[branch][channel] * scale};
}

// The plain convolution that computes the same: kernels scaled by their batch norms and added up
// around a common centre.
void fuse(const Arguments &a, const BatchNorm &norm, const Geometry &g, float *weights,
          float *bias) {
    int64_t inputs = g.in_channels / g.groups, kernel = g.kernel_h * g.kernel_w;
    std::memset(weights, 0, g.weights() * sizeof(float));
    parallel_for(g.out_channels, [&](int64_t o) {
        double total = 0;
        for (int b = 0; b < norm.branches; ++b) {
            ScaleShift folded = fold(norm, b, o);
            total += folded.shift;
            int weight = Branch(3, b).weight;
            int64_t rows = a.dim(weight, 2), columns = a.dim(weight, 3);
            int64_t top = (g.kernel_h - rows) / 2, left = (g.kernel_w - columns) / 2;
            const float *from = a.floats(weight, {g.out_channels, inputs, rows, columns}) +
                                o * inputs * rows * columns;
            for (int64_t i = 0; i < inputs; ++i) {
                float *to = weights + (o * inputs + i) * kernel;
                for (int64_t r = 0; r < rows; ++r) {
                    for (int64_t c = 0; c < columns; ++c) {
                        to[(top + r) * g.kernel_w + left + c] +=
                            static_cast<float>(folded.scale * *from++);
                    }
                }
            }
        }
        bias[o] = static_cast<float>(total);
    });
}

uint64_t hash_piece(const void *data, size_t size, uint64_t seed) {
    constexpr uint64_t kPrime = 0x9e3779b97f4a7c15ull;
    uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
    const char *from = static_cast<const char *>(data);
    for (; size >= 32; size -= 32, from += 32) {
        uint64_t part[4];
        std::memcpy(part, from, 32);
        for (int l = 0; l < 4; ++l) lanes[l] = (lanes[l] ^ part[l]) * kPrime + (lanes[l] >> 29);
    }
    uint64_t rest[4] = {};
    std::memcpy(rest, from, size);
    for (int l = 0; l < 4; ++l) lanes[l] = (lanes[l] ^ rest[l]) * kPrime;
    return lanes[0] ^ lanes[1] * 3 ^ lanes[2] * 5 ^ lanes[3] * 7;
}

// On all cores: at batch size 1 hashing reads as much memory as the convolution.
uint64_t hash(const void *data, size_t size, uint64_t seed) {
    constexpr size_t kPiece = 1 << 16;
    std::vector<uint64_t> pieces((size + kPiece - 1) / kPiece);
    parallel_for(pieces.size(), [&](int64_t i) {
        pieces[i] = hash_piece(static_cast<const char *>(data) + i * kPiece,
                               std::min(kPiece, size - i * kPiece), seed);
    });
    return hash_piece(pieces.data(), pieces.size() * sizeof(uint64_t), seed);
}

// Weights in the layout of a kernel, and the hash of the parameters that they were made from.
struct PackedWeights {
    uint64_t parameters_hash;
    std::unique_ptr<char, void (*)(void *)> memory;
    std::vector<float> bias;
};

// Hash of parameters `first` to `last`, exclusive, all float32.
uint64_t hash_of_parameters(const Arguments &a, int first, int last) {
    uint64_t result = 1;
    for (int index = first; index < last; ++index) {
        const float *data = nullptr;
        switch (a.rank(index)) {
            case 1:
                data = a.floats(index, {a.dim(index, 0)});
                break;
            default:
                data = a.floats(
                    index, {a.dim(index, 0), a.dim(index, 1), a.dim(index, 2), a.dim(index, 3)});
        }
        result = hash(data, a.size(index) * sizeof(float), result);
    }
    return result;
}

// The packed weights of a layer depend on its parameters and on the layout that the kernel asks
// for, which is the same for most batch sizes. The cache holds one copy per layer and layout; when
// the parameters change, a new copy replaces it. `fill(weights, bias)` writes the plain weights.
template <class Fill>
std::shared_ptr<const PackedWeights> packed_weights(const Arguments &a, const Convolution &conv,
                                                    const Epilogue &epilogue, int first, int last,
                                                    Fill fill) {
    Key key = packed_layout(conv, epilogue);
    key.push_back(reinterpret_cast<int64_t>(weights_of(a, conv, first)));
    uint64_t parameters_hash = hash_of_parameters(a, first, last);
    auto packed = cache<PackedWeights>().find(key);
    if (packed && packed->parameters_hash == parameters_hash) return packed;
    size_t size = (packed_size(conv, epilogue) + 63) / 64 * 64;
    PackedWeights made{parameters_hash,
                       {static_cast<char *>(std::aligned_alloc(64, size)), std::free},
                       std::vector<float>(conv.geometry.out_channels)};
    if (!made.memory) throw std::bad_alloc();
    std::vector<float> weights(conv.geometry.weights());
    fill(weights.data(), made.bias.data());
    pack(conv, epilogue, weights.data(), made.memory.get());
    return cache<PackedWeights>().put(key, std::make_shared<const PackedWeights>(std::move(made)));
}

template <class Fill>
void infer(const Arguments &a, const Convolution &conv, int first, int last, Fill fill) {
    Activation y = conv.y();
    // Any bias will do here: only whether there is one affects the layout.
    static const float some_bias = 0;
    Epilogue epilogue{&some_bias, a.attribute(kShortcut) ? a.activation_data(2, y) : nullptr,
                      a.relu(kRelu)};
    auto packed = packed_weights(a, conv, epilogue, first, last, fill);
    epilogue.bias = packed->bias.data();
    convolve_packed(conv, a.activation_data(1, conv.x), packed->memory.get(), epilogue,
                    a.output_activation(last, y));
}

}  // namespace

// (attributes, x, shortcut, [weight, gamma, beta, running mean, running variance] per branch) -> y
ACNET_KERNEL(conv_norm_inference) {
    int branches = branches_of(a), last = 3 + 5 * branches;
    a.expect(attributes_of(branches), last, 1);
    Convolution conv = convolution_of(a, a.activation(1), Branch(3, 0).weight, 0);
    BatchNorm norm = batch_norm_of(a, 3, conv.geometry.out_channels);
    infer(a, conv, 3, last,
          [&](float *weights, float *bias) { fuse(a, norm, conv.geometry, weights, bias); });
}

// (attributes, x, shortcut, weight, bias) -> y
ACNET_KERNEL(conv_inference) {
    a.expect(attributes_of(1), 5, 1);
    Convolution conv = convolution_of(a, a.activation(1), 3, 0);
    infer(a, conv, 3, 5, [&](float *weights, float *bias) {
        const float *from = bias_of(a, conv, 4);
        std::memcpy(weights, weights_of(a, conv, 3), conv.geometry.weights() * sizeof(float));
        for (int64_t o = 0; o < conv.geometry.out_channels; ++o) bias[o] = from ? from[o] : 0.f;
    });
}

// (attributes, x, gamma, beta, running mean, running variance) -> y
ACNET_KERNEL(norm_inference) {
    a.expect(attributes_of(0), 6, 1);
    Activation x = a.activation(1);
    BatchNorm norm = batch_norm_of(a, 1, x.c);
    std::vector<float> scales(x.c), shifts(x.c);
    for (int64_t c = 0; c < x.c; ++c) {
        ScaleShift folded = fold(norm, 0, c);
        scales[c] = static_cast<float>(folded.scale), shifts[c] = static_cast<float>(folded.shift);
    }
    scale_and_shift(x, a.activation_data(1, x), scales.data(), shifts.data(), norm.relu,
                    a.output_activation(6, x));
}
