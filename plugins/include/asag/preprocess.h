// An RGB image becomes a slot of the network's input batch: resized, padded right and bottom, and normalised if asked.
//
// Resizing is OpenCV's to the bit, as asag_deploy.preprocess does it on the CPU: INTER_LINEAR in fixed point where the
// image grows, INTER_AREA where it shrinks, a copy where it stays.  A thread computes one pixel of the slot.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/platform.h"

namespace asag {

constexpr int PREPROCESS_THREADS = 256;
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

// Source pixels per pixel of the result, along one axis.
ASAG_HD inline double resize_scale(int from, int to) {
    return divide(1.0, divide(static_cast<double>(to), static_cast<double>(from)));
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
    const uint8_t* image, int64_t pitch, int y, int x, int height, int width, int channel) {
    int sum = 0;
    for (int i = 0; i < height; ++i) {
        const uint8_t* row = image + (static_cast<int64_t>(y) * height + i) * pitch + channel;
        for (int j = 0; j < width; ++j) sum += row[3 * (x * width + j)];
    }
    if (height == 2 && width == 2) return static_cast<uint8_t>((sum + 2) >> 2);
    return to_byte(nearest(mul(static_cast<float>(sum), divide(1.0f, static_cast<float>(height * width)))));
}

// The channels come in the order that the image has.
ASAG_HD inline void resized_pixel(const AsagPreprocess& arguments, int y, int x, uint8_t rgb[3]) {
    const int height = arguments.height, width = arguments.width;
    const int new_height = arguments.new_height, new_width = arguments.new_width;
    const int64_t pitch = static_cast<int64_t>(width) * 3;
    if (new_height == height && new_width == width) {
        for (int i = 0; i < 3; ++i) rgb[i] = arguments.image[y * pitch + 3 * x + i];
    } else if (static_cast<int64_t>(new_height) * new_width >= static_cast<int64_t>(height) * width) {
        const LinearAxis row = linear_axis(y, height, resize_scale(height, new_height), false);
        const LinearAxis column = linear_axis(x, width, resize_scale(width, new_width), true);
        for (int i = 0; i < 3; ++i) rgb[i] = linear_pixel(arguments.image, pitch, row, column, i);
    } else {
        const double down = resize_scale(height, new_height), across = resize_scale(width, new_width);
        const int of_height = static_cast<int>(down), of_width = static_cast<int>(across);
        // OpenCV decides by the rounded scales, not by whether the sides divide each other.
        if (down == static_cast<double>(of_height) && across == static_cast<double>(of_width)) {
            for (int i = 0; i < 3; ++i) rgb[i] = block_pixel(arguments.image, pitch, y, x, of_height, of_width, i);
            return;
        }
        const AreaAxis row = area_axis(y, height, down), column = area_axis(x, width, across);
        for (int i = 0; i < 3; ++i) rgb[i] = area_pixel(arguments.image, pitch, row, column, i);
    }
}

// Pixel `index` of the slot's batch_height * batch_width.  Bytes lie (H, W, 3), zero where the image is not; normalised
// values lie (3, H, W), zero there too.
ASAG_HD inline void preprocess_pixel(const AsagPreprocess& arguments, int64_t index) {
    const int y = static_cast<int>(index / arguments.batch_width), x = static_cast<int>(index % arguments.batch_width);
    const bool inside = y < arguments.new_height && x < arguments.new_width;
    uint8_t rgb[3] = {0, 0, 0};
    if (inside) resized_pixel(arguments, y, x, rgb);
    if (arguments.bgr != 0) {
        const uint8_t blue = rgb[0];
        rgb[0] = rgb[2];
        rgb[2] = blue;
    }
    const int64_t plane = static_cast<int64_t>(arguments.batch_height) * arguments.batch_width;
    for (int i = 0; i < 3; ++i) {
        if (arguments.type == ASAG_UINT8) {
            static_cast<uint8_t*>(arguments.out)[3 * index + i] = rgb[i];
            continue;
        }
        const float centred = sub(static_cast<float>(rgb[i]), arguments.mean[i]);
        const float value = inside ? divide(centred, arguments.deviation[i]) : 0.0f;
        if (arguments.type == ASAG_FLOAT16) {
            static_cast<Half*>(arguments.out)[i * plane + index] = from_float<Half>(value);
        } else {
            static_cast<float*>(arguments.out)[i * plane + index] = value;
        }
    }
}

ASAG_HD inline int64_t preprocess_pixels(const AsagPreprocess& arguments) {
    return static_cast<int64_t>(arguments.batch_height) * arguments.batch_width;
}

}  // namespace asag
