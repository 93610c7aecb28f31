// Eight floats at a time, in vector extensions that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

namespace acnet {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
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
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
inline void store(bfloat16 *to, Floats value) {
    Words bits = (Words)value;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words is_nan = (Words)(value != value);
    rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    Halves halves = __builtin_convertvector(rounded, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

inline Floats all(float value) { return Floats{} + value; }

inline Floats positive(Floats value) { return (Floats)((Ints)value & (Ints)(value > 0)); }

inline Floats where_positive(Floats condition, Floats value) { return (Floats)((Ints)value & (Ints)(condition > 0)); }

}  // namespace acnet
