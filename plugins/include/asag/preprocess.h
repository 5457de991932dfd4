// An RGB image becomes a slot of the network's input batch: resized, padded right and bottom, and normalised if asked.
//
// Resizing is OpenCV's to the bit, as asag_deploy.processing.preprocess does it on the CPU: INTER_LINEAR in fixed point
// where the image grows, INTER_AREA where it shrinks, a copy where it stays.  Positions and weights are computed in
// double, which most GPUs are slow at: once for an image what is the same everywhere, on the host, and once for each
// row and column of a tile; never for a pixel.  A block computes a tile of the slot, a thread one of its pixels.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/block.h"

namespace asag {

constexpr int TILE_HEIGHT = 8;
constexpr int TILE_WIDTH = 32;
constexpr int PREPROCESS_THREADS = TILE_HEIGHT * TILE_WIDTH;
constexpr int LINEAR_SCALE = 2048;  // fixed point of the weights of linear interpolation

// In double, as OpenCV computes positions; not fused either.
ASAG_HD inline double mul(double a, double b) {
#ifdef __CUDA_ARCH__
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

ASAG_HD inline double add(double a, double b) {
#ifdef __CUDA_ARCH__
    return __dadd_rn(a, b);
#else
    return a + b;
#endif
}

ASAG_HD inline double divide(double a, double b) {
#ifdef __CUDA_ARCH__
    return __ddiv_rn(a, b);
#else
    return a / b;
#endif
}

// To the nearest integer, ties to even.
ASAG_HD inline int nearest(float value) {
#ifdef __CUDA_ARCH__
    return __float2int_rn(value);
#else
    return static_cast<int>(std::lrint(value));
#endif
}

ASAG_HD inline uint8_t to_byte(int value) { return static_cast<uint8_t>(smaller(larger(value, 0), 255)); }

enum class Resize { COPY, LINEAR, AREA, BLOCKS };

// What is the same for all pixels of an image.
struct ResizePlan {
    Resize kind;
    double down, across;            // source pixels per pixel of the result
    int block_height, block_width;  // the same in whole numbers, for BLOCKS
    float block_weight;
};

inline double resize_scale(int from, int to) { return 1.0 / (static_cast<double>(to) / static_cast<double>(from)); }

inline ResizePlan resize_plan(const AsagPreprocess& arguments) {
    const int height = arguments.height, width = arguments.width;
    const int new_height = arguments.new_height, new_width = arguments.new_width;
    ResizePlan plan = {Resize::AREA, resize_scale(height, new_height), resize_scale(width, new_width), 0, 0, 0.0f};
    if (new_height == height && new_width == width) {
        plan.kind = Resize::COPY;
    } else if (static_cast<int64_t>(new_height) * new_width >= static_cast<int64_t>(height) * width) {
        plan.kind = Resize::LINEAR;
    } else {
        plan.block_height = static_cast<int>(plan.down);
        plan.block_width = static_cast<int>(plan.across);
        plan.block_weight = 1.0f / static_cast<float>(plan.block_height * plan.block_width);
        // OpenCV decides by the rounded scales, not by whether the sides divide each other.
        const bool whole = plan.down == plan.block_height && plan.across == plan.block_width;
        if (whole) plan.kind = Resize::BLOCKS;
    }
    return plan;
}

// The two source cells of a pixel of an axis that grows, and their weights in 2048ths.
struct LinearAxis {
    int first, second;
    int weight_first, weight_second;
};

// Beyond the first and last cell OpenCV gives all the weight to that cell along a row, but along a column it keeps the
// two weights, whose products it then truncates apart.
ASAG_HD inline LinearAxis linear_axis(int at, int from, double scale, bool along_row) {
    const float position = static_cast<float>(add(mul(at + 0.5, scale), -0.5));
    const float floored = floorf(position);
    const int first = static_cast<int>(floored), last = from - 1;
    const bool beyond = first < 0 || first >= last;
    const float fraction = along_row && beyond ? 0.0f : sub(position, floored);
    LinearAxis axis;
    axis.first = smaller(larger(first, 0), last);
    axis.second = smaller(larger(first + 1, 0), last);
    axis.weight_first = nearest(mul(sub(1.0f, fraction), static_cast<float>(LINEAR_SCALE)));
    axis.weight_second = nearest(mul(fraction, static_cast<float>(LINEAR_SCALE)));
    return axis;
}

// The source cells that a pixel of an axis that shrinks covers: the middle ones whole, the first and last in part.
struct AreaAxis {
    int begin, end;    // of the middle ones
    float head, tail;  // weights of cells begin - 1 and end; 0 where they are not covered
    float middle;
};

ASAG_HD inline AreaAxis area_axis(int at, int from, double scale) {
    const double low = mul(static_cast<double>(at), scale);
    const double high = add(low, scale);
    const double left = add(static_cast<double>(from), -low);
    const double width = scale < left ? scale : left;
    AreaAxis axis;
    axis.end = smaller(static_cast<int>(floor(high)), from - 1);
    axis.begin = smaller(static_cast<int>(ceil(low)), axis.end);
    const double head = add(static_cast<double>(axis.begin), -low);
    double tail = add(high, -static_cast<double>(axis.end));
    axis.head = head > 1e-3 ? static_cast<float>(divide(head, width)) : 0.0f;
    axis.middle = static_cast<float>(divide(1.0, width));
    const bool has_tail = tail > 1e-3;
    if (tail > 1.0) tail = 1.0;
    if (tail > width) tail = width;
    axis.tail = has_tail ? static_cast<float>(divide(tail, width)) : 0.0f;
    return axis;
}

ASAG_HD inline uint8_t linear_pixel(
    const uint8_t* image, int64_t pitch, const LinearAxis& row, const LinearAxis& column, int channel) {
    const uint8_t* upper = image + row.first * pitch + channel;
    const uint8_t* lower = image + row.second * pitch + channel;
    const int above = upper[3 * column.first] * column.weight_first + upper[3 * column.second] * column.weight_second;
    const int below = lower[3 * column.first] * column.weight_first + lower[3 * column.second] * column.weight_second;
    const int sum = (row.weight_first * (above >> 4) >> 16) + (row.weight_second * (below >> 4) >> 16);
    return to_byte((sum + 2) >> 2);
}

ASAG_HD inline float area_row(const uint8_t* row, const AreaAxis& column) {
    float sum = 0;
    if (column.head > 0) sum = add(sum, mul(static_cast<float>(row[3 * (column.begin - 1)]), column.head));
    for (int x = column.begin; x < column.end; ++x) {
        sum = add(sum, mul(static_cast<float>(row[3 * x]), column.middle));
    }
    if (column.tail > 0) sum = add(sum, mul(static_cast<float>(row[3 * column.end]), column.tail));
    return sum;
}

ASAG_HD inline uint8_t area_pixel(
    const uint8_t* image, int64_t pitch, const AreaAxis& row, const AreaAxis& column, int channel) {
    const uint8_t* at = image + channel;
    float sum = 0;
    if (row.head > 0) sum = add(sum, mul(row.head, area_row(at + (row.begin - 1) * pitch, column)));
    for (int y = row.begin; y < row.end; ++y) sum = add(sum, mul(row.middle, area_row(at + y * pitch, column)));
    if (row.tail > 0) sum = add(sum, mul(row.tail, area_row(at + row.end * pitch, column)));
    return to_byte(nearest(sum));
}

// Both sides shrink by whole numbers: the mean of blocks, in integers.
ASAG_HD inline uint8_t block_pixel(
    const uint8_t* image, int64_t pitch, int y, int x, const ResizePlan& plan, int channel) {
    const int height = plan.block_height, width = plan.block_width;
    int sum = 0;
    for (int i = 0; i < height; ++i) {
        const uint8_t* row = image + (static_cast<int64_t>(y) * height + i) * pitch + channel;
        for (int j = 0; j < width; ++j) sum += row[3 * (x * width + j)];
    }
    if (height == 2 && width == 2) return static_cast<uint8_t>((sum + 2) >> 2);
    return to_byte(nearest(mul(static_cast<float>(sum), plan.block_weight)));
}

// Where the pixels of a row or column come from, by the kind of resizing.  Five words: the threads of a warp, each with
// a column of its own, then read 32 different banks.
union Axis {
    LinearAxis linear;
    AreaAxis area;
};

// Shared memory of a block; nothing is in it for rows and columns beyond the image.
struct PreprocessShared {
    Axis rows[TILE_HEIGHT];
    Axis columns[TILE_WIDTH];
};

ASAG_HD inline void set_axis(Axis& axis, Resize kind, int at, int from, double scale, bool along_row) {
    if (kind == Resize::LINEAR) axis.linear = linear_axis(at, from, scale, along_row);
    if (kind == Resize::AREA) axis.area = area_axis(at, from, scale);
}

// Red, green, blue of a pixel of the image in its new size.
ASAG_HD inline void resized_pixel(
    const AsagPreprocess& arguments, const ResizePlan& plan, int y, int x, const Axis& row, const Axis& column,
    uint8_t rgb[3]) {
    const uint8_t* image = arguments.image;
    const int64_t pitch = static_cast<int64_t>(arguments.width) * 3;
    if (plan.kind == Resize::COPY) {
        for (int i = 0; i < 3; ++i) rgb[i] = image[y * pitch + 3 * x + i];
    } else if (plan.kind == Resize::LINEAR) {
        for (int i = 0; i < 3; ++i) rgb[i] = linear_pixel(image, pitch, row.linear, column.linear, i);
    } else if (plan.kind == Resize::AREA) {
        for (int i = 0; i < 3; ++i) rgb[i] = area_pixel(image, pitch, row.area, column.area, i);
    } else {
        for (int i = 0; i < 3; ++i) rgb[i] = block_pixel(image, pitch, y, x, plan, i);
    }
    if (arguments.bgr == 0) return;
    const uint8_t blue = rgb[0];
    rgb[0] = rgb[2];
    rgb[2] = blue;
}

// Writes a pixel of the slot.  Bytes lie (H, W, 3), zero where the image is not; normalised values lie (3, H, W), zero
// there too.
ASAG_HD inline void store_pixel(const AsagPreprocess& arguments, int y, int x, const uint8_t rgb[3], bool inside) {
    const int64_t index = static_cast<int64_t>(y) * arguments.batch_width + x;
    const int64_t plane = static_cast<int64_t>(arguments.batch_height) * arguments.batch_width;
    for (int i = 0; i < 3; ++i) {
        if (arguments.type == ASAG_UINT8) {
            static_cast<uint8_t*>(arguments.out)[3 * index + i] = rgb[i];
            continue;
        }
        const float centred = sub(static_cast<float>(rgb[i]), arguments.mean[i]);
        const float value = inside ? divide(centred, arguments.deviation[i]) : 0.0f;
        store(arguments.out, arguments.type == ASAG_FLOAT16, i * plane + index, value);
    }
}

ASAG_HD inline int tiles_down(const AsagPreprocess& arguments) {
    return (arguments.batch_height + TILE_HEIGHT - 1) / TILE_HEIGHT;
}

ASAG_HD inline int tiles_across(const AsagPreprocess& arguments) {
    return (arguments.batch_width + TILE_WIDTH - 1) / TILE_WIDTH;
}

// The tile `down` rows and `across` columns of tiles from the first.
template <class Block>
ASAG_HD void preprocess_block(
    const Block& block, const AsagPreprocess& arguments, const ResizePlan& plan, int down, int across,
    PreprocessShared& shared) {
    const int top = down * TILE_HEIGHT, left = across * TILE_WIDTH;
    const int new_height = arguments.new_height, new_width = arguments.new_width;
    block.each([&](int thread) {
        for (int i = thread; i < TILE_WIDTH + TILE_HEIGHT; i += block.threads()) {
            const int x = left + i, y = top + i - TILE_WIDTH;
            if (i < TILE_WIDTH && x < new_width) {
                set_axis(shared.columns[i], plan.kind, x, arguments.width, plan.across, true);
            } else if (i >= TILE_WIDTH && y < new_height) {
                set_axis(shared.rows[i - TILE_WIDTH], plan.kind, y, arguments.height, plan.down, false);
            }
        }
    });
    block.each([&](int thread) {
        for (int i = thread; i < PREPROCESS_THREADS; i += block.threads()) {
            const int row = i / TILE_WIDTH, column = i % TILE_WIDTH;
            const int y = top + row, x = left + column;
            if (y >= arguments.batch_height || x >= arguments.batch_width) continue;
            const bool inside = y < new_height && x < new_width;
            uint8_t rgb[3] = {0, 0, 0};
            if (inside) resized_pixel(arguments, plan, y, x, shared.rows[row], shared.columns[column], rgb);
            store_pixel(arguments, y, x, rgb, inside);
        }
    });
}

}  // namespace asag
