// AdaMixer's sampling: every level at the same points, added up by weight; channels go in groups.
//
// One block computes all points of one query and group.  Bilinear with zeros outside, cell centres at
// (i + 0.5) stride, as asag_training.network.operators.pyramid_sample.  Points that are not finite sample zeros.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/block.h"

namespace asag {

constexpr int SAMPLE_THREADS = 128;
constexpr int SAMPLE_TILE = 32;  // points whose taps lie in shared memory at a time

// The four cells round a point on one level.
struct SampleTaps {
    int cell[4];  // row * width + column
    float weight[4];
};

// Shared memory of a block.
struct SampleShared {
    SampleTaps taps[SAMPLE_TILE][ASAG_MAX_LEVELS];
};

ASAG_HD inline SampleTaps sample_taps(float x, float y, float weight, int stride, int height, int width) {
    const float pitch = static_cast<float>(stride);
    const float column = sub(divide(x, pitch), 0.5f), row = sub(divide(y, pitch), 0.5f);
    const float left = floorf(column), top = floorf(row);
    const float across = sub(column, left), down = sub(row, top);
    const float last_x = static_cast<float>(width - 1), last_y = static_cast<float>(height - 1);
    SampleTaps taps;
    for (int corner = 0; corner < 4; ++corner) {
        const bool right = (corner & 1) != 0, bottom = (corner & 2) != 0;
        const float at_x = right ? left + 1.0f : left, at_y = bottom ? top + 1.0f : top;
        const bool inside = at_x >= 0.0f && at_x <= last_x && at_y >= 0.0f && at_y <= last_y;
        const float share = (right ? across : 1.0f - across) * (bottom ? down : 1.0f - down);
        // Clamped while it is a float: far out it would not fit into an int.
        const int cell_x = static_cast<int>(smaller(larger(at_x, 0.0f), last_x));
        const int cell_y = static_cast<int>(smaller(larger(at_y, 0.0f), last_y));
        taps.cell[corner] = cell_y * width + cell_x;
        taps.weight[corner] = inside ? share * weight : 0.0f;
    }
    return taps;
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
