// From the arguments of a call to the kernel instance that serves it: element type, and channels accessed at once.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/platform.h"

namespace asag {

template <class T, int CHANNELS>
struct Access {
    using Type = T;
    static constexpr int WIDTH = CHANNELS;
};

// Calls visit(Access<T, WIDTH>{}), with 16 bytes at once where `channels` neighbours and all pointers allow it.
template <class Visit>
auto by_access(const AsagPyramid& features, int32_t channels, const void* out, const Visit& visit) {
    bool aligned = is_aligned(out);
    for (int i = 0; i < features.levels; ++i) aligned = aligned && is_aligned(features.maps[i]);
    if (features.type == ASAG_FLOAT16) {
        constexpr int WIDEST = widest<Half>();
        return aligned && channels % WIDEST == 0 ? visit(Access<Half, WIDEST>{}) : visit(Access<Half, 1>{});
    }
    constexpr int WIDEST = widest<float>();
    return aligned && channels % WIDEST == 0 ? visit(Access<float, WIDEST>{}) : visit(Access<float, 1>{});
}

}  // namespace asag
