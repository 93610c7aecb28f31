// Batch norm of the sum of several branches, with the addition of a shortcut and ReLU in the same pass:
// y = [relu](sum over branches of (x - mean) * gamma / sqrt(variance + eps) + beta [+ shortcut]).
#pragma once

#include "runtime.h"

namespace acnet {

constexpr int kMostBranches = 3;

struct Norm {
    int branches;
    bool relu;
    double eps, momentum;  // momentum weighs the old running statistics
    const float *gamma[kMostBranches], *beta[kMostBranches];
    const float *running_mean[kMostBranches], *running_variance[kMostBranches];
};

// `shape` is of each x, of y and the shortcut (null for none). `statistics` is (branches, 2, C): mean and 1 / sqrt(variance + eps).
// `running` gets the new running mean and variance of each branch.
void normalize(const Norm &norm, const Activation &shape, void *const *x, const void *shortcut, void *y, float *statistics,
               float *const *running);

// `dx` may be `x`. `y` is needed with ReLU and a shortcut only. Any of `shortcut_gradient` and `y` may be null. The gradients of all betas are one.
void normalize_backward(const Norm &norm, const Activation &shape, const void *dy, void *const *x, const void *y, const float *statistics,
                        void *const *dx, void *shortcut_gradient, float *const *dgamma, float *const *dbeta);

}  // namespace acnet
