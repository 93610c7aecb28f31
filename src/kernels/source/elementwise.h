// Element-wise operations on activations.
#pragma once

#include "arguments.h"

namespace acnet {

// to = lhs + rhs, `size` elements each.
void add(Type type, const void *lhs, const void *rhs, void *to, int64_t size);

// The gradient of a ReLU from its output. Blocked activations only: whole vectors of channels.
void relu_backward(const Activation &like, Relu kind, const void *output, const void *gradient,
                   void *to);

// y = [relu](x * scale + shift), with one scale and shift per channel. Blocked activations only.
void scale_and_shift(const Activation &like, const void *x, const float *scale, const float *shift,
                     Relu kind, void *y);

}  // namespace acnet
