#include "elementwise.h"

#include <algorithm>

#include "thread_pool.h"
#include "vectors.h"

namespace acnet {
namespace {

// fn(first, last) on parts of `size` elements; all but the last part are multiples of kLanes.
template <class Fn>
void in_parts(int64_t size, Fn fn) {
    constexpr int64_t kPart = 1 << 15;
    parallel_for((size + kPart - 1) / kPart,
                 [&](int64_t part) { fn(part * kPart, std::min(size, (part + 1) * kPart)); });
}

template <class T>
T add_one(T lhs, T rhs) {
    T lhs_lanes[kLanes] = {lhs}, rhs_lanes[kLanes] = {rhs};
    store(lhs_lanes, load(lhs_lanes) + load(rhs_lanes));
    return lhs_lanes[0];
}

template <class T>
void add(const T *lhs, const T *rhs, T *to, int64_t size) {
    in_parts(size, [&](int64_t i, int64_t last) {
        for (; i + kLanes <= last; i += kLanes) store(to + i, load(lhs + i) + load(rhs + i));
        for (; i < last; ++i) to[i] = add_one(lhs[i], rhs[i]);
    });
}

template <class T>
void relu_backward(Relu kind, const T *output, const T *gradient, T *to, int64_t size) {
    Floats limit = limit_of(kind);
    in_parts(size, [&](int64_t i, int64_t last) {
        for (; i < last; i += kLanes) {
            store(to + i, relu_mask(load(output + i), load(gradient + i), limit));
        }
    });
}

template <class T>
void scale_and_shift(const Activation &like, const T *x, const float *scale, const float *shift,
                     Relu kind, T *y) {
    int64_t blocks = like.c / like.block, size = like.pixels() * like.block;
    Floats limit = limit_of(kind);
    parallel_for(like.n * blocks, [&](int64_t index) {
        const float *block_scale = scale + index % blocks * like.block;
        const float *block_shift = shift + index % blocks * like.block;
        for (int64_t i = index * size, end = i + size; i < end; i += like.block) {
            for (int64_t v = 0; v < like.block; v += kLanes) {
                Floats value = load(x + i + v) * load(block_scale + v) + load(block_shift + v);
                store(y + i + v, kind == Relu::None ? value : relu(value, limit));
            }
        }
    });
}

template <class T>
void add_scaled(const Activation &like, const T *branch, const T *shortcut, const float *factors,
                Relu kind, T *to) {
    int64_t blocks = like.c / like.block, size = like.pixels() * like.block;
    Floats limit = limit_of(kind);
    parallel_for(like.n * blocks, [&](int64_t index) {
        Floats factor = broadcast(factors[index / blocks]);
        for (int64_t i = index * size, end = i + size; i < end; i += kLanes) {
            Floats value = load(branch + i) * factor + load(shortcut + i);
            store(to + i, kind == Relu::None ? value : relu(value, limit));
        }
    });
}

template <class T>
void add_scaled_backward(const Activation &like, const T *output, const T *gradient,
                         const float *factors, Relu kind, T *to_branch, T *to_shortcut) {
    int64_t blocks = like.c / like.block, size = like.pixels() * like.block;
    Floats limit = limit_of(kind);
    parallel_for(like.n * blocks, [&](int64_t index) {
        Floats factor = broadcast(factors[index / blocks]);
        for (int64_t i = index * size, end = i + size; i < end; i += kLanes) {
            Floats value = load(gradient + i);
            if (kind != Relu::None) value = relu_mask(load(output + i), value, limit);
            store(to_branch + i, value * factor);
            store(to_shortcut + i, value);
        }
    });
}

// fn(float{}) or fn(bfloat16{}), to choose a template.
template <class Fn>
void with_type(Type type, Fn fn) {
    if (type == Type::f32) fn(float{});
    else fn(bfloat16{});
}

}  // namespace

void add(Type type, const void *lhs, const void *rhs, void *to, int64_t size) {
    with_type(type, [&](auto example) {
        using T = decltype(example);
        add(static_cast<const T *>(lhs), static_cast<const T *>(rhs), static_cast<T *>(to), size);
    });
}

void relu_backward(const Activation &like, Relu kind, const void *output, const void *gradient,
                   void *to) {
    if (like.block == 1) throw std::invalid_argument("ReLU's gradient needs blocks of channels");
    with_type(like.type, [&](auto example) {
        using T = decltype(example);
        relu_backward(kind, static_cast<const T *>(output), static_cast<const T *>(gradient),
                      static_cast<T *>(to), like.size());
    });
}

void scale_and_shift(const Activation &like, const void *x, const float *scale, const float *shift,
                     Relu kind, void *y) {
    if (like.block == 1) throw std::invalid_argument("batch norm needs blocks of channels");
    with_type(like.type, [&](auto example) {
        using T = decltype(example);
        scale_and_shift(like, static_cast<const T *>(x), scale, shift, kind, static_cast<T *>(y));
    });
}

}  // namespace acnet

namespace {

acnet::Activation blocked(const acnet::Arguments &a, int index) {
    acnet::Activation like = a.activation(index);
    if (like.block == 1) throw std::invalid_argument("needs blocks of channels");
    return like;
}

}  // namespace

// (attributes: kind of ReLU; branch, shortcut, factors (N,)) -> [relu](branch * factor + shortcut)
ACNET_KERNEL(add_scaled) {
    a.expect(1, 4, 1);
    acnet::Activation like = blocked(a, 1);
    const void *branch = a.activation_data(1, like), *shortcut = a.activation_data(2, like);
    const float *factors = a.floats(3, {like.n});
    void *to = a.output_activation(4, like);
    acnet::Relu kind = a.relu(0);
    acnet::with_type(like.type, [&](auto example) {
        using T = decltype(example);
        acnet::add_scaled(like, static_cast<const T *>(branch), static_cast<const T *>(shortcut),
                          factors, kind, static_cast<T *>(to));
    });
}

// (attributes, output, its gradient, factors (N,)) -> gradients of (branch, shortcut)
ACNET_KERNEL(add_scaled_backward) {
    a.expect(1, 4, 2);
    acnet::Activation like = blocked(a, 1);
    const void *output = a.activation_data(1, like), *gradient = a.activation_data(2, like);
    const float *factors = a.floats(3, {like.n});
    void *to_branch = a.output_activation(4, like), *to_shortcut = a.output_activation(5, like);
    acnet::Relu kind = a.relu(0);
    acnet::with_type(like.type, [&](auto example) {
        using T = decltype(example);
        acnet::add_scaled_backward(like, static_cast<const T *>(output),
                                   static_cast<const T *>(gradient), factors, kind,
                                   static_cast<T *>(to_branch), static_cast<T *>(to_shortcut));
    });
}

// (a, b) -> a + b, all of one shape and type
ACNET_KERNEL(add) {
    a.expect(2, 1);
    acnet::Activation like = a.activation(0);
    acnet::add(like.type, a.activation_data(0, like), a.activation_data(1, like),
               a.output_activation(2, like), like.size());
}
