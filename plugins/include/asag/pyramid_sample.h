// AdaMixer's sampling: every level at the same points, added up by weight; channels go in groups.
//
// One block computes all points of one query and group.  Bilinear with zeros outside, cell centres at
// (i + 0.5) stride, as asag_training.network.operators.pyramid_sample.  Points that are not finite sample zeros.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/block.h"
#include "asag/taps.h"

namespace asag {

constexpr int SAMPLE_THREADS = 128;
constexpr int SAMPLE_TILE = 32;  // points whose taps lie in shared memory at a time

// Shared memory of a block.
struct SampleShared {
    SampleTaps taps[SAMPLE_TILE][ASAG_MAX_LEVELS];
};

ASAG_HD inline SampleTaps sample_taps(float x, float y, float weight, int stride, int height, int width) {
    const float pitch = static_cast<float>(stride);
    return taps_round(sub(divide(x, pitch), 0.5f), sub(divide(y, pitch), 0.5f), weight, height, width);
}

// Block `index` of batch * queries * groups.  WIDTH channels at a time; C / G must be a multiple of it.
template <class T, int WIDTH, class Block>
ASAG_HD void pyramid_sample_block(
    const Block& block, const AsagPyramidSample& arguments, int64_t index, SampleShared& shared) {
    using Channels = Pack<T, WIDTH>;
    const AsagPyramid& features = arguments.features;
    const int group = static_cast<int>(index % arguments.groups);
    const int64_t image = index / arguments.groups / arguments.queries;
    const int packs = features.channels / WIDTH, group_packs = packs / arguments.groups;
    const float* xy = arguments.xy + index * arguments.points * 2;
    const float* weight = arguments.weight + index * arguments.points * features.levels;
    Channels* out = static_cast<Channels*>(arguments.out) + index * arguments.points * group_packs;

    for (int begin = 0; begin < arguments.points; begin += SAMPLE_TILE) {
        const int tile = smaller(SAMPLE_TILE, arguments.points - begin);
        block.each([&](int thread) {
            for (int i = thread; i < tile * features.levels; i += block.threads()) {
                const int point = i / features.levels, level = i % features.levels;
                const float* at = xy + (begin + point) * 2;
                shared.taps[point][level] = sample_taps(
                    at[0], at[1], weight[(begin + point) * features.levels + level], features.strides[level],
                    features.heights[level], features.widths[level]);
            }
        });
        block.each([&](int thread) {
            for (int item = thread; item < tile * group_packs; item += block.threads()) {
                const int point = item / group_packs, pack = item % group_packs;
                float sum[WIDTH] = {};
                for (int level = 0; level < features.levels; ++level) {
                    const int64_t cells = static_cast<int64_t>(features.heights[level]) * features.widths[level];
                    const Channels* map = static_cast<const Channels*>(features.maps[level]) + image * cells * packs +
                                          group * group_packs + pack;
                    const SampleTaps& taps = shared.taps[point][level];
                    for (int corner = 0; corner < 4; ++corner) {
                        const Channels tap = map[static_cast<int64_t>(taps.cell[corner]) * packs];
                        for (int k = 0; k < WIDTH; ++k) sum[k] += taps.weight[corner] * to_float(tap.values[k]);
                    }
                }
                Channels result;
                for (int k = 0; k < WIDTH; ++k) result.values[k] = from_float<T>(sum[k]);
                out[(begin + point) * group_packs + pack] = result;
            }
        });
    }
}

inline int64_t pyramid_sample_blocks(const AsagPyramidSample& arguments) {
    return static_cast<int64_t>(arguments.features.batch) * arguments.queries * arguments.groups;
}

}  // namespace asag
