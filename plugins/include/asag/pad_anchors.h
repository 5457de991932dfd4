// Gather the anchors that pass into a fixed number of queries: filter, floor, cap and pad, in one launch.
//
// One block per image.  The order of the queries and who is among them are those of
// asag_training.network.operators.pad_anchors.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/select.h"

namespace asag {

// Shared memory of a block, before its arrays.
struct PadAnchorsShared {
    SelectScratch select;
};

struct PadAnchorsArrays {
    Best best;  // best.sorted becomes the order of the queries
    uint8_t* in_floor;  // of the first level: is among the best `floor`
};

inline ASAG_HD int pad_anchors_first(const AsagPadAnchors& arguments) {
    return smaller(arguments.first_level, arguments.anchor_count);
}

// Queries that are chosen at once, at most: the cap's, or before those the floor's.
inline ASAG_HD int pad_anchors_room(const AsagPadAnchors& arguments) {
    const int floor = smaller(arguments.floor, pad_anchors_first(arguments));
    return smaller(larger(arguments.cap, floor), arguments.anchor_count);
}

inline ASAG_HD size_t pad_anchors_shared_bytes(const AsagPadAnchors& arguments) {
    return sizeof(PadAnchorsShared) + static_cast<size_t>(pad_anchors_room(arguments)) * (4 + 4 + 4) +
           static_cast<size_t>(pad_anchors_first(arguments));
}

ASAG_HD inline PadAnchorsArrays pad_anchors_arrays(const AsagPadAnchors& arguments, void* shared) {
    const int room = pad_anchors_room(arguments);
    int* words = reinterpret_cast<int*>(static_cast<uint8_t*>(shared) + sizeof(PadAnchorsShared));
    PadAnchorsArrays arrays;
    arrays.best = Best{words, reinterpret_cast<uint32_t*>(words + room), words + 2 * room};
    arrays.in_floor = reinterpret_cast<uint8_t*>(words + 3 * room);
    return arrays;
}

// Block `image` of the batch.  `memory`: pad_anchors_shared_bytes, aligned to 8.
template <class Block>
ASAG_HD void pad_anchors_block(const Block& block, const AsagPadAnchors& arguments, int image, void* memory) {
    SelectScratch& select = static_cast<PadAnchorsShared*>(memory)->select;
    const PadAnchorsArrays arrays = pad_anchors_arrays(arguments, memory);
    const int count = arguments.anchor_count, first = pad_anchors_first(arguments);
    const int cap = smaller(arguments.cap, arguments.slots);
    const bool is_half = arguments.type == ASAG_FLOAT16;
    const AnyFloats values{arguments.anchors, is_half};
    const int64_t first_value = static_cast<int64_t>(image) * count * 5;
    const auto anchor = [&](int i, int part) { return values[first_value + 5 * static_cast<int64_t>(i) + part]; };
    const uint8_t* keep = arguments.keep + static_cast<int64_t>(image) * count;
    const int64_t first_query = static_cast<int64_t>(image) * arguments.slots * 4;
    int* order = arrays.best.sorted;

    const auto key = [&](int i) { return sort_key(anchor(i, 4)); };
    const auto kept = [&](int i) { return keep[i] != 0; };
    const bool is_short = count_if(block, select, 0, first, kept) < arguments.floor;
    int in_order = 0;  // queries in `order` already
    if (is_short) {
        block.each([&](int thread) {
            for (int i = thread; i < first; i += block.threads()) arrays.in_floor[i] = 0;
        });
        in_order = top_k(block, select, first, smaller(arguments.floor, first), key, arrays.best);
        block.each([&](int thread) {
            for (int i = thread; i < in_order; i += block.threads()) arrays.in_floor[order[i]] = 1;
        });
    }
    const auto chosen = [&](int i) { return is_short && i < first ? arrays.in_floor[i] != 0 : keep[i] != 0; };
    const int total = count_if(block, select, 0, count, chosen);
    if (total > cap) {
        top_k(block, select, count, cap, [&](int i) { return chosen(i) ? key(i) : 0u; }, arrays.best);
    } else {
        const int begin = is_short ? first : 0;
        compact(block, select, begin, count, chosen, [&](int slot, int i) { order[in_order + slot] = i; });
    }

    const int real = smaller(total, cap);
    const float height = static_cast<float>(arguments.image_size[2 * image]);
    const float width = static_cast<float>(arguments.image_size[2 * image + 1]);
    const float whole[4] = {mul(width, 0.5f), mul(height, 0.5f), width, height};
    block.each([&](int thread) {
        for (int i = thread; i < 4 * arguments.slots; i += block.threads()) {
            const int slot = i / 4;
            const float value = slot < real ? anchor(order[slot], i % 4) : whole[i % 4];
            store(arguments.queries, is_half, first_query + i, value);
        }
        if (thread == 0) arguments.counts[image] = real;
    });
}

}  // namespace asag
