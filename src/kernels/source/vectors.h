// Eight floats at a time, in vector extensions that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "arguments.h"

namespace acnet {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t UInts __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
constexpr int kLanes = 8;

struct bfloat16 {
    uint16_t bits;
};

inline Floats load(const float *from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float *to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline Floats load(const bfloat16 *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, UInts) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16 *to, Floats value) {
    UInts bits = (UInts)value;
    UInts rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    UInts is_nan = (UInts)(value != value);
    rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline Floats broadcast(float value) { return Floats{} + value; }

// The largest output of a ReLU.
inline Floats limit_of(Relu kind) {
    return broadcast(kind == Relu::Six ? 6.f : std::numeric_limits<float>::infinity());
}

inline Floats relu(Floats value, Floats limit) {
    Floats positive = (Floats)((Ints)value & (Ints)(value > 0));
    return positive < limit ? positive : limit;
}

// The gradient of `relu`: `gradient` where the output lies between 0 and `limit`, else 0.
inline Floats relu_mask(Floats output, Floats gradient, Floats limit) {
    return (Floats)((Ints)gradient & (Ints)(output > 0) & (Ints)(output < limit));
}

}  // namespace acnet
