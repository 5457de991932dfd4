// RoIAlign 7x7 with 2x2 samples per bin, each box on one level of the pyramid, in one launch (paper, relation block).
//
// One block computes a row of bins of one box.  Level, samples and border rule are those of
// asag_training.network.operators.multiscale_roi_align.  A box whose area is not a number goes to the finest level.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/block.h"

namespace asag {

constexpr int ROI_BINS = 7;
constexpr int ROI_SAMPLES = 2;
constexpr int ROI_TAPS = 2 * ROI_SAMPLES;
constexpr int ROI_THREADS = 128;

// The cells along one axis that a bin's samples lie between, and their weights.
struct RoiAxis {
    int cell[ROI_TAPS];
    float weight[ROI_TAPS];
};

// Shared memory of a block.
struct RoiShared {
    RoiAxis row;
    RoiAxis columns[ROI_BINS];
};

// floor(4 + log2(sqrt(area) / 224)), as an index into the pyramid (FPN).
ASAG_HD inline int roi_level(const AsagPyramid& features, const float* box) {
    const float area = mul(sub(box[2], box[0]), sub(box[3], box[1]));
    const float octave = log2f(divide(square_root(area), 224.0f));
    const float level = floorf(add(add(4.0f, octave), 1e-6f));
    int finest = 0;
    while ((features.strides[0] >> (finest + 1)) != 0) ++finest;
    const float index = larger(sub(level, static_cast<float>(finest)), 0.0f);
    return static_cast<int>(smaller(index, static_cast<float>(features.levels - 1)));
}

// One axis of one bin: box from `low` to `high` in pixels, on a level of `size` cells.
ASAG_HD inline RoiAxis roi_axis(float low, float high, int stride, int size, int bin) {
    const float pitch = static_cast<float>(stride);
    const float start = divide(low, pitch);
    const float extent = larger(sub(divide(high, pitch), start), 1.0f);
    const float cell = divide(extent, static_cast<float>(ROI_BINS * ROI_SAMPLES));
    const float last = static_cast<float>(size - 1);
    RoiAxis axis;
    for (int sample = 0; sample < ROI_SAMPLES; ++sample) {
        const float step = static_cast<float>(bin * ROI_SAMPLES + sample) + 0.5f;
        const float at = add(start, mul(step, cell));
        const bool inside = at >= -1.0f && at <= static_cast<float>(size);
        const float position = smaller(larger(at, 0.0f), last);
        const float floored = floorf(position);
        const float fraction = sub(position, floored);
        axis.cell[2 * sample] = static_cast<int>(floored);
        axis.cell[2 * sample + 1] = static_cast<int>(smaller(floored + 1.0f, last));
        axis.weight[2 * sample] = inside ? 1.0f - fraction : 0.0f;
        axis.weight[2 * sample + 1] = inside ? fraction : 0.0f;
    }
    return axis;
}

// Block `index` of batch * queries * 7.  WIDTH channels at a time; channels must be a multiple of it.
template <class T, int WIDTH, class Block>
ASAG_HD void roi_align_block(
    const Block& block, const AsagMultiscaleRoIAlign& arguments, int64_t index, RoiShared& shared) {
    const AsagPyramid& features = arguments.features;
    const int bin_row = static_cast<int>(index % ROI_BINS);
    const int64_t query = index / ROI_BINS;  // of all images
    const int64_t image = query / arguments.queries;
    const float* box = arguments.boxes + query * 4;
    const int level = roi_level(features, box);
    const int stride = features.strides[level];
    const int height = features.heights[level], width = features.widths[level];

    block.each([&](int thread) {
        for (int i = thread; i <= ROI_BINS; i += block.threads()) {
            if (i < ROI_BINS) {
                shared.columns[i] = roi_axis(box[0], box[2], stride, width, i);
            } else {
                shared.row = roi_axis(box[1], box[3], stride, height, bin_row);
            }
        }
    });

    using Channels = Pack<T, WIDTH>;
    const int packs = features.channels / WIDTH;
    const Channels* map = static_cast<const Channels*>(features.maps[level]) + image * height * width * packs;
    Channels* out = static_cast<Channels*>(arguments.out) + index * ROI_BINS * packs;
    block.each([&](int thread) {
        for (int item = thread; item < ROI_BINS * packs; item += block.threads()) {
            const RoiAxis& column = shared.columns[item / packs];
            float sum[WIDTH] = {};
            for (int i = 0; i < ROI_TAPS; ++i) {
                const Channels* row = map + static_cast<int64_t>(shared.row.cell[i]) * width * packs + item % packs;
                const float of_row = shared.row.weight[i] * (1.0f / (ROI_SAMPLES * ROI_SAMPLES));
                for (int j = 0; j < ROI_TAPS; ++j) {
                    const float weight = of_row * column.weight[j];
                    const Channels tap = row[static_cast<int64_t>(column.cell[j]) * packs];
                    for (int k = 0; k < WIDTH; ++k) sum[k] += weight * to_float(tap.values[k]);
                }
            }
            Channels result;
            for (int k = 0; k < WIDTH; ++k) result.values[k] = from_float<T>(sum[k]);
            out[item] = result;
        }
    });
}

inline int64_t roi_align_blocks(const AsagMultiscaleRoIAlign& arguments) {
    return static_cast<int64_t>(arguments.features.batch) * arguments.queries * ROI_BINS;
}

}  // namespace asag
