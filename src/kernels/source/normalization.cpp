#include "normalization.h"

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace acnet {
namespace {

constexpr int kMostLanes = 16;

// One block of channels over all images; `count` is the vectors of one image's block.
template <class T> struct Block {
    Block(const Activation &shape, int64_t index)
        : images(shape.n), size(shape.pixels() * shape.block), stride(shape.c / shape.block * size), start(index * size), lanes(shape.block),
          channel(index * shape.block) {}
    template <class U> U *at(U *data, int64_t image) const { return data + image * stride + start; }
    int64_t images, size, stride, start, lanes, channel;
};

// Per-lane numbers of a block of 8 or 16 channels, a vector of 8 at a time.
template <int V> using Lanes = Floats[V];

template <int V> void spread(Lanes<V> &into, const float *from) {
    for (int v = 0; v < V; ++v) into[v] = load(from + v * kLanes);
}

// Mean and variance of each channel of a block: two passes over an image's part, which stays in the cache, then the parts together by
// Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979), in double.
template <class T, int V> void moments(const Block<T> &block, const T *x, double *mean, double *squares) {
    double count = 0, of_part = static_cast<double>(block.size / block.lanes);
    std::fill(mean, mean + block.lanes, 0.);
    std::fill(squares, squares + block.lanes, 0.);
    for (int64_t image = 0; image < block.images; ++image) {
        const T *part = block.at(x, image);
        Lanes<V> sum{}, centre, square{};
        for (int64_t i = 0; i < block.size; i += V * kLanes)
            for (int v = 0; v < V; ++v) sum[v] += load(part + i + v * kLanes);
        for (int v = 0; v < V; ++v) centre[v] = sum[v] / all(static_cast<float>(of_part));
        Lanes<V> rest{};
        for (int64_t i = 0; i < block.size; i += V * kLanes)
            for (int v = 0; v < V; ++v) {
                Floats distance = load(part + i + v * kLanes) - centre[v];
                rest[v] += distance;
                square[v] += distance * distance;
            }
        for (int lane = 0; lane < block.lanes; ++lane) {
            int v = lane / kLanes, l = lane % kLanes;
            double off = rest[v][l] / of_part, part_mean = centre[v][l] + off;
            double part_squares = square[v][l] - of_part * off * off, difference = part_mean - mean[lane], total = count + of_part;
            mean[lane] += difference * of_part / total;
            squares[lane] += part_squares + difference * difference * count * of_part / total;
        }
        count += of_part;
    }
}

template <class T, int V, int B> struct Pass {
    const Norm &norm;
    const Activation &shape;

    // y = sum of x * scale + offset.
    void scales(const Block<T> &block, const float *statistics, Lanes<V> (&scale)[B], Lanes<V> &offset) const {
        for (int v = 0; v < V; ++v) offset[v] = Floats{};
        for (int b = 0; b < B; ++b) {
            const float *mean = statistics + 2 * b * shape.c + block.channel, *inverse = mean + shape.c;
            for (int v = 0; v < V; ++v) {
                int64_t at = block.channel + v * kLanes;
                scale[b][v] = load(norm.gamma[b] + at) * load(inverse + v * kLanes);
                offset[v] += load(norm.beta[b] + at) - load(mean + v * kLanes) * scale[b][v];
            }
        }
    }

    static Floats sum(const T *const (&x)[B], int64_t i, int v, const Lanes<V> (&scale)[B], const Lanes<V> &offset) {
        Floats value = offset[v];
        for (int b = 0; b < B; ++b) value += load(x[b] + i) * scale[b][v];
        return value;
    }

    void forward(int64_t index, void *const *x, const void *shortcut, void *y, float *statistics, float *const *running) const {
        Block<T> block(shape, index);
        for (int b = 0; b < B; ++b) {
            double mean[kMostLanes], squares[kMostLanes], count = static_cast<double>(shape.n * shape.pixels());
            moments<T, V>(block, static_cast<const T *>(x[b]), mean, squares);
            float *to = statistics + 2 * b * shape.c + block.channel;
            for (int64_t lane = 0; lane < block.lanes; ++lane) {
                double variance = squares[lane] / count, unbiased = squares[lane] / std::max(count - 1, 1.);
                to[lane] = static_cast<float>(mean[lane]);
                to[shape.c + lane] = static_cast<float>(1 / std::sqrt(variance + norm.eps));
                int64_t at = block.channel + lane;
                running[2 * b][at] = static_cast<float>(norm.momentum * norm.running_mean[b][at] + (1 - norm.momentum) * mean[lane]);
                running[2 * b + 1][at] = static_cast<float>(norm.momentum * norm.running_variance[b][at] + (1 - norm.momentum) * unbiased);
            }
        }
        Lanes<V> scale[B], offset;
        scales(block, statistics, scale, offset);
        for (int64_t image = 0; image < block.images; ++image) {
            const T *from[B];
            for (int b = 0; b < B; ++b) from[b] = block.at(static_cast<const T *>(x[b]), image);
            const T *added = shortcut ? block.at(static_cast<const T *>(shortcut), image) : nullptr;
            T *to = block.at(static_cast<T *>(y), image);
            for (int64_t i = 0; i < block.size; i += V * kLanes)
                for (int v = 0; v < V; ++v) {
                    int64_t at = i + v * kLanes;
                    Floats value = sum(from, at, v, scale, offset);
                    if (added) value += load(added + at);
                    store(to + at, norm.relu ? positive(value) : value);
                }
        }
    }

    void backward(int64_t index, const void *dy, void *const *x, const void *y, const float *statistics, void *const *dx,
                  void *shortcut_gradient, float *const *dgamma, float *const *dbeta) const {
        Block<T> block(shape, index);
        Lanes<V> scale[B], offset, mean[B], inverse[B];
        scales(block, statistics, scale, offset);
        for (int b = 0; b < B; ++b) {
            spread<V>(mean[b], statistics + 2 * b * shape.c + block.channel);
            spread<V>(inverse[b], statistics + (2 * b + 1) * shape.c + block.channel);
        }
        // The gradient behind ReLU, which was open where y was positive.
        auto behind = [&](const T *gradient, const T *const (&from)[B], const T *of_y, int64_t at, int v) {
            Floats value = load(gradient + at);
            if (!norm.relu) return value;
            return where_positive(of_y ? load(of_y + at) : sum(from, at, v, scale, offset), value);
        };
        double sums[kMostLanes] = {}, products[B][kMostLanes] = {};
        for (int64_t image = 0; image < block.images; ++image) {
            const T *from[B], *gradient = block.at(static_cast<const T *>(dy), image), *of_y = y ? block.at(static_cast<const T *>(y), image) : nullptr;
            for (int b = 0; b < B; ++b) from[b] = block.at(static_cast<const T *>(x[b]), image);
            Lanes<V> of_image{}, with_x[B]{};
            for (int64_t i = 0; i < block.size; i += V * kLanes)
                for (int v = 0; v < V; ++v) {
                    int64_t at = i + v * kLanes;
                    Floats value = behind(gradient, from, of_y, at, v);
                    of_image[v] += value;
                    for (int b = 0; b < B; ++b) with_x[b][v] += value * (load(from[b] + at) - mean[b][v]);
                }
            for (int lane = 0; lane < block.lanes; ++lane) {
                int v = lane / kLanes, l = lane % kLanes;
                sums[lane] += of_image[v][l];
                for (int b = 0; b < B; ++b) products[b][lane] += static_cast<double>(with_x[b][v][l]) * inverse[b][v][l];
            }
        }
        // dx = scale * dy - slope * x + level, by the derivatives of Ioffe and Szegedy, arXiv:1502.03167, section 3.
        Lanes<V> slope[B], level[B];
        double count = static_cast<double>(shape.n * shape.pixels());
        for (int64_t lane = 0; lane < block.lanes; ++lane) {
            int v = lane / kLanes, l = lane % kLanes;
            for (int b = 0; b < B; ++b) {
                dgamma[b][block.channel + lane] = static_cast<float>(products[b][lane]);
                dbeta[b][block.channel + lane] = static_cast<float>(sums[lane]);
                double k = static_cast<double>(scale[b][v][l]) * inverse[b][v][l] * products[b][lane] / count;
                slope[b][v][l] = static_cast<float>(k);
                level[b][v][l] = static_cast<float>(-scale[b][v][l] * sums[lane] / count);
            }
        }
        for (int64_t image = 0; image < block.images; ++image) {
            const T *from[B], *gradient = block.at(static_cast<const T *>(dy), image), *of_y = y ? block.at(static_cast<const T *>(y), image) : nullptr;
            T *to[B], *aside = shortcut_gradient ? block.at(static_cast<T *>(shortcut_gradient), image) : nullptr;
            for (int b = 0; b < B; ++b) {
                from[b] = block.at(static_cast<const T *>(x[b]), image);
                to[b] = block.at(static_cast<T *>(dx[b]), image);
            }
            for (int64_t i = 0; i < block.size; i += V * kLanes)
                for (int v = 0; v < V; ++v) {
                    int64_t at = i + v * kLanes;
                    Floats value = behind(gradient, from, of_y, at, v);
                    if (aside) store(aside + at, value);
                    for (int b = 0; b < B; ++b)
                        store(to[b] + at, value * scale[b][v] + level[b][v] - (load(from[b] + at) - mean[b][v]) * slope[b][v]);
                }
        }
    }
};

// fn(Pass) with the types that fit.
template <class T, int V, class Fn> void with_branches(const Norm &norm, const Activation &shape, Fn fn) {
    switch (norm.branches) {
        case 1: return fn(Pass<T, V, 1>{norm, shape});
        case 2: return fn(Pass<T, V, 2>{norm, shape});
        case 3: return fn(Pass<T, V, 3>{norm, shape});
        default: throw std::runtime_error("batch norm of more than three branches");
    }
}

template <class Fn> void with_types(const Norm &norm, const Activation &shape, Fn fn) {
    if (shape.block != 8 && shape.block != 16) throw std::runtime_error("batch norm of channels that are not in blocks");
    if (shape.type == Type::f32) return shape.block == 16 ? with_branches<float, 2>(norm, shape, fn) : with_branches<float, 1>(norm, shape, fn);
    return shape.block == 16 ? with_branches<bfloat16, 2>(norm, shape, fn) : with_branches<bfloat16, 1>(norm, shape, fn);
}

}  // namespace

void normalize(const Norm &norm, const Activation &shape, void *const *x, const void *shortcut, void *y, float *statistics,
               float *const *running) {
    with_types(norm, shape, [&](const auto &pass) {
        parallel_for(shape.c / shape.block, [&](int64_t index) { pass.forward(index, x, shortcut, y, statistics, running); });
    });
}

void normalize_backward(const Norm &norm, const Activation &shape, const void *dy, void *const *x, const void *y, const float *statistics,
                        void *const *dx, void *shortcut_gradient, float *const *dgamma, float *const *dbeta) {
    with_types(norm, shape, [&](const auto &pass) {
        parallel_for(shape.c / shape.block, [&](int64_t index) {
            pass.backward(index, dy, x, y, statistics, dx, shortcut_gradient, dgamma, dbeta);
        });
    });
}

}  // namespace acnet
