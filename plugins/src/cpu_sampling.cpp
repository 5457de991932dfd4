// asag_cpu_multiscale_roi_align, asag_cpu_pyramid_sample and asag_cpu_deformable_sample: weighted sums of the cells of
// feature maps.
//
// Where they look and with which weights is what it is on a GPU, to the last bit; only the loops differ.  The sums of a
// block of channels stay in registers while all its cells are added, and queries are divided among threads.  Features
// are read in the type they have; sums are float32.

#include <new>

#include "asag/deformable_sample.h"
#include "asag/multiscale_roi_align.h"
#include "asag/pyramid_sample.h"
#include "checks.h"
#include "vectors.h"
#include "workers.h"

namespace {

using namespace asag;

#define ASAG_INLINED __attribute__((always_inline))

constexpr int BLOCK = 8;  // vectors of channels that are summed up at a time

// Adds a cell of a map, from its channel `first` on.
template <int LANES, int WIDTH, class In>
ASAG_INLINE void add(Floats<LANES> (&sums)[WIDTH], const In* cell, float weight, int first) {
#pragma GCC unroll 8  // else the sums lie in memory
    for (int j = 0; j < WIDTH; ++j) {
        Floats<LANES> values;
        load<LANES>(values, cell + first + j * LANES);
        sums[j] += weight * values;
    }
}

template <int LANES, int WIDTH, class Out, class Cells>
ASAG_INLINE void add_up_block(Out* out, const Cells& cells, int first) {
    Floats<LANES> sums[WIDTH] = {};
    cells.each([&](const auto* cell, float weight) ASAG_INLINED { add<LANES, WIDTH>(sums, cell, weight, first); });
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; ++j) store<LANES>(out + first + j * LANES, sums[j]);
}

// The sums of all `cells`, for each of `channels`.
template <int LANES, class Out, class Cells>
ASAG_INLINE void add_up(Out* out, const Cells& cells, int channels) {
    int first = 0;
    for (; first + BLOCK * LANES <= channels; first += BLOCK * LANES) {
        add_up_block<LANES, BLOCK>(out, cells, first);
    }
    const int left = (channels - first) / LANES;
    if ((left & 4) != 0) add_up_block<LANES, 4>(out, cells, first);
    first += (left & 4) * LANES;
    if ((left & 2) != 0) add_up_block<LANES, 2>(out, cells, first);
    first += (left & 2) * LANES;
    if ((left & 1) != 0) add_up_block<LANES, 1>(out, cells, first);
    first += (left & 1) * LANES;
    for (; first < channels; ++first) {
        float sum = 0.0f;
        cells.each([&](const auto* cell, float weight) ASAG_INLINED { sum += weight * widened(cell[first]); });
        narrow(sum, out[first]);
    }
}

// One axis of a bin: how many elements of the map lie before each cell, and its weight.
struct BinAxis {
    int64_t before[ROI_TAPS];
    float weight[ROI_TAPS];

    ASAG_INLINE void set(const RoiAxis& axis, int64_t pitch, float scale) {
        for (int i = 0; i < ROI_TAPS; ++i) {
            before[i] = axis.cell[i] * pitch;
            weight[i] = axis.weight[i] * scale;
        }
    }
};

// The cells of a bin.  Those whose weight is 0, as of a sample outside, are left out: what is there need not be read.
template <class In>
struct BinCells {
    const In* map;
    const BinAxis& row;
    const BinAxis& column;

    template <class Add>
    ASAG_INLINE void each(const Add& add) const {
        for (int i = 0; i < ROI_TAPS; ++i) {
            const In* cells = map + row.before[i];
            for (int j = 0; j < ROI_TAPS; ++j) {
                const float weight = row.weight[i] * column.weight[j];
                if (weight != 0.0f) add(cells + column.before[j], weight);
            }
        }
    }
};

// One box, which is looked for on a map of the type In, whose values are multiplied by `scale`.
template <int LANES, class In, class Out>
ASAG_INLINE void roi_align_box(const AsagMultiscaleRoIAlign& arguments, int64_t query, int level, float scale) {
    const AsagPyramid& features = arguments.features;
    const int64_t channels = features.channels;
    const float* box = arguments.boxes + query * 4;
    const int stride = features.strides[level];
    const int height = features.heights[level], width = features.widths[level];
    BinAxis rows[ROI_BINS], columns[ROI_BINS];
    for (int i = 0; i < ROI_BINS; ++i) {
        rows[i].set(roi_axis(box[1], box[3], stride, height, i), width * channels, scale / (ROI_SAMPLES * ROI_SAMPLES));
        columns[i].set(roi_axis(box[0], box[2], stride, width, i), channels, 1.0f);
    }
    const int64_t cells = query / arguments.queries * height * width;  // of the images before
    const In* map = static_cast<const In*>(features.maps[level]) + cells * channels;
    Out* out = static_cast<Out*>(arguments.out) + query * ROI_BINS * ROI_BINS * channels;
    for (const BinAxis& row : rows) {
        for (const BinAxis& column : columns) {
            add_up<LANES>(out, BinCells<In>{map, row, column}, features.channels);
            out += channels;
        }
    }
}

// The queries `begin` to `end` of all images; of the type In are maps without a scale.
template <int LANES, class In, class Out>
ASAG_INLINE void roi_align(
    const AsagMultiscaleRoIAlign& arguments, const float* scales, int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
        const int level = roi_level(arguments.features, arguments.boxes + query * 4);
        const float scale = scales[level];
        if (scale == 0.0f) {
            roi_align_box<LANES, In, Out>(arguments, query, level, 1.0f);
        } else {
            roi_align_box<LANES, int8_t, Out>(arguments, query, level, scale);
        }
    }
}

// Asks for `bytes` from an address on to be brought into the cache.
ASAG_INLINE void prefetch(const char* address, int64_t bytes) {
    constexpr int64_t LINE = 64;
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(address + i);
}

// A map as the points of one group see it: where their channels of its first cell are, and what a value stands for.
struct GroupMap {
    const char* first;
    int64_t size;  // of a value
    float scale;  // of int8; 0 for a map of floats
};

template <class In, class Arguments>
ASAG_INLINE GroupMap group_map(const Arguments& arguments, int64_t set, int level, float scale) {
    const AsagPyramid& features = arguments.features;
    const int64_t image = set / arguments.groups / arguments.queries;
    const int64_t of_group = features.channels / arguments.groups;
    const int64_t cells = static_cast<int64_t>(features.heights[level]) * features.widths[level];
    const int64_t size = scale == 0.0f ? sizeof(In) : sizeof(int8_t);
    const int64_t first = image * cells * features.channels + (set % arguments.groups) * of_group;
    return {static_cast<const char*>(features.maps[level]) + first * size, size, scale};
}

// Points of a tile, and their weights on one level.
struct Points {
    float x[SAMPLE_TILE], y[SAMPLE_TILE];
    float weight[ASAG_MAX_LEVELS][SAMPLE_TILE];
};

// As `SampleTaps`, of several points.
template <int COUNT>
struct Taps {
    int32_t cell[4][COUNT];
    float weight[4][COUNT];
};

using TileTaps = Taps<SAMPLE_TILE>;

// The cells before and after LANES positions along one axis, and how much of each a position has.
// Positions far outside, and those that are no numbers, are moved to where there are no cells either.
template <int LANES>
struct SampleAxis {
    Floats<LANES> share[2];
    Ints<LANES> cell[2];  // moved inside the map
    Ints<LANES> moved[2];  // by how much

    // Of positions in cells, where a whole number is the centre of a cell.
    ASAG_INLINE SampleAxis(Floats<LANES> at, const Ints<LANES>& size) {
        const Floats<LANES> before = Floats<LANES>{} - 2.0f, after = __builtin_convertvector(size + 1, Floats<LANES>);
        at = at > before ? at : before;
        at = at < after ? at : after;
        Ints<LANES> first = __builtin_convertvector(at, Ints<LANES>);
        Floats<LANES> floored = __builtin_convertvector(first, Floats<LANES>);
        floored = floored > at ? floored - 1.0f : floored;
        first = __builtin_convertvector(floored, Ints<LANES>);
        share[1] = at - floored;
        share[0] = 1.0f - share[1];
        for (int i = 0; i < 2; ++i) {
            const Ints<LANES> lowest = {}, last = size - 1, own = first + i;
            cell[i] = own > lowest ? own : lowest;
            cell[i] = cell[i] < last ? cell[i] : last;
            moved[i] = cell[i] - own;
        }
    }
};

// The cells of LANES points from `first` on, of which these are the axes.
template <int LANES, int COUNT>
ASAG_INLINE void set_taps(
    Taps<COUNT>& taps, int first, const SampleAxis<LANES>& x, const SampleAxis<LANES>& y, const Ints<LANES>& width,
    const float* weights) {
    Floats<LANES> weight;
    load<LANES>(weight, weights + first);
    for (int corner = 0; corner < 4; ++corner) {
        const int right = corner & 1, below = corner >> 1;
        const Ints<LANES> cell = y.cell[below] * width + x.cell[right];
        Floats<LANES> share = x.share[right] * y.share[below] * weight;
        // One comparison, for GCC takes masks that are combined apart.
        share = (x.moved[right] | y.moved[below]) == 0 ? share : Floats<LANES>{};
        std::memcpy(taps.cell[corner] + first, &cell, sizeof cell);
        store<LANES>(taps.weight[corner] + first, share);
    }
}

// The cells of the first `count` points on a level.
template <int LANES>
ASAG_INLINE void sample_tile(
    TileTaps& taps, const Points& points, const float* weights, int count, int stride, int height, int width) {
    const Ints<LANES> columns = Ints<LANES>{} + width, rows = Ints<LANES>{} + height;
    const float pitch = static_cast<float>(stride);
    for (int first = 0; first < count; first += LANES) {
        Floats<LANES> across, down;
        load<LANES>(across, points.x + first);
        load<LANES>(down, points.y + first);
        const SampleAxis<LANES> x(across / pitch - 0.5f, columns), y(down / pitch - 0.5f, rows);
        set_taps<LANES>(taps, first, x, y, columns, weights);
    }
}

// The cells of a point of a tile, on all levels, without those whose weight is 0.
template <class In>
struct PointCells {
    const GroupMap* maps;
    const TileTaps* taps;
    int levels;
    int64_t channels;
    int point;

    template <class Add>
    ASAG_INLINE void each(const Add& add) const {
        for (int level = 0; level < levels; ++level) {
            const GroupMap& map = maps[level];
            if (map.scale == 0.0f) {
                of_level(taps[level], reinterpret_cast<const In*>(map.first), 1.0f, add);
            } else {
                of_level(taps[level], reinterpret_cast<const int8_t*>(map.first), map.scale, add);
            }
        }
    }

    template <class Value, class Add>
    ASAG_INLINE void of_level(const TileTaps& of, const Value* map, float scale, const Add& add) const {
        for (int corner = 0; corner < 4; ++corner) {
            const float weight = of.weight[corner][point];
            if (weight != 0.0f) add(map + of.cell[corner][point] * channels, weight * scale);
        }
    }
};

// The queries `begin` to `end` of all images.  Points lie anywhere, so that their cells come from memory: those of a
// whole tile are asked for before the first is used.
template <int LANES, class In, class Out>
ASAG_INLINE void pyramid_sample(
    const AsagPyramidSample& arguments, const float* scales, int64_t begin, int64_t end) {
    const AsagPyramid& features = arguments.features;
    const int groups = arguments.groups, levels = features.levels, channels = features.channels;
    const int of_group = channels / groups;
    Points points = {};
    TileTaps taps[ASAG_MAX_LEVELS];
    GroupMap maps[ASAG_MAX_LEVELS];
    for (int64_t set = begin * groups; set < end * groups; ++set) {  // the points of one query and group
        for (int level = 0; level < levels; ++level) maps[level] = group_map<In>(arguments, set, level, scales[level]);
        for (int tile = 0; tile < arguments.points; tile += SAMPLE_TILE) {
            const int count = smaller(SAMPLE_TILE, arguments.points - tile);
            const int64_t first_point = set * arguments.points + tile;
            for (int i = 0; i < count; ++i) {
                points.x[i] = arguments.xy[(first_point + i) * 2];
                points.y[i] = arguments.xy[(first_point + i) * 2 + 1];
                for (int level = 0; level < levels; ++level) {
                    points.weight[level][i] = arguments.weight[(first_point + i) * levels + level];
                }
            }
            for (int level = 0; level < levels; ++level) {
                sample_tile<LANES>(
                    taps[level], points, points.weight[level], count, features.strides[level], features.heights[level],
                    features.widths[level]);
                const GroupMap& map = maps[level];
                for (int i = 0; i < count; ++i) {
                    for (int corner = 0; corner < 4; ++corner) {
                        const int64_t cell = taps[level].cell[corner][i];
                        prefetch(map.first + cell * channels * map.size, of_group * map.size);
                    }
                }
            }
            for (int i = 0; i < count; ++i) {
                Out* out = static_cast<Out*>(arguments.out) + (first_point + i) * of_group;
                add_up<LANES>(out, PointCells<In>{maps, taps, levels, channels, i}, of_group);
            }
        }
    }
}

// The points of a query and group on all levels, and the sizes of the level that each is on.
constexpr int SET = ASAG_MAX_LEVELS * ASAG_MOST_POINTS;
static_assert(SET % MOST_LANES == 0, "vectors of points must not go beyond them");

struct SetPoints {
    float x[SET], y[SET], weight[SET];
    int32_t width[SET], height[SET];

    explicit SetPoints(const AsagDeformableSample& arguments) : x{}, y{}, weight{} {
        const AsagPyramid& features = arguments.features;
        for (int i = 0; i < SET; ++i) width[i] = height[i] = 1;
        for (int i = 0; i < features.levels * arguments.points; ++i) {
            width[i] = features.widths[i / arguments.points];
            height[i] = features.heights[i / arguments.points];
        }
    }
};

template <int LANES>
ASAG_INLINE void sample_set(Taps<SET>& taps, const SetPoints& points, int count) {
    for (int first = 0; first < count; first += LANES) {
        Ints<LANES> columns, rows;
        std::memcpy(&columns, points.width + first, sizeof columns);
        std::memcpy(&rows, points.height + first, sizeof rows);
        Floats<LANES> across, down;
        load<LANES>(across, points.x + first);
        load<LANES>(down, points.y + first);
        const SampleAxis<LANES> x(across * __builtin_convertvector(columns, Floats<LANES>) - 0.5f, columns);
        const SampleAxis<LANES> y(down * __builtin_convertvector(rows, Floats<LANES>) - 0.5f, rows);
        set_taps<LANES>(taps, first, x, y, columns, points.weight);
    }
}

// The cells of a query and group, with those of a point together: so few sums wait for each other.
struct SetCells {
    const GroupMap* maps;
    const Taps<SET>& taps;
    int levels;
    int points;
    int64_t channels;

    // Calls add(cells, weights) with the four of each point.
    template <class In, class Add>
    ASAG_INLINE void each(const Add& add) const {
        for (int level = 0; level < levels; ++level) {
            const GroupMap& map = maps[level];
            if (map.scale == 0.0f) {
                of_level(reinterpret_cast<const In*>(map.first), level * points, 1.0f, add);
            } else {
                of_level(reinterpret_cast<const int8_t*>(map.first), level * points, map.scale, add);
            }
        }
    }

    template <class Value, class Add>
    ASAG_INLINE void of_level(const Value* map, int first, float scale, const Add& add) const {
        for (int i = first; i < first + points; ++i) {
            const Value* cells[4];
            float weights[4];
            for (int corner = 0; corner < 4; ++corner) {
                cells[corner] = map + taps.cell[corner][i] * channels;
                weights[corner] = taps.weight[corner][i] * scale;
            }
            add(cells, weights);
        }
    }
};

// The sums of WIDTH vectors of channels, from `first` on.
template <int LANES, int WIDTH, class In, class Out>
ASAG_INLINE void add_up_points(Out* out, const SetCells& cells, int first) {
    Floats<LANES> sums[WIDTH] = {};
    cells.each<In>([&](const auto* const(&cell)[4], const float(&weight)[4]) ASAG_INLINED {
#pragma GCC unroll 8
        for (int j = 0; j < WIDTH; ++j) {
            Floats<LANES> values[4];
            for (int corner = 0; corner < 4; ++corner) load<LANES>(values[corner], cell[corner] + first + j * LANES);
            sums[j] += (weight[0] * values[0] + weight[1] * values[1]) + (weight[2] * values[2] + weight[3] * values[3]);
        }
    });
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; ++j) store<LANES>(out + first + j * LANES, sums[j]);
}

// The queries `begin` to `end` of all images.
template <int LANES, class In, class Out>
ASAG_INLINE void deformable_sample(
    const AsagDeformableSample& arguments, const float* scales, int64_t begin, int64_t end) {
    const AsagPyramid& features = arguments.features;
    const int groups = arguments.groups, levels = features.levels, channels = features.channels / groups;
    const int count = levels * arguments.points;
    SetPoints points(arguments);
    Taps<SET> taps;
    GroupMap maps[ASAG_MAX_LEVELS];
    const SetCells cells{maps, taps, levels, arguments.points, features.channels};
    for (int64_t set = begin * groups; set < end * groups; ++set) {
        for (int level = 0; level < levels; ++level) maps[level] = group_map<In>(arguments, set, level, scales[level]);
        for (int i = 0; i < count; ++i) {
            points.x[i] = arguments.xy[(set * count + i) * 2];
            points.y[i] = arguments.xy[(set * count + i) * 2 + 1];
            points.weight[i] = arguments.weight[set * count + i];
        }
        sample_set<LANES>(taps, points, count);
        Out* out = static_cast<Out*>(arguments.out) + set * channels;
        int first = 0;
        for (; first + 4 * LANES <= channels; first += 4 * LANES) add_up_points<LANES, 4, In>(out, cells, first);
        for (; first + 2 * LANES <= channels; first += 2 * LANES) add_up_points<LANES, 2, In>(out, cells, first);
        for (; first + LANES <= channels; first += LANES) add_up_points<LANES, 1, In>(out, cells, first);
        for (; first < channels; ++first) {
            float sum = 0.0f;
            cells.each<In>([&](const auto* const(&cell)[4], const float(&weight)[4]) ASAG_INLINED {
                for (int corner = 0; corner < 4; ++corner) sum += weight[corner] * widened(cell[corner][first]);
            });
            narrow(sum, out[first]);
        }
    }
}

template <class Arguments>
using Range = void (*)(const Arguments&, const float* scales, int64_t, int64_t);

// One function for each pair of types and length of vectors, since a template cannot be compiled for a processor.
#define ASAG_RANGES_OF(TARGET, LANES, NAME, IN, OUT)                                                      \
    TARGET void roi_align_##NAME##_##LANES(                                                               \
        const AsagMultiscaleRoIAlign& arguments, const float* scales, int64_t begin, int64_t end) {       \
        roi_align<LANES, IN, OUT>(arguments, scales, begin, end);                                         \
    }                                                                                                     \
    TARGET void pyramid_sample_##NAME##_##LANES(                                                          \
        const AsagPyramidSample& arguments, const float* scales, int64_t begin, int64_t end) {            \
        pyramid_sample<LANES, IN, OUT>(arguments, scales, begin, end);                                    \
    }                                                                                                     \
    TARGET void deformable_sample_##NAME##_##LANES(                                                       \
        const AsagDeformableSample& arguments, const float* scales, int64_t begin, int64_t end) {         \
        deformable_sample<LANES, IN, OUT>(arguments, scales, begin, end);                                 \
    }

#ifdef ASAG_X86
#define ASAG_RANGES(NAME, IN, OUT)                  \
    ASAG_RANGES_OF(ASAG_AVX512, 16, NAME, IN, OUT)  \
    ASAG_RANGES_OF(ASAG_AVX2, 8, NAME, IN, OUT)     \
    ASAG_RANGES_OF(, 4, NAME, IN, OUT)
#define ASAG_RANGE(NAME) (lanes == 16 ? NAME##_16 : lanes == 8 ? NAME##_8 : NAME##_4)
#else
#define ASAG_RANGES(NAME, IN, OUT) ASAG_RANGES_OF(, 4, NAME, IN, OUT)
#define ASAG_RANGE(NAME) NAME##_4
#endif

ASAG_RANGES(float_float, float, float)
ASAG_RANGES(float_bfloat, float, BFloat16)
ASAG_RANGES(half_float, Half, float)
ASAG_RANGES(half_half, Half, Half)
ASAG_RANGES(bfloat_float, BFloat16, float)
ASAG_RANGES(bfloat_bfloat, BFloat16, BFloat16)

#define ASAG_CHOOSE(OPERATOR)                                                                         \
    if (in == ASAG_FLOAT32 && out == ASAG_FLOAT32) return ASAG_RANGE(OPERATOR##_float_float);         \
    if (in == ASAG_FLOAT32 && out == ASAG_BFLOAT16) return ASAG_RANGE(OPERATOR##_float_bfloat);       \
    if (in == ASAG_FLOAT16 && out == ASAG_FLOAT32) return ASAG_RANGE(OPERATOR##_half_float);          \
    if (in == ASAG_FLOAT16 && out == ASAG_FLOAT16) return ASAG_RANGE(OPERATOR##_half_half);           \
    if (in == ASAG_BFLOAT16 && out == ASAG_FLOAT32) return ASAG_RANGE(OPERATOR##_bfloat_float);       \
    if (in == ASAG_BFLOAT16 && out == ASAG_BFLOAT16) return ASAG_RANGE(OPERATOR##_bfloat_bfloat);     \
    return nullptr;

Range<AsagMultiscaleRoIAlign> range_of(const AsagMultiscaleRoIAlign&, int32_t in, int32_t out, int lanes) {
    ASAG_CHOOSE(roi_align)
}

Range<AsagPyramidSample> range_of(const AsagPyramidSample&, int32_t in, int32_t out, int lanes) {
    ASAG_CHOOSE(pyramid_sample)
}

Range<AsagDeformableSample> range_of(const AsagDeformableSample&, int32_t in, int32_t out, int lanes) {
    ASAG_CHOOSE(deformable_sample)
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
    const Range<Arguments> range = range_of(*arguments, arguments->features.type, how->out_type, most_lanes());
    if (range == nullptr) {
        return problem(
            ASAG_BAD_TYPE, "features of type %d and a result of type %d do not go together; expected a result of the "
            "same type, or float32, or bfloat16 of float32", arguments->features.type, how->out_type);
    }
    const int64_t queries = static_cast<int64_t>(arguments->features.batch) * arguments->queries;
    try {
        in_parallel(queries, how->threads, [&](int, int64_t begin, int64_t end) {
            range(*arguments, how->scales, begin, end);
        });
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left for the threads");
    }
    return ASAG_OK;
}

}  // namespace

int asag_cpu_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, const AsagCpu* how) {
    return run(arguments, how);
}

int asag_cpu_pyramid_sample(const AsagPyramidSample* arguments, const AsagCpu* how) { return run(arguments, how); }

int asag_cpu_deformable_sample(const AsagDeformableSample* arguments, const AsagCpu* how) {
    return run(arguments, how);
}
