// Into blocks of channels and out of them, and images into the first convolution's layout.
#include <cmath>

#include "runtime.h"
#include "vectors.h"

namespace {

using namespace acnet;

dnnl::memory::desc desc_of(const Activation &x) { return blocked(x.n, x.c, x.h, x.w, x.block, x.type); }

void write(float *to, float value) { *to = value; }

void write(bfloat16 *to, float value) {
    bfloat16 eight[kLanes];
    store(eight, all(value));
    *to = eight[0];
}

template <class T> void normalize(const Arguments &a, T *to) {
    int64_t images = a.dim(1, 0), pixels = a.dim(1, 1) * a.dim(1, 2);
    const uint8_t *from = a.data<uint8_t>(1);
    // Each of 256 values once for each channel: x * scale + offset.
    std::vector<T> table(3 * 256);
    for (int64_t i = 0; i < 3 * 256; ++i) write(&table[i], std::fma(static_cast<float>(i % 256), a.data(2)[i / 256], a.data(3)[i / 256]));
    parallel_for(images, [&](int64_t image) {
        const uint8_t *rgb = from + image * pixels * 3;
        for (int64_t c = 0; c < 3; ++c) {
            T *plane = to + (image * 3 + c) * pixels;
            const T *values = table.data() + c * 256;
            for (int64_t i = 0; i < pixels; ++i) plane[i] = values[rgb[3 * i + c]];
        }
    });
}

}  // namespace

// (settings, activation) -> the same in another layout or type
ACNET_KERNEL(change_layout) { reorder(desc_of(Activation(a, 1)), a.data<void>(1), desc_of(Activation(a, 2)), a.data<void>(2)); }

// (settings, images (N, H, W, 3) uint8, scale (3,), offset (3,)) -> (N, 3, H, W)
ACNET_KERNEL(normalize_images) {
    if (a.type(4) == Type::f32) normalize(a, a.data(4));
    else normalize(a, a.data<bfloat16>(4));
}

// (settings, gradient, activation for its layout and type) -> the gradient in them
ACNET_KERNEL(change_layout_back) { reorder(desc_of(Activation(a, 1)), a.data<void>(1), desc_of(Activation(a, 3)), a.data<void>(3)); }
