// Exact greedy NMS over square patches, to their origins and a count, in one launch (paper, section 4.2).
//
// One block per image: the best selected anchors are found and sorted, then settled, best first.  All decisions are
// those of asag_training.network.operators.patch_nms, in the same float arithmetic.  A selected anchor whose
// score is negative or not a number is no candidate.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/greedy.h"
#include "asag/select.h"

namespace asag {

// Shared memory of a block, before its arrays.
struct PatchNmsShared {
    SelectScratch select;
    GreedyShared greedy;
};

// Of as many candidates as there can be.
struct PatchNmsArrays {
    Best best;
    float* x;  // centres of the candidates, best first; they take the place of best.index and best.key
    float* y;
    uint8_t* suppressed;
};

inline ASAG_HD int patch_nms_limit(const AsagPatchNMS& arguments) {
    return smaller(arguments.anchor_count, arguments.max_candidates);
}

inline ASAG_HD size_t patch_nms_shared_bytes(const AsagPatchNMS& arguments) {
    return sizeof(PatchNmsShared) + static_cast<size_t>(patch_nms_limit(arguments)) * (4 + 4 + 4 + 1);
}

ASAG_HD inline PatchNmsArrays patch_nms_arrays(const AsagPatchNMS& arguments, void* shared) {
    const int limit = patch_nms_limit(arguments);
    int* words = reinterpret_cast<int*>(static_cast<uint8_t*>(shared) + sizeof(PatchNmsShared));
    PatchNmsArrays arrays;
    arrays.best = Best{words, reinterpret_cast<uint32_t*>(words + limit), words + 2 * limit};
    arrays.x = reinterpret_cast<float*>(words);
    arrays.y = reinterpret_cast<float*>(words + limit);
    arrays.suppressed = reinterpret_cast<uint8_t*>(words + 3 * limit);
    return arrays;
}

struct Square {
    float left, top, right, bottom;
};

ASAG_HD inline Square patch_around(float x, float y, const AsagPatchNMS& arguments) {
    const float half = 0.5f * static_cast<float>(arguments.stride) * static_cast<float>(arguments.patch_size);
    return Square{sub(x, half), sub(y, half), add(x, half), add(y, half)};
}

ASAG_HD inline float area_of(const Square& square) {
    return mul(sub(square.right, square.left), sub(square.bottom, square.top));
}

ASAG_HD inline bool suppresses(const Square& a, const Square& b, float iou_threshold) {
    const float across = larger(sub(smaller(a.right, b.right), larger(a.left, b.left)), 0.0f);
    const float down = larger(sub(smaller(a.bottom, b.bottom), larger(a.top, b.top)), 0.0f);
    const float shared = mul(across, down);
    return divide(shared, sub(add(area_of(a), area_of(b)), shared)) > iou_threshold;
}

// Along one axis: the first cell of a patch from `low` to `high`, moved inside an image of `size` pixels.
ASAG_HD inline int64_t patch_origin(float low, float high, int64_t size, const AsagPatchNMS& arguments) {
    const float pitch = static_cast<float>(arguments.stride), side = static_cast<float>(arguments.patch_size);
    const float centre = divide(mul(add(low, high), 0.5f), pitch);
    const float origin = floorf(sub(centre, mul(side, 0.5f)));
    const float cells = ceilf(divide(static_cast<float>(size), pitch));
    return static_cast<int64_t>(larger(smaller(origin, sub(cells, side)), 0.0f));
}

// Block `image` of the batch.  `memory`: patch_nms_shared_bytes, aligned to 8.
template <class Block>
ASAG_HD void patch_nms_block(const Block& block, const AsagPatchNMS& arguments, int image, void* memory) {
    PatchNmsShared& shared = *static_cast<PatchNmsShared*>(memory);
    const PatchNmsArrays arrays = patch_nms_arrays(arguments, memory);
    const int count = arguments.anchor_count, capacity = arguments.capacity;
    const AnyFloats values{arguments.anchors, arguments.type == ASAG_FLOAT16};
    const int64_t first = static_cast<int64_t>(image) * count * 5;
    const auto anchor = [&](int i, int part) { return values[first + 5 * static_cast<int64_t>(i) + part]; };
    const uint8_t* selected = arguments.selected + static_cast<int64_t>(image) * count;
    const int64_t* size = arguments.image_size + 2 * image;  // height, width
    int64_t* counts = arguments.counts + static_cast<int64_t>(image) * ASAG_COUNT_COLUMNS;
    int64_t* origins = arguments.origins + static_cast<int64_t>(image) * capacity * 2;
    const float threshold = arguments.iou_threshold;

    const auto key = [&](int i) -> uint32_t {
        const float score = selected[i] ? anchor(i, 4) : -1.0f;
        return score >= 0.0f ? sort_key(score) : 0;
    };
    const int found = top_k(block, shared.select, count, patch_nms_limit(arguments), key, arrays.best);
    block.each([&](int thread) {
        for (int i = thread; i < found; i += block.threads()) {
            arrays.x[i] = anchor(arrays.best.sorted[i], 0);
            arrays.y[i] = anchor(arrays.best.sorted[i], 1);
        }
    });
    const auto patch = [&](int i) { return patch_around(arrays.x[i], arrays.y[i], arguments); };

    const auto overlaps = [&](int i, int j) { return suppresses(patch(i), patch(j), threshold); };
    const auto keep = [&](int slot, int i) {
        if (slot >= capacity) return;
        const Square square = patch(i);
        origins[2 * slot] = patch_origin(square.left, square.right, size[1], arguments);
        origins[2 * slot + 1] = patch_origin(square.top, square.bottom, size[0], arguments);
    };
    const int kept = greedy(block, shared.greedy, found, arrays.suppressed, overlaps, keep);
    block.each([&](int thread) {
        for (int i = 2 * kept + thread; i < 2 * capacity; i += block.threads()) origins[i] = 0;
        if (thread == 0) counts[ASAG_PATCHES] = kept;
    });
}

}  // namespace asag
