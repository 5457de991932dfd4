// What the operators made for speed on a CPU share: the types of numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "asag/platform.h"

// Where versions of a function for several generations of x86 can be compiled; sanitizers know the plain one alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define ASAG_X86 1
#endif
#define ASAG_INLINE inline __attribute__((always_inline))

namespace asag {

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

ASAG_INLINE float widened(float value) { return value; }
ASAG_INLINE float widened(int8_t value) { return value; }
ASAG_INLINE float widened(Half value) { return to_float(value); }
ASAG_INLINE float widened(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

ASAG_INLINE void narrow(float value, float& out) { out = value; }
ASAG_INLINE void narrow(float value, Half& out) { out = from_float<Half>(value); }
// To nearest, ties to even; a NaN stays one.
ASAG_INLINE void narrow(float value, BFloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

}  // namespace asag
