// What host and device compilers need to share one source: function qualifiers, half precision, exact arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define ASAG_HD __host__ __device__
#else
#define ASAG_HD
#endif

// Loops whose unrolling would only lengthen the code.
#if defined(__CUDA_ARCH__)
#define ASAG_KEEP_LOOP _Pragma("unroll 1")
#else
#define ASAG_KEEP_LOOP
#endif

namespace asag {

// Half precision as it lies in memory.  Arithmetic is always in float.
struct Half {
    uint16_t bits;
};

namespace detail {

inline float half_bits_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else if (mantissa == 0) {
        bits = sign;
    } else {  // subnormal: shift until the leading bit is the implicit one
        uint32_t shifted = 113;
        while ((mantissa & 0x400u) == 0) {
            mantissa <<= 1;
            --shifted;
        }
        bits = sign | (shifted << 23) | ((mantissa & 0x3ffu) << 13);
    }
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Rounds to nearest, ties to even, as the device does.
inline uint16_t float_to_half_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7fffu;  // NaN
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to more than 65504, or infinite
    if (magnitude < 0x33000001u) return sign;  // no more than half the smallest subnormal
    const uint32_t exponent = magnitude >> 23;
    uint32_t mantissa = magnitude & 0x7fffffu;
    uint32_t half, rest, tie;
    if (exponent < 113) {  // subnormal
        mantissa |= 0x800000u;
        const uint32_t shift = 126 - exponent;
        half = mantissa >> shift;
        rest = mantissa & ((1u << shift) - 1);
        tie = 1u << (shift - 1);
    } else {
        half = ((exponent - 112) << 10) | (mantissa >> 13);
        rest = mantissa & 0x1fffu;
        tie = 0x1000u;
    }
    if (rest > tie || (rest == tie && (half & 1u))) ++half;
    return static_cast<uint16_t>(sign | half);
}

}  // namespace detail

ASAG_HD inline float to_float(float value) { return value; }

ASAG_HD inline float to_float(Half value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    return detail::half_bits_to_float(value.bits);
#endif
}

template <class T>
ASAG_HD T from_float(float value);

template <>
ASAG_HD inline float from_float<float>(float value) {
    return value;
}

template <>
ASAG_HD inline Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
    return Half{__half_as_ushort(__float2half_rn(value))};
#else
    return Half{detail::float_to_half_bits(value)};
#endif
}

// A tensor whose element type is known at run time only; for the kernels whose time does not depend on reading it.
struct AnyFloats {
    const void* data;
    bool is_half;

    ASAG_HD float operator[](int64_t index) const {
        return is_half ? to_float(static_cast<const Half*>(data)[index]) : static_cast<const float*>(data)[index];
    }
};

ASAG_HD inline void store(void* data, bool is_half, int64_t index, float value) {
    if (is_half) {
        static_cast<Half*>(data)[index] = from_float<Half>(value);
    } else {
        static_cast<float*>(data)[index] = value;
    }
}

// A compiler may fuse a * b + c, which rounds once instead of twice.  Where the result decides something, a level
// or a suppression, it must be that of the reference to the last bit: these are never fused.  (Host compilers are
// told -ffp-contract=off.)
ASAG_HD inline float mul(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

ASAG_HD inline float add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

ASAG_HD inline float sub(float a, float b) { return add(a, -b); }

ASAG_HD inline float divide(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

ASAG_HD inline float square_root(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

// Of a NaN and a number, the number: what follows is then safe to use as an index.
// (On a CPU fminf would be called, each time.)
ASAG_HD inline float smaller(float a, float b) {
#ifdef __CUDA_ARCH__
    return fminf(a, b);
#else
    return a < b || b != b ? a : b;
#endif
}

ASAG_HD inline float larger(float a, float b) {
#ifdef __CUDA_ARCH__
    return fmaxf(a, b);
#else
    return a > b || b != b ? a : b;
#endif
}

ASAG_HD inline int smaller(int a, int b) { return b < a ? b : a; }
ASAG_HD inline int larger(int a, int b) { return a < b ? b : a; }

ASAG_HD inline int popcount(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __popc(bits);
#else
    int count = 0;
    for (; bits != 0; bits &= bits - 1) ++count;
    return count;
#endif
}

// Several neighbouring channels, read and written at once.
template <class T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
    T values[WIDTH];
};

// Channels that fit into 16 bytes, the widest access there is.
template <class T>
constexpr int widest() {
    return 16 / static_cast<int>(sizeof(T));
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace asag
