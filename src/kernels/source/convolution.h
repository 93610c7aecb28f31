// Convolutions of blocked activations. Weights and their gradients are plain (O, I / groups, kh,
// kw) float32.
#pragma once

#include "cache.h"
#include "onednn.h"

namespace acnet {

struct Padding {
    int64_t top, bottom, left, right;
};

struct Geometry {
    int64_t in_channels, out_channels, height, width, kernel_h, kernel_w;
    int64_t stride_h, stride_w, dilation_h, dilation_w;
    Padding padding;
    int64_t groups;

    int64_t out_height() const {
        int64_t reach = dilation_h * (kernel_h - 1) + 1;
        return (height + padding.top + padding.bottom - reach) / stride_h + 1;
    }
    int64_t out_width() const {
        int64_t reach = dilation_w * (kernel_w - 1) + 1;
        return (width + padding.left + padding.right - reach) / stride_w + 1;
    }
    int64_t weights() const { return out_channels * (in_channels / groups) * kernel_h * kernel_w; }

    // Throws if there is no such convolution.
    void check() const;
};

// What follows the products, in the same pass: y = [relu](conv(x) + bias [+ addend]).
struct Epilogue {
    const float *bias = nullptr;
    const void *addend = nullptr;  // of y's layout and type
    Relu relu = Relu::None;
};

// A convolution of one input size. `block` is the block of y; `pass` is training or inference.
enum class Pass { Training, Inference };
struct Convolution {
    Geometry geometry;
    Activation x;
    int64_t block;

    Activation y() const {
        return {x.n,   geometry.out_channels, geometry.out_height(), geometry.out_width(), block,
                x.type};
    }
};

// Packs the weights at every call.
void convolve(const Convolution &conv, Pass pass, const void *x, const float *weights,
              const Epilogue &epilogue, void *y);

// For weights that stay the same: pack them once for inference. `packed_layout` describes the
// packed form; two convolutions with the same layout can share it.
Key packed_layout(const Convolution &conv, const Epilogue &epilogue);
size_t packed_size(const Convolution &conv, const Epilogue &epilogue);
void pack(const Convolution &conv, const Epilogue &epilogue, const float *weights, void *packed);
void convolve_packed(const Convolution &conv, const void *x, const void *packed,
                     const Epilogue &epilogue, void *y);

void input_gradient(const Convolution &conv, const void *dy, const float *weights, void *dx);
// `dbias` may be null.
void weight_gradient(const Convolution &conv, const void *x, const void *dy, float *dweights,
                     float *dbias);

}  // namespace acnet
