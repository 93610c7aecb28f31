// The arguments that the kernels of conv_norm.cpp and inference.cpp share.
#pragma once

#include "batch_norm.h"
#include "convolution.h"

namespace acnet {

// The attributes of a convolution or batch norm, in the order of src/kernels/attributes.py; 4 for
// the padding of each branch follow.
enum Attribute {
    kBranches,
    kGroups,
    kStrideH,
    kStrideW,
    kDilationH,
    kDilationW,
    kRelu,
    kShortcut,
    kInputGradient,
    kBlock,
    kEps,
    kDecay,
    kPadding
};

// Number of branches of convolutions, 0 for a batch norm alone. Throws if there are too many.
int branches_of(const Arguments &a);
// How many attributes the table of that many branches holds.
int attributes_of(int branches);

// Throws for a number that is none of Relu's.

// The convolution of branch `branch`, whose weights are tensor `weight`. Throws if they do not fit.
Convolution convolution_of(const Arguments &a, const Activation &x, int weight, int branch);
const float *weights_of(const Arguments &a, const Convolution &conv, int weight);
// The bias, or null: a tensor of one element stands for no bias.
const float *bias_of(const Arguments &a, const Convolution &conv, int bias);

// Indices of the parameters of branch `index`; `first` is the index of the first branch's weights.
struct Branch {
    Branch(int first, int index)
        : weight(first + 5 * index),
          gamma(weight + 1),
          beta(weight + 2),
          mean(weight + 3),
          variance(weight + 4) {}
    int weight, gamma, beta, mean, variance;
};

// The batch norms of all branches, of `channels` channels each. For a batch norm alone `first` is
// one less than the index of gamma, as if weights stood there.
BatchNorm batch_norm_of(const Arguments &a, int first, int64_t channels);

}  // namespace acnet
