// Convolutions on blocked activations; weights and their gradients are plain (O, I / groups, kh, kw) float32.
#pragma once

#include "runtime.h"

namespace acnet {

struct Geometry {
    int64_t in_channels, out_channels, height, width, kernel_h, kernel_w;
    int64_t stride_h, stride_w, dilation_h, dilation_w, top, bottom, left, right, groups;

    int64_t out_height() const { return (height + top + bottom - dilation_h * (kernel_h - 1) - 1) / stride_h + 1; }
    int64_t out_width() const { return (width + left + right - dilation_w * (kernel_w - 1) - 1) / stride_w + 1; }
    int64_t weights() const { return out_channels * (in_channels / groups) * kernel_h * kernel_w; }
};

// What is computed behind the products, in one pass: y = [relu](conv(x) + bias [+ addend]).
struct Epilogue {
    const float *bias = nullptr;
    const void *addend = nullptr;  // of y's layout and type
    bool relu = false;
};

// `convolve` packs the weights as the kernel takes them at every call; for weights that stay, `pack` does so once, into `packed_size` bytes.
void convolve(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const float *weights,
              const Epilogue &epilogue, void *target, bool training);
size_t packed_size(const Geometry &geometry, const Activation &x, int64_t block, const Epilogue &epilogue);
void pack(const Geometry &geometry, const Activation &x, int64_t block, const Epilogue &epilogue, const float *weights, void *packed);
void convolve_packed(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const void *packed,
                     const Epilogue &epilogue, void *target);

void gradient_of_input(const Geometry &geometry, const Activation &x, int64_t block, const void *gradient, const float *weights,
                       void *input_gradient);
void gradient_of_weights(const Geometry &geometry, const Activation &x, int64_t block, const void *source, const void *gradient,
                         float *weights_gradient, float *bias_gradient);

}  // namespace acnet
