// Deformable DETR's sampling: each level at points of its own, and all of a group added up by weight.
//
// One thread computes a few neighbouring channels of one query, and so those of a warp read whole lines of a cell.
// Each finds the cells for itself: a handful of threads share a group and do the same, which is a fraction of what
// reading the cells takes, and spares shared memory and a barrier.  Bilinear with zeros outside, cell centres at
// (i + 0.5) / size, as asag_training.network.operators.deformable_sample.  Points that are not finite sample zeros.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/taps.h"

namespace asag {

constexpr int DEFORMABLE_THREADS = 128;

// Packs of WIDTH channels, one for each thread.
inline int64_t deformable_packs(const AsagDeformableSample& arguments, int width) {
    return static_cast<int64_t>(arguments.features.batch) * arguments.queries * (arguments.features.channels / width);
}

inline int64_t deformable_sample_blocks(const AsagDeformableSample& arguments, int width) {
    return (deformable_packs(arguments, width) + DEFORMABLE_THREADS - 1) / DEFORMABLE_THREADS;
}

// Pack `item` of deformable_packs().  WIDTH channels at a time; C / G must be a multiple of it.
template <class T, int WIDTH>
ASAG_HD void deformable_sample_pack(const AsagDeformableSample& arguments, int64_t item) {
    using Channels = Pack<T, WIDTH>;
    const AsagPyramid& features = arguments.features;
    const int packs = features.channels / WIDTH, group_packs = packs / arguments.groups;
    const int64_t query = item / packs;  // of all images
    const int pack = static_cast<int>(item % packs);
    const int64_t image = query / arguments.queries, set = query * arguments.groups + pack / group_packs;
    const float* xy = arguments.xy + set * features.levels * arguments.points * 2;
    const float* weight = arguments.weight + set * features.levels * arguments.points;
    float sum[WIDTH] = {};
    for (int level = 0; level < features.levels; ++level) {
        const int height = features.heights[level], width = features.widths[level];
        const int64_t before = image * height * width * packs + pack;
        const Channels* map = static_cast<const Channels*>(features.maps[level]) + before;
        for (int point = 0; point < arguments.points; ++point, xy += 2, ++weight) {
            const float column = sub(mul(xy[0], static_cast<float>(width)), 0.5f);
            const float row = sub(mul(xy[1], static_cast<float>(height)), 0.5f);
            const SampleTaps taps = taps_round(column, row, *weight, height, width);
            for (int corner = 0; corner < 4; ++corner) {
                const Channels tap = map[static_cast<int64_t>(taps.cell[corner]) * packs];
                for (int k = 0; k < WIDTH; ++k) sum[k] += taps.weight[corner] * to_float(tap.values[k]);
            }
        }
    }
    Channels result;
    for (int k = 0; k < WIDTH; ++k) result.values[k] = from_float<T>(sum[k]);
    static_cast<Channels*>(arguments.out)[item] = result;
}

}  // namespace asag
