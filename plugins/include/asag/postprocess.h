// The decoder's detections become those of the original image: sorted, scaled, rid of duplicates, and clipped.
//
// One block per image.  What is kept, in which order, and every number are those of
// asag_deploy.processing.postprocess.detections_of.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/greedy.h"
#include "asag/select.h"

namespace asag {

// Shared memory of a block, before its arrays.
struct PostprocessShared {
    SelectScratch select;
    GreedyShared greedy;
};

struct PostprocessArrays {
    Best best;
    uint8_t* suppressed;
};

inline ASAG_HD size_t postprocess_shared_bytes(const AsagPostprocess& arguments) {
    return sizeof(PostprocessShared) + static_cast<size_t>(arguments.detections) * (4 + 4 + 4 + 1);
}

ASAG_HD inline PostprocessArrays postprocess_arrays(const AsagPostprocess& arguments, void* shared) {
    const int room = arguments.detections;
    int* words = reinterpret_cast<int*>(static_cast<uint8_t*>(shared) + sizeof(PostprocessShared));
    PostprocessArrays arrays;
    arrays.best = Best{words, reinterpret_cast<uint32_t*>(words + room), words + 2 * room};
    arrays.suppressed = reinterpret_cast<uint8_t*>(words + 3 * room);
    return arrays;
}

struct PixelBox {
    float left, top, right, bottom;
};

ASAG_HD inline float area_of(const PixelBox& box) {
    return mul(larger(sub(box.right, box.left), 0.0f), larger(sub(box.bottom, box.top), 0.0f));
}

ASAG_HD inline float iou_of(const PixelBox& a, const PixelBox& b) {
    const float across = larger(sub(smaller(a.right, b.right), larger(a.left, b.left)), 0.0f);
    const float down = larger(sub(smaller(a.bottom, b.bottom), larger(a.top, b.top)), 0.0f);
    const float shared = mul(across, down);
    const float both = sub(add(area_of(a), area_of(b)), shared);
    return both > 0.0f ? divide(shared, both) : 0.0f;
}

// Block `image` of the batch.  `memory`: postprocess_shared_bytes, aligned to 8.
template <class Block>
ASAG_HD void postprocess_block(const Block& block, const AsagPostprocess& arguments, int image, void* memory) {
    PostprocessShared& shared = *static_cast<PostprocessShared*>(memory);
    const PostprocessArrays arrays = postprocess_arrays(arguments, memory);
    const int count = arguments.detections;
    const int64_t first = static_cast<int64_t>(image) * count;
    const bool is_half = arguments.type == ASAG_FLOAT16;
    const AnyFloats scores{arguments.scores, is_half}, boxes{arguments.boxes, is_half};
    const int64_t* labels = arguments.labels + first;
    const float height = static_cast<float>(arguments.original_shape[2 * image]);
    const float width = static_cast<float>(arguments.original_shape[2 * image + 1]);
    const int* order = arrays.best.sorted;

    const auto key = [&](int i) -> uint32_t {
        const float score = scores[first + i];
        return score > 0.0f ? sort_key(score) : 0;
    };
    const auto pixels = [&](int i) {  // of the i-th best
        const int64_t at = (first + order[i]) * 4;
        return PixelBox{
            mul(boxes[at], width), mul(boxes[at + 1], height), mul(boxes[at + 2], width), mul(boxes[at + 3], height)};
    };
    const auto keep = [&](int slot, int i) {
        const PixelBox box = pixels(i);
        const int64_t to = first + slot;
        arguments.xyxy[4 * to] = smaller(larger(box.left, 0.0f), width);
        arguments.xyxy[4 * to + 1] = smaller(larger(box.top, 0.0f), height);
        arguments.xyxy[4 * to + 2] = smaller(larger(box.right, 0.0f), width);
        arguments.xyxy[4 * to + 3] = smaller(larger(box.bottom, 0.0f), height);
        arguments.confidence[to] = scores[first + order[i]];
        arguments.class_id[to] = labels[order[i]];
    };

    const int found = top_k(block, shared.select, count, count, key, arrays.best);
    int kept = found;
    if (arguments.nms_iou >= 0.0f) {
        const auto suppresses = [&](int i, int j) {
            return labels[order[i]] == labels[order[j]] && iou_of(pixels(i), pixels(j)) > arguments.nms_iou;
        };
        kept = greedy(block, shared.greedy, found, arrays.suppressed, suppresses, keep);
    } else {
        block.each([&](int thread) {
            for (int i = thread; i < found; i += block.threads()) keep(i, i);
        });
    }
    block.each([&](int thread) {
        for (int i = kept + thread; i < count; i += block.threads()) {
            const int64_t to = first + i;
            for (int j = 0; j < 4; ++j) arguments.xyxy[4 * to + j] = 0;
            arguments.confidence[to] = 0;
            arguments.class_id[to] = 0;
        }
        if (thread == 0) arguments.counts[image] = kept;
    });
}

}  // namespace asag
