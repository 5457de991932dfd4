// asag_cpu_adaptive_mixing: two small products with matrices of their own for every query and group of channels.
//
// All of a query and group fits into the cache, so that it goes through the steps alone: numbers become float32, are
// multiplied, normalised and activated, and the result is written once.  Rows are padded to whole vectors.

#include <new>
#include <vector>

#include "checks.h"
#include "mixing.h"
#include "workers.h"

namespace {

using namespace asag;

constexpr int ROWS = 4;  // of a product that are summed up at a time

// The sizes of a product: `rows` x `depth` by `depth` x `stride`, of whose second factor and result rows are padded.
struct Product {
    int rows;
    int depth;
    int stride;
};

// A block of `HEIGHT` rows and `WIDTH` vectors, which stay in registers.
template <int LANES, int HEIGHT, int WIDTH>
ASAG_INLINE void multiply_block(float* out, const float* first, const float* second, const Product& sizes) {
    Floats<LANES> sums[HEIGHT][WIDTH] = {};
    for (int k = 0; k < sizes.depth; ++k) {
        Floats<LANES> row[WIDTH];
        for (int j = 0; j < WIDTH; ++j) load<LANES>(row[j], second + k * sizes.stride + j * LANES);
        for (int i = 0; i < HEIGHT; ++i) {
            for (int j = 0; j < WIDTH; ++j) sums[i][j] += first[i * sizes.depth + k] * row[j];
        }
    }
    for (int i = 0; i < HEIGHT; ++i) {
        for (int j = 0; j < WIDTH; ++j) store<LANES>(out + i * sizes.stride + j * LANES, sums[i][j]);
    }
}

template <int LANES, int WIDTH>
ASAG_INLINE void multiply_columns(float* out, const float* first, const float* second, const Product& sizes) {
    int row = 0;
    for (; row + ROWS <= sizes.rows; row += ROWS) {
        multiply_block<LANES, ROWS, WIDTH>(out + row * sizes.stride, first + row * sizes.depth, second, sizes);
    }
    for (; row < sizes.rows; ++row) {
        multiply_block<LANES, 1, WIDTH>(out + row * sizes.stride, first + row * sizes.depth, second, sizes);
    }
}

template <int LANES>
ASAG_INLINE void multiply(float* out, const float* first, const float* second, const Product& sizes) {
    constexpr int WIDTH = Lanes<LANES>::WIDTH;
    int column = 0;
    for (; column + WIDTH * LANES <= sizes.stride; column += WIDTH * LANES) {
        multiply_columns<LANES, WIDTH>(out + column, first, second + column, sizes);
    }
    const int left = (sizes.stride - column) / LANES;
    if (left == 3) multiply_columns<LANES, WIDTH - 1>(out + column, first, second + column, sizes);
    if (left == 2) multiply_columns<LANES, 2>(out + column, first, second + column, sizes);
    if (left == 1) multiply_columns<LANES, 1>(out + column, first, second + column, sizes);
}

// Copies `rows` rows of `columns` numbers that begin at element `first` of `from`, as float32 in rows of `stride`.
template <class In>
ASAG_INLINE void widen(float* into, int stride, const In* from, int rows, int columns) {
    for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < columns; ++i) into[row * stride + i] = widened(from[row * columns + i]);
    }
}

// The same of numbers of a `type`: where they are as float32, which is `from` if they are such, without gaps.
ASAG_INLINE const float* read(
    float* into, int stride, const void* from, int64_t first, int type, int rows, int columns) {
    if (type == ASAG_BFLOAT16) {
        widen(into, stride, static_cast<const BFloat16*>(from) + first, rows, columns);
        return into;
    }
    const float* values = static_cast<const float*>(from) + first;
    if (stride == columns) return values;
    widen(into, stride, values, rows, columns);
    return into;
}

// Where in the memory of a thread what is.
struct Layout {
    int stride;  // of rows of channels
    size_t sampled, channel_mix, point_mix, mixed, result, end;

    explicit Layout(const AsagAdaptiveMixing& a) {
        stride = (a.channels + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
        size_t at = 0;
        const auto place = [&at](int rows, int columns) {
            const size_t here = at;
            const size_t size = static_cast<size_t>(rows) * static_cast<size_t>(columns);
            at += (size + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
            return here;
        };
        sampled = place(a.points, a.channels);
        channel_mix = place(a.channels, stride);
        point_mix = place(a.out_points, a.points);
        mixed = place(a.points, stride);
        result = place(a.out_points, stride);
        end = at;
    }
};

template <int LANES>
ASAG_INLINE void mix(const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    const Layout at(a);
    const int64_t parameters = int64_t{a.channels} * a.channels + int64_t{a.out_points} * a.points;
    for (int64_t set = begin; set < end; ++set) {
        const float* sampled = read(
            memory + at.sampled, a.channels, a.sampled, set * a.points * a.channels, a.sampled_type, a.points,
            a.channels);
        const float* channel_mix = read(
            memory + at.channel_mix, at.stride, a.parameters, set * parameters, a.parameters_type, a.channels,
            a.channels);
        const float* point_mix = read(
            memory + at.point_mix, a.points, a.parameters, set * parameters + int64_t{a.channels} * a.channels,
            a.parameters_type, a.out_points, a.points);

        float* mixed = memory + at.mixed;
        multiply<LANES>(mixed, sampled, channel_mix, {a.points, a.channels, at.stride});
        const Rows of_channels = Rows{mixed, a.points, a.channels, at.stride}.joined();
        normalise<LANES>(mixed, of_channels.stride, of_channels, a.activation);

        float* result = memory + at.result;
        multiply<LANES>(result, point_mix, mixed, {a.out_points, a.points, at.stride});
        const Rows of_points = Rows{result, a.out_points, a.channels, at.stride}.joined();
        const int64_t first = set * a.out_points * a.channels;
        if (out_type == ASAG_BFLOAT16) {
            normalise<LANES>(static_cast<BFloat16*>(a.out) + first, of_points.columns, of_points, a.activation);
        } else {
            normalise<LANES>(static_cast<float*>(a.out) + first, of_points.columns, of_points, a.activation);
        }
    }
}

void mix_anywhere(const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<4>(a, out_type, memory, begin, end);
}

#ifdef ASAG_X86

ASAG_AVX2 void mix_avx2(
    const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<8>(a, out_type, memory, begin, end);
}

ASAG_AVX512 void mix_avx512(
    const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<16>(a, out_type, memory, begin, end);
}

#endif

// The fastest way on this processor.
Mixer mixer_for(const AsagAdaptiveMixing& a) {
    if (a.sampled_type == ASAG_BFLOAT16 && a.parameters_type == ASAG_BFLOAT16) {
        const Mixer mixer = mixer_by_tiles(a);
        if (mixer.run != nullptr) return mixer;
    }
    const size_t memory = Layout(a).end;
#ifdef ASAG_X86
    if (most_lanes() == 16) return {mix_avx512, memory};
    if (most_lanes() == 8) return {mix_avx2, memory};
#endif
    return {mix_anywhere, memory};
}

}  // namespace

int asag_cpu_adaptive_mixing(const AsagAdaptiveMixing* arguments, const AsagCpu* how) {
    int status = check(how);
    if (status == ASAG_OK) status = check(arguments);
    if (status != ASAG_OK) return status;
    if (how->out_type != ASAG_FLOAT32 && how->out_type != ASAG_BFLOAT16) {
        return problem(ASAG_BAD_TYPE, "out_type is %d, expected 0 (float32) or 3 (bfloat16)", how->out_type);
    }
    const int64_t sets = int64_t{arguments->batch} * arguments->queries * arguments->groups;
    if (sets == 0) return ASAG_OK;
    try {
        const size_t parts = static_cast<size_t>(std::min<int64_t>(how->threads, sets));
        const Mixer mixer = mixer_for(*arguments);
        std::vector<float> memory(parts * mixer.memory + MOST_LANES);
        constexpr uintptr_t LINE = MOST_LANES * sizeof(float);
        const uintptr_t misplaced = reinterpret_cast<uintptr_t>(memory.data()) % LINE;
        float* aligned = memory.data() + (misplaced == 0 ? 0 : (LINE - misplaced) / sizeof(float));
        in_parallel(sets, how->threads, [&](int worker, int64_t begin, int64_t end) {
            float* own = aligned + static_cast<size_t>(worker) * mixer.memory;
            mixer.run(*arguments, how->out_type, own, begin, end);
        });
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left for the threads");
    }
    return ASAG_OK;
}
