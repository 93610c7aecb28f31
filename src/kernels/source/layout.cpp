// Converts activations to and from blocks of channels, and images to the first convolution's
// layout.
#include <cmath>
#include <vector>

#include "onednn.h"
#include "thread_pool.h"
#include "vectors.h"

namespace {

using namespace acnet;

void write(float *to, float value) { *to = value; }

void write(bfloat16 *to, float value) {
    bfloat16 lanes[kLanes];
    store(lanes, broadcast(value));
    *to = lanes[0];
}

// (N, H, W, 3) -> (N, 3, H, W), value * scale + offset. Only 256 values occur, so look them up.
template <class T>
void normalize_images(const Activation &y, const uint8_t *images, const float *scale,
                      const float *offset, T *to) {
    std::vector<T> table(3 * 256);
    for (int64_t i = 0; i < 3 * 256; ++i) {
        write(&table[i], std::fma(static_cast<float>(i % 256), scale[i / 256], offset[i / 256]));
    }
    int64_t pixels = y.pixels();
    parallel_for(y.n, [&](int64_t image) {
        const uint8_t *rgb = images + image * pixels * 3;
        for (int64_t c = 0; c < 3; ++c) {
            T *plane = to + (image * 3 + c) * pixels;
            const T *values = table.data() + c * 256;
            for (int64_t i = 0; i < pixels; ++i) plane[i] = values[rgb[3 * i + c]];
        }
    });
}

void change_layout(Arguments &a, int input, int output) {
    Activation from = a.activation(input), to = a.activation(output);
    if (from.n != to.n || from.c != to.c || from.h != to.h || from.w != to.w) {
        throw std::invalid_argument("the two layouts are of different activations");
    }
    reorder(activation_md(from), a.activation_data(input, from), activation_md(to),
            a.output_activation(output, to));
}

}  // namespace

// (attributes, activation) -> the activation in another layout or type
ACNET_KERNEL(change_layout) {
    a.expect(0, 2, 1);
    change_layout(a, 1, 2);
}

// (attributes, gradient, activation) -> the gradient in the activation's layout and type
ACNET_KERNEL(change_layout_back) {
    a.expect(0, 3, 1);
    a.activation_data(2, a.activation(3));
    change_layout(a, 1, 3);
}

// (attributes, images (N, H, W, 3) uint8, scale (3,), offset (3,)) -> (N, 3, H, W)
ACNET_KERNEL(normalize_images) {
    a.expect(0, 4, 1);
    Activation y = a.activation(4);
    const uint8_t *images = a.bytes(1, {y.n, y.h, y.w, 3});
    const float *scale = a.floats(2, {3}), *offset = a.floats(3, {3});
    void *to = a.output_activation(4, {y.n, 3, y.h, y.w, 1, y.type});
    if (y.type == Type::f32) {
        normalize_images(y, images, scale, offset, static_cast<float *>(to));
    } else {
        normalize_images(y, images, scale, offset, static_cast<bfloat16 *>(to));
    }
}
