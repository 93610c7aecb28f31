#include "batch_norm.h"

#include <algorithm>
#include <cmath>

#include "thread_pool.h"
#include "vectors.h"

namespace acnet {
namespace {

constexpr int kMaxLanes = 16;

// One block of channels over all images.
template <class T>
struct Block {
    Block(const Activation &like, int64_t index)
        : images(like.n),
          size(like.pixels() * like.block),
          stride(like.c / like.block * size),
          start(index * size),
          lanes(like.block),
          channel(index * like.block) {}
    template <class U>
    U *at(U *data, int64_t image) const {
        return data + image * stride + start;
    }
    int64_t images, size, stride, start, lanes, channel;
};

// One number per channel of a block of 8 or 16, in vectors of 8.
template <int V>
using Lanes = Floats[V];

template <int V>
void load_lanes(Lanes<V> &into, const float *from) {
    for (int v = 0; v < V; ++v) into[v] = load(from + v * kLanes);
}

// Mean and sum of squared deviations of each channel of a block. Each image's part is read twice,
// while it is in the cache; the parts are then combined in double precision by the formula of Chan,
// Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
// (1979).
template <class T, int V>
void moments(const Block<T> &block, const T *x, double *mean, double *squares) {
    double count = 0, part_count = static_cast<double>(block.size / block.lanes);
    std::fill(mean, mean + block.lanes, 0.);
    std::fill(squares, squares + block.lanes, 0.);
    for (int64_t image = 0; image < block.images; ++image) {
        const T *part = block.at(x, image);
        Lanes<V> sum{}, centre, square{};
        for (int64_t i = 0; i < block.size; i += V * kLanes)
            for (int v = 0; v < V; ++v) sum[v] += load(part + i + v * kLanes);
        for (int v = 0; v < V; ++v) centre[v] = sum[v] / broadcast(static_cast<float>(part_count));
        Lanes<V> rest{};
        for (int64_t i = 0; i < block.size; i += V * kLanes)
            for (int v = 0; v < V; ++v) {
                Floats distance = load(part + i + v * kLanes) - centre[v];
                rest[v] += distance;
                square[v] += distance * distance;
            }
        for (int lane = 0; lane < block.lanes; ++lane) {
            int v = lane / kLanes, l = lane % kLanes;
            double off = rest[v][l] / part_count, part_mean = centre[v][l] + off;
            double part_squares = square[v][l] - part_count * off * off,
                   difference = part_mean - mean[lane], total = count + part_count;
            mean[lane] += difference * part_count / total;
            squares[lane] += part_squares + difference * difference * count * part_count / total;
        }
        count += part_count;
    }
}

template <class T, int V, int B>
struct Pass {
    const BatchNorm &norm;
    const Activation &like;

    // y = sum over branches of x * scale, + offset.
    void scales(const Block<T> &block, const float *statistics, Lanes<V> (&scale)[B],
                Lanes<V> &offset) const {
        for (int v = 0; v < V; ++v) offset[v] = Floats{};
        for (int b = 0; b < B; ++b) {
            const float *mean = statistics + 2 * b * like.c + block.channel,
                        *inverse = mean + like.c;
            for (int v = 0; v < V; ++v) {
                int64_t at = block.channel + v * kLanes;
                scale[b][v] = load(norm.gamma[b] + at) * load(inverse + v * kLanes);
                offset[v] += load(norm.beta[b] + at) - load(mean + v * kLanes) * scale[b][v];
            }
        }
    }

    static Floats sum(const T *const (&x)[B], int64_t i, int v, const Lanes<V> (&scale)[B],
                      const Lanes<V> &offset) {
        Floats value = offset[v];
        for (int b = 0; b < B; ++b) value += load(x[b] + i) * scale[b][v];
        return value;
    }

    void forward(int64_t index, const void *const *x, const void *shortcut, void *y,
                 float *statistics, float *const *running) const {
        Block<T> block(like, index);
        for (int b = 0; b < B; ++b) {
            double mean[kMaxLanes], squares[kMaxLanes],
                count = static_cast<double>(like.n * like.pixels());
            moments<T, V>(block, static_cast<const T *>(x[b]), mean, squares);
            float *to = statistics + 2 * b * like.c + block.channel;
            for (int64_t lane = 0; lane < block.lanes; ++lane) {
                double variance = squares[lane] / count,
                       unbiased = squares[lane] / std::max(count - 1, 1.);
                to[lane] = static_cast<float>(mean[lane]);
                to[like.c + lane] = static_cast<float>(1 / std::sqrt(variance + norm.eps));
                int64_t at = block.channel + lane;
                running[2 * b][at] = static_cast<float>(norm.decay * norm.running_mean[b][at] +
                                                        (1 - norm.decay) * mean[lane]);
                running[2 * b + 1][at] = static_cast<float>(
                    norm.decay * norm.running_variance[b][at] + (1 - norm.decay) * unbiased);
            }
        }
        Lanes<V> scale[B], offset;
        scales(block, statistics, scale, offset);
        Floats limit = limit_of(norm.relu);
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
                    store(to + at, norm.relu == Relu::None ? value : relu(value, limit));
                }
        }
    }

    void backward(int64_t index, const void *dy, const void *const *x, const void *y,
                  const float *statistics, void *const *dx, void *shortcut_gradient,
                  float *const *dgamma, float *const *dbeta) const {
        Block<T> block(like, index);
        Lanes<V> scale[B], offset, mean[B], inverse[B];
        scales(block, statistics, scale, offset);
        for (int b = 0; b < B; ++b) {
            load_lanes<V>(mean[b], statistics + 2 * b * like.c + block.channel);
            load_lanes<V>(inverse[b], statistics + (2 * b + 1) * like.c + block.channel);
        }
        Floats limit = limit_of(norm.relu);
        // The gradient of what ReLU received.
        auto relu_gradient = [&](const T *gradient, const T *const(&from)[B], const T *y_part,
                                 int64_t at, int v) {
            Floats value = load(gradient + at);
            if (norm.relu == Relu::None) return value;
            Floats output = y_part ? load(y_part + at) : sum(from, at, v, scale, offset);
            return relu_mask(output, value, limit);
        };
        double sums[kMaxLanes] = {}, products[B][kMaxLanes] = {};
        for (int64_t image = 0; image < block.images; ++image) {
            const T *from[B], *gradient = block.at(static_cast<const T *>(dy), image),
                              *y_part = y ? block.at(static_cast<const T *>(y), image) : nullptr;
            for (int b = 0; b < B; ++b) from[b] = block.at(static_cast<const T *>(x[b]), image);
            Lanes<V> image_sum{}, with_x[B]{};
            for (int64_t i = 0; i < block.size; i += V * kLanes)
                for (int v = 0; v < V; ++v) {
                    int64_t at = i + v * kLanes;
                    Floats value = relu_gradient(gradient, from, y_part, at, v);
                    image_sum[v] += value;
                    for (int b = 0; b < B; ++b)
                        with_x[b][v] += value * (load(from[b] + at) - mean[b][v]);
                }
            for (int lane = 0; lane < block.lanes; ++lane) {
                int v = lane / kLanes, l = lane % kLanes;
                sums[lane] += image_sum[v][l];
                for (int b = 0; b < B; ++b)
                    products[b][lane] += static_cast<double>(with_x[b][v][l]) * inverse[b][v][l];
            }
        }
        // dx = scale * dy - slope * (x - mean) + level: the derivatives of Ioffe and Szegedy,
        // arXiv:1502.03167, section 3.
        Lanes<V> slope[B], level[B];
        double count = static_cast<double>(like.n * like.pixels());
        for (int64_t lane = 0; lane < block.lanes; ++lane) {
            int v = lane / kLanes, l = lane % kLanes;
            for (int b = 0; b < B; ++b) {
                dgamma[b][block.channel + lane] = static_cast<float>(products[b][lane]);
                dbeta[b][block.channel + lane] = static_cast<float>(sums[lane]);
                double k = static_cast<double>(scale[b][v][l]) * inverse[b][v][l] *
                           products[b][lane] / count;
                slope[b][v][l] = static_cast<float>(k);
                level[b][v][l] = static_cast<float>(-scale[b][v][l] * sums[lane] / count);
            }
        }
        for (int64_t image = 0; image < block.images; ++image) {
            const T *from[B], *gradient = block.at(static_cast<const T *>(dy), image),
                              *y_part = y ? block.at(static_cast<const T *>(y), image) : nullptr;
            T *to[B], *shortcut_part = shortcut_gradient
                                           ? block.at(static_cast<T *>(shortcut_gradient), image)
                                           : nullptr;
            for (int b = 0; b < B; ++b) {
                from[b] = block.at(static_cast<const T *>(x[b]), image);
                to[b] = block.at(static_cast<T *>(dx[b]), image);
            }
            for (int64_t i = 0; i < block.size; i += V * kLanes)
                for (int v = 0; v < V; ++v) {
                    int64_t at = i + v * kLanes;
                    Floats value = relu_gradient(gradient, from, y_part, at, v);
                    if (shortcut_part) store(shortcut_part + at, value);
                    for (int b = 0; b < B; ++b)
                        store(to[b] + at, value * scale[b][v] + level[b][v] -
                                              (load(from[b] + at) - mean[b][v]) * slope[b][v]);
                }
        }
    }
};

// Calls fn(Pass) with the types that fit.
template <class T, int V, class Fn>
void with_branches(const BatchNorm &norm, const Activation &like, Fn fn) {
    switch (norm.branches) {
        case 1:
            return fn(Pass<T, V, 1>{norm, like});
        case 2:
            return fn(Pass<T, V, 2>{norm, like});
        case 3:
            return fn(Pass<T, V, 3>{norm, like});
        default:
            throw std::invalid_argument("batch norm takes 1 to 3 branches");
    }
}

template <class Fn>
void with_types(const BatchNorm &norm, const Activation &like, Fn fn) {
    if (like.block != 8 && like.block != 16)
        throw std::invalid_argument("batch norm needs blocks of channels");
    if (like.type == Type::f32)
        return like.block == 16 ? with_branches<float, 2>(norm, like, fn)
                                : with_branches<float, 1>(norm, like, fn);
    return like.block == 16 ? with_branches<bfloat16, 2>(norm, like, fn)
                            : with_branches<bfloat16, 1>(norm, like, fn);
}

}  // namespace

void batch_norm_forward(const BatchNorm &norm, const Activation &like, const void *const *x,
                        const void *shortcut, void *y, float *statistics, float *const *running) {
    with_types(norm, like, [&](const auto &pass) {
        parallel_for(like.c / like.block, [&](int64_t index) {
            pass.forward(index, x, shortcut, y, statistics, running);
        });
    });
}

void batch_norm_backward(const BatchNorm &norm, const Activation &like, const void *dy,
                         const void *const *x, const void *y, const float *statistics,
                         void *const *dx, void *shortcut_gradient, float *const *dgamma,
                         float *const *dbeta) {
    with_types(norm, like, [&](const auto &pass) {
        parallel_for(like.c / like.block, [&](int64_t index) {
            pass.backward(index, dy, x, y, statistics, dx, shortcut_gradient, dgamma, dbeta);
        });
    });
}

}  // namespace acnet
