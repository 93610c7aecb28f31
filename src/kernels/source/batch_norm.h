// Batch norm of the sum of several branches, with a shortcut and ReLU in the same pass:
// y = [relu](sum over branches of (x - mean) * gamma / sqrt(variance + eps) + beta [+ shortcut]).
#pragma once

#include "arguments.h"

namespace acnet {

constexpr int kMaxBranches = 3;

struct BatchNorm {
    int branches;
    Relu relu;
    double eps, decay;  // `decay` is the weight of the old running statistics
    const float *gamma[kMaxBranches], *beta[kMaxBranches];
    const float *running_mean[kMaxBranches], *running_variance[kMaxBranches];
};

// `like` describes each x, y and the shortcut (null for none). `statistics` is (branches, 2, C):
// mean and 1 / sqrt(variance + eps). `running` receives the new running mean and variance of each
// branch.
void batch_norm_forward(const BatchNorm &norm, const Activation &like, const void *const *x,
                        const void *shortcut, void *y, float *statistics, float *const *running);

// `dx` may be `x`. `y` is needed only with both ReLU and a shortcut; it and `shortcut_gradient` may
// be null. All betas have the same gradient.
void batch_norm_backward(const BatchNorm &norm, const Activation &like, const void *dy,
                         const void *const *x, const void *y, const float *statistics,
                         void *const *dx, void *shortcut_gradient, float *const *dgamma,
                         float *const *dbeta);

}  // namespace acnet
