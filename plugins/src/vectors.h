// Vectors of numbers of any length, and how numbers of each type are read into them and written.
#pragma once

#include "cpu.h"

// The processor that a file compiles all of this for: none where it is inlined into functions for several.
#ifndef ASAG_VECTOR_TARGET
#define ASAG_VECTOR_TARGET
#endif
#define ASAG_VECTOR ASAG_INLINE ASAG_VECTOR_TARGET

// What functions for two generations of x86 are compiled for.
#define ASAG_AVX2 __attribute__((target("avx2,fma")))
#define ASAG_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define ASAG_SHUFFLES 1
#endif
#endif

namespace asag {
namespace {  // since each file has its own

constexpr int MOST_LANES = 16;

// LANES numbers that one instruction works on.
template <int LANES>
struct Lanes {
    typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
    typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
    typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef int16_t Shorts __attribute__((vector_size(LANES * sizeof(int16_t))));
    typedef int8_t Bytes __attribute__((vector_size(LANES * sizeof(int8_t))));
    static constexpr int WIDTH = LANES == MOST_LANES ? 4 : 2;  // vectors of a product's row that are summed up at a time
};

template <int LANES>
using Floats = typename Lanes<LANES>::Floats;
template <int LANES>
using Ints = typename Lanes<LANES>::Ints;

template <int LANES>
ASAG_VECTOR void load(Floats<LANES>& into, const float* from) {
    std::memcpy(&into, from, sizeof into);
}

// GCC takes the vectors of these two apart, though the longer ones are one instruction each.
template <int LANES>
ASAG_VECTOR void widen(Ints<LANES>& into, const int8_t* from) {
#ifdef ASAG_X86
    if constexpr (LANES > 4) {
        asm("vpmovsxbd %1, %0" : "=v"(into) : "m"(*reinterpret_cast<const int8_t(*)[LANES]>(from)));
        return;
    }
#endif
#ifdef ASAG_SHUFFLES
    if constexpr (LANES == 4) {  // each byte becomes the highest of a number
        typedef int8_t Bytes __attribute__((vector_size(16)));
        typedef int16_t Shorts __attribute__((vector_size(16)));
        Bytes bytes = {};
        std::memcpy(&bytes, from, LANES);
        const auto high = Shorts(
            __builtin_shufflevector(Bytes{}, bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        into = Ints<LANES>(__builtin_shufflevector(Shorts{}, high, 0, 8, 1, 9, 2, 10, 3, 11)) >> 24;
        return;
    }
#endif
    typename Lanes<LANES>::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    into = __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<LANES>::Shorts), Ints<LANES>);
}

template <int LANES>
ASAG_VECTOR void widen(typename Lanes<LANES>::Bits& into, const uint16_t* from) {
#ifdef ASAG_X86
    if constexpr (LANES > 4) {
        asm("vpmovzxwd %1, %0" : "=v"(into) : "m"(*reinterpret_cast<const uint16_t(*)[LANES]>(from)));
        return;
    }
#endif
    typename Lanes<LANES>::Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    into = __builtin_convertvector(halves, typename Lanes<LANES>::Bits);
}

template <int LANES>
ASAG_VECTOR void load(Floats<LANES>& into, const BFloat16* from) {
    typename Lanes<LANES>::Bits bits;
    widen<LANES>(bits, &from->bits);
    bits <<= 16;
    std::memcpy(&into, &bits, sizeof into);
}

template <int LANES>
ASAG_VECTOR void load(Floats<LANES>& into, const Half* from) {
    using Bits = typename Lanes<LANES>::Bits;
    constexpr uint32_t SMALLEST = 113u << 23;  // of the normal ones, as a float32
    Bits half;
    widen<LANES>(half, &from->bits);
    const Bits magnitude = (half & 0x7fffu) << 13;
    // A subnormal half is as far from 0 as this is from the smallest normal one.
    Bits bits = magnitude + SMALLEST;
    Floats<LANES> subnormal;
    std::memcpy(&subnormal, &bits, sizeof bits);
    subnormal -= 0x1p-14f;
    Bits small;
    std::memcpy(&small, &subnormal, sizeof small);
    bits = magnitude + (112u << 23);
    bits = magnitude >= 0x1fu << 23 ? magnitude | 0x7f800000u : bits;  // infinite or no number
    bits = magnitude < 1u << 23 ? small : bits;
    bits |= (half & 0x8000u) << 16;
    std::memcpy(&into, &bits, sizeof into);
}

template <int LANES>
ASAG_VECTOR void load(Floats<LANES>& into, const int8_t* from) {
    Ints<LANES> values;
    widen<LANES>(values, from);
    into = __builtin_convertvector(values, Floats<LANES>);
}

template <int LANES>
ASAG_VECTOR void store(float* into, const Floats<LANES>& from) {
    std::memcpy(into, &from, sizeof from);
}

// As `narrow` does one by one.
template <int LANES>
ASAG_VECTOR void store(BFloat16* into, const Floats<LANES>& from) {
    typename Lanes<LANES>::Bits bits;
    std::memcpy(&bits, &from, sizeof bits);
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto quiet = (bits >> 16) | 0x40u;
    const auto chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    const auto halves = __builtin_convertvector(chosen, typename Lanes<LANES>::Halves);
    std::memcpy(into, &halves, sizeof halves);
}

template <int LANES>
ASAG_VECTOR void store(Half* into, const Floats<LANES>& from) {
    float values[LANES];
    std::memcpy(values, &from, sizeof from);
    for (int i = 0; i < LANES; ++i) narrow(values[i], into[i]);
}

}  // namespace

// How many float32 a vector of the processor holds that functions here are compiled for.
inline int most_lanes() {
#ifdef ASAG_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return 16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

}  // namespace asag
