// asag_cpu_*: the operators of the decoder, made for speed on a CPU.
//
// Where they look and with which weights is computed by the same functions as on a GPU; only the loops differ: the
// channels of a tap are the innermost one, which compilers turn into vector instructions, and queries are divided
// among threads.  Features are read in the type they have; sums are float32.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "asag/multiscale_roi_align.h"
#include "asag/pyramid_sample.h"
#include "checks.h"
#include "cpu.h"

// One version of a function for each generation of vector instructions, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define ASAG_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ASAG_VECTORISED
#endif

namespace {

using namespace asag;

constexpr int TILE = 512;  // channels that are summed up at a time

template <class In>
ASAG_INLINE void add_tap(float* sum, const In* tap, float weight, int count) {
    for (int k = 0; k < count; ++k) sum[k] += weight * widened(tap[k]);
}

template <class Out>
ASAG_INLINE void write(Out* out, const float* sum, int count) {
    for (int k = 0; k < count; ++k) narrow(sum[k], out[k]);
}

// One box, which is looked for on a map of the type In, whose values are multiplied by `scale`.
template <class In, class Out>
ASAG_INLINE void roi_align_box(const AsagMultiscaleRoIAlign& arguments, int64_t query, int level, float scale) {
    const AsagPyramid& features = arguments.features;
    const int channels = features.channels;
    const int64_t image = query / arguments.queries;
    const float* box = arguments.boxes + query * 4;
    const int stride = features.strides[level];
    const int height = features.heights[level], width = features.widths[level];
    const float of_sample = scale / (ROI_SAMPLES * ROI_SAMPLES);
    RoiAxis columns[ROI_BINS];
    for (int i = 0; i < ROI_BINS; ++i) columns[i] = roi_axis(box[0], box[2], stride, width, i);
    const In* map = static_cast<const In*>(features.maps[level]) + image * height * width * channels;
    Out* out = static_cast<Out*>(arguments.out) + query * ROI_BINS * ROI_BINS * channels;
    for (int bin = 0; bin < ROI_BINS * ROI_BINS; ++bin) {
        const RoiAxis row = roi_axis(box[1], box[3], stride, height, bin / ROI_BINS);
        const RoiAxis& column = columns[bin % ROI_BINS];
        for (int first = 0; first < channels; first += TILE) {
            const int count = smaller(TILE, channels - first);
            float sum[TILE];
            std::fill(sum, sum + count, 0.0f);
            for (int i = 0; i < ROI_TAPS; ++i) {
                const In* cells = map + static_cast<int64_t>(row.cell[i]) * width * channels + first;
                const float of_row = row.weight[i] * of_sample;
                for (int j = 0; j < ROI_TAPS; ++j) {
                    const float weight = of_row * column.weight[j];
                    if (weight == 0.0f) continue;  // of a sample outside; what is there need not be read
                    add_tap(sum, cells + static_cast<int64_t>(column.cell[j]) * channels, weight, count);
                }
            }
            write(out + bin * channels + first, sum, count);
        }
    }
}

// The queries `begin` to `end` of all images.
template <class In, class Out>
ASAG_INLINE void roi_align(
    const AsagMultiscaleRoIAlign& arguments, const float* scales, int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
        const int level = roi_level(arguments.features, arguments.boxes + query * 4);
        const float scale = scales[level];
        if (scale == 0.0f) {
            roi_align_box<In, Out>(arguments, query, level, 1.0f);
        } else {
            roi_align_box<int8_t, Out>(arguments, query, level, scale);
        }
    }
}

// Asks for `bytes` from an address on to be brought into the cache.
ASAG_INLINE void prefetch(const void* address, int64_t bytes) {
    constexpr int64_t LINE = 64;
    const char* at = static_cast<const char*>(address);
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(at + i);
}

// A map as the points of one group see it: where their channels of its first cell are, and what a value stands for.
struct GroupMap {
    const char* first;
    int64_t cell_bytes;
    float scale;  // of int8; 0 for a map of floats
};

template <class In>
ASAG_INLINE GroupMap group_map(
    const AsagPyramidSample& arguments, int64_t set, int level, float scale) {
    const AsagPyramid& features = arguments.features;
    const int64_t image = set / arguments.groups / arguments.queries;
    const int64_t of_group = features.channels / arguments.groups;
    const int64_t cells = static_cast<int64_t>(features.heights[level]) * features.widths[level];
    const int64_t size = scale == 0.0f ? sizeof(In) : sizeof(int8_t);
    const int64_t first = image * cells * features.channels + (set % arguments.groups) * of_group;
    return {static_cast<const char*>(features.maps[level]) + first * size, features.channels * size, scale};
}

// The queries `begin` to `end` of all images.  Points lie anywhere, so that their taps come from memory: those of a
// whole tile are asked for before the first is used.
template <class In, class Out>
ASAG_INLINE void pyramid_sample(
    const AsagPyramidSample& arguments, const float* scales, int64_t begin, int64_t end) {
    const AsagPyramid& features = arguments.features;
    const int groups = arguments.groups, levels = features.levels;
    const int of_group = features.channels / groups;
    SampleTaps taps[SAMPLE_TILE][ASAG_MAX_LEVELS];
    GroupMap maps[ASAG_MAX_LEVELS];
    for (int64_t set = begin * groups; set < end * groups; ++set) {  // the points of one query and group
        for (int level = 0; level < levels; ++level) maps[level] = group_map<In>(arguments, set, level, scales[level]);
        for (int tile = 0; tile < arguments.points; tile += SAMPLE_TILE) {
            const int count = smaller(SAMPLE_TILE, arguments.points - tile);
            const int64_t first_point = set * arguments.points + tile;
            for (int i = 0; i < count; ++i) {
                const float* at = arguments.xy + (first_point + i) * 2;
                for (int level = 0; level < levels; ++level) {
                    taps[i][level] = sample_taps(
                        at[0], at[1], arguments.weight[(first_point + i) * levels + level], features.strides[level],
                        features.heights[level], features.widths[level]);
                    const GroupMap& map = maps[level];
                    for (int corner = 0; corner < 4; ++corner) {
                        const int64_t cell = taps[i][level].cell[corner];
                        prefetch(map.first + cell * map.cell_bytes, map.cell_bytes / groups);
                    }
                }
            }
            for (int i = 0; i < count; ++i) {
                Out* out = static_cast<Out*>(arguments.out) + (first_point + i) * of_group;
                for (int first = 0; first < of_group; first += TILE) {
                    const int width = smaller(TILE, of_group - first);
                    float sum[TILE];
                    std::fill(sum, sum + width, 0.0f);
                    for (int level = 0; level < levels; ++level) {
                        const GroupMap& map = maps[level];
                        for (int corner = 0; corner < 4; ++corner) {
                            const float weight = taps[i][level].weight[corner];
                            if (weight == 0.0f) continue;
                            const char* cell = map.first + taps[i][level].cell[corner] * map.cell_bytes;
                            if (map.scale == 0.0f) {
                                add_tap(sum, reinterpret_cast<const In*>(cell) + first, weight, width);
                            } else {
                                add_tap(
                                    sum, reinterpret_cast<const int8_t*>(cell) + first, weight * map.scale, width);
                            }
                        }
                    }
                    write(out + first, sum, width);
                }
            }
        }
    }
}

// One function for each pair of types, since a template cannot be compiled for several processors.
#define ASAG_RANGES(NAME, IN, OUT)                                                                        \
    ASAG_VECTORISED void roi_align_##NAME(                                                                \
        const AsagMultiscaleRoIAlign& arguments, const float* scales, int64_t begin, int64_t end) {       \
        roi_align<IN, OUT>(arguments, scales, begin, end);                                                \
    }                                                                                                     \
    ASAG_VECTORISED void pyramid_sample_##NAME(                                                           \
        const AsagPyramidSample& arguments, const float* scales, int64_t begin, int64_t end) {            \
        pyramid_sample<IN, OUT>(arguments, scales, begin, end);                                           \
    }

ASAG_RANGES(float_float, float, float)
ASAG_RANGES(float_bfloat, float, BFloat16)
ASAG_RANGES(half_float, Half, float)
ASAG_RANGES(half_half, Half, Half)
ASAG_RANGES(bfloat_float, BFloat16, float)
ASAG_RANGES(bfloat_bfloat, BFloat16, BFloat16)

template <class Arguments>
using Range = void (*)(const Arguments&, const float* scales, int64_t, int64_t);

#define ASAG_CHOOSE(OPERATOR)                                                                 \
    if (in == ASAG_FLOAT32 && out == ASAG_FLOAT32) return OPERATOR##_float_float;             \
    if (in == ASAG_FLOAT32 && out == ASAG_BFLOAT16) return OPERATOR##_float_bfloat;           \
    if (in == ASAG_FLOAT16 && out == ASAG_FLOAT32) return OPERATOR##_half_float;              \
    if (in == ASAG_FLOAT16 && out == ASAG_FLOAT16) return OPERATOR##_half_half;               \
    if (in == ASAG_BFLOAT16 && out == ASAG_FLOAT32) return OPERATOR##_bfloat_float;           \
    if (in == ASAG_BFLOAT16 && out == ASAG_BFLOAT16) return OPERATOR##_bfloat_bfloat;         \
    return nullptr;

Range<AsagMultiscaleRoIAlign> range_of(const AsagMultiscaleRoIAlign&, int32_t in, int32_t out) {
    ASAG_CHOOSE(roi_align)
}

Range<AsagPyramidSample> range_of(const AsagPyramidSample&, int32_t in, int32_t out) {
    ASAG_CHOOSE(pyramid_sample)
}

// Whether the arguments make sense, for features that may be bfloat16 as well, which is as large as float16.
template <class Arguments>
int check_pyramid(const Arguments* arguments) {
    if (arguments == nullptr || arguments->features.type != ASAG_BFLOAT16) return asag::check(arguments);
    Arguments other = *arguments;
    other.features.type = ASAG_FLOAT16;
    return asag::check(&other);
}

template <class Arguments>
int run(const Arguments* arguments, const AsagCpu* how) {
    int status = check(how);
    if (status == ASAG_OK) status = check_pyramid(arguments);
    if (status != ASAG_OK) return status;
    const Range<Arguments> range = range_of(*arguments, arguments->features.type, how->out_type);
    if (range == nullptr) {
        return problem(
            ASAG_BAD_TYPE, "features of type %d and a result of type %d do not go together; expected a result of the "
            "same type, or float32, or bfloat16 of float32", arguments->features.type, how->out_type);
    }
    const int64_t queries = static_cast<int64_t>(arguments->features.batch) * arguments->queries;
    try {
        in_parallel(queries, how->threads, [&](int64_t begin, int64_t end) {
            range(*arguments, how->scales, begin, end);
        });
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left for the threads");
    }
    return ASAG_OK;
}

void top_k(const float* values, int64_t k, float* largest, int64_t* indices, std::vector<int64_t>& order) {
    const auto key = [values](int64_t i) { return std::isnan(values[i]) ? -INFINITY : values[i]; };
    const auto before = [&](int64_t a, int64_t b) { return key(a) != key(b) ? key(a) > key(b) : a < b; };
    std::iota(order.begin(), order.end(), int64_t{0});
    std::nth_element(order.begin(), order.begin() + k, order.end(), before);
    std::sort(order.begin(), order.begin() + k, before);
    for (int64_t i = 0; i < k; ++i) {
        indices[i] = order[static_cast<size_t>(i)];
        largest[i] = values[indices[i]];
    }
}

}  // namespace

int asag_cpu_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, const AsagCpu* how) {
    return run(arguments, how);
}

int asag_cpu_pyramid_sample(const AsagPyramidSample* arguments, const AsagCpu* how) { return run(arguments, how); }

// It takes so little that threads would only cost: the steps of the GPU, one after the other.
int asag_cpu_pad_anchors(const AsagPadAnchors* arguments, const AsagCpu* how) {
    const int status = check(how);
    if (status != ASAG_OK) return status;
    const AsagHostBlock block{1, 0};
    return asag_host_pad_anchors(arguments, &block);
}

int asag_cpu_top_k(const AsagTopK* arguments, const AsagCpu* how) {
    const int status = check(how);
    if (status != ASAG_OK) return status;
    if (arguments == nullptr) return problem(ASAG_NULL_POINTER, "arguments is a null pointer");
    const AsagTopK& a = *arguments;
    if (a.rows < 0 || a.count < 0 || a.k < 0 || a.k > a.count) {
        return problem(
            ASAG_OUT_OF_RANGE, "k is %lld of %lld values in %lld rows, expected at most the values",
            static_cast<long long>(a.k), static_cast<long long>(a.count), static_cast<long long>(a.rows));
    }
    if (a.rows == 0 || a.k == 0) return ASAG_OK;
    if (a.values == nullptr || a.largest == nullptr || a.indices == nullptr) {
        return problem(ASAG_NULL_POINTER, "values, largest or indices is a null pointer");
    }
    try {
        std::vector<int64_t> order(static_cast<size_t>(a.count));
        for (int64_t row = 0; row < a.rows; ++row) {
            top_k(a.values + row * a.count, a.k, a.largest + row * a.k, a.indices + row * a.k, order);
        }
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left to sort %lld values", static_cast<long long>(a.count));
    }
    return ASAG_OK;
}
