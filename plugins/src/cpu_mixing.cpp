// asag_cpu_adaptive_mixing: two small products with matrices of their own for every query and group of channels.
//
// All of a query and group fits into the cache, so that it goes through the steps alone: numbers become float32, are
// multiplied, normalised and activated, and the result is written once.  Rows are padded to whole vectors.

#include <atomic>
#include <cmath>
#include <new>

#include "checks.h"
#include "cpu.h"

namespace {

using namespace asag;

constexpr int MOST_LANES = 16;
constexpr int ROWS = 4;  // of a product that are summed up at a time
constexpr float EPSILON = 1e-5f;  // of the normalisation, as PyTorch's

// LANES numbers that one instruction works on.
template <int LANES>
struct Lanes {
    typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
    typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    static constexpr int WIDTH = LANES == MOST_LANES ? 4 : 2;  // vectors of a row that are summed up at a time
};

template <int LANES>
using Floats = typename Lanes<LANES>::Floats;

template <int LANES>
ASAG_INLINE void load(Floats<LANES>& into, const float* from) {
    std::memcpy(&into, from, sizeof into);
}

template <int LANES>
ASAG_INLINE void store(float* into, const Floats<LANES>& from) {
    std::memcpy(into, &from, sizeof from);
}

// As `narrow` does one by one.
template <int LANES>
ASAG_INLINE void store(BFloat16* into, const Floats<LANES>& from) {
    typename Lanes<LANES>::Bits bits;
    std::memcpy(&bits, &from, sizeof bits);
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto quiet = (bits >> 16) | 0x40u;
    const auto chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    const auto halves = __builtin_convertvector(chosen, typename Lanes<LANES>::Halves);
    std::memcpy(into, &halves, sizeof halves);
}

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

// Rows of `columns` numbers, each `stride` after the one before.
struct Rows {
    float* values;
    int count;
    int columns;
    int stride;

    // What is not padded is one row.
    Rows joined() const { return stride == columns ? Rows{values, 1, count * columns, count * columns} : *this; }
};

// The sum of (x - centre)^POWER over all numbers.
template <int LANES, int POWER>
ASAG_INLINE float sum_of(const Rows& rows, float centre) {
    constexpr int SUMS = 4;  // at a time, for each waits for the one before
    Floats<LANES> sums[SUMS] = {};
    float rest = 0.0f;
    for (int row = 0; row < rows.count; ++row) {
        const float* values = rows.values + row * rows.stride;
        int i = 0;
        for (; i + SUMS * LANES <= rows.columns; i += SUMS * LANES) {
            for (int j = 0; j < SUMS; ++j) {
                Floats<LANES> x;
                load<LANES>(x, values + i + j * LANES);
                x -= centre;
                sums[j] += POWER == 2 ? x * x : x;
            }
        }
        for (; i < rows.columns; ++i) {
            const float x = values[i] - centre;
            rest += POWER == 2 ? x * x : x;
        }
    }
    float each[LANES];
    store<LANES>(each, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (float sum : each) rest += sum;
    return rest;
}

// What replaces x: x times the normal distribution's integral up to x.  That is 0.5 + y P(t), where y is x within what
// of the integral is not yet 0 or 1 in float32, and t is y^2 moved to -1 to 1.  P was fitted for the least absolute error
// (4e-8); the result is off by at most 8e-7, less than PyTorch's own in float32.  Several vectors go through the steps
// together, since each step waits for the one before.
template <int LANES, int COUNT>
ASAG_INLINE void gelu(Floats<LANES> (&x)[COUNT]) {
    constexpr float END = 5.5f;
    constexpr float P[] = {0.12855193f,    -0.0641724765f,  0.0477369912f, -0.0387872681f,  0.0320817418f,
                           -0.0261124689f, 0.0202879831f,   -0.0146713639f, 0.010468618f,   -0.00767467404f,
                           0.00423638616f, -0.00122939807f, 0.00102383783f, -0.00136883033f, 0.000538080116f};
    constexpr int DEGREE = sizeof P / sizeof P[0] - 1;
    Floats<LANES> y[COUNT], t[COUNT], value[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        y[j] = x[j] < -END ? Floats<LANES>{} - END : x[j];
        y[j] = y[j] > END ? Floats<LANES>{} + END : y[j];
        t[j] = y[j] * y[j] * (2.0f / (END * END)) - 1.0f;
        value[j] = Floats<LANES>{} + P[DEGREE];
    }
    for (int i = DEGREE - 1; i >= 0; --i) {
        for (int j = 0; j < COUNT; ++j) value[j] = value[j] * t[j] + P[i];
    }
    for (int j = 0; j < COUNT; ++j) x[j] *= y[j] * value[j] + 0.5f;
}

template <int LANES, int COUNT>
ASAG_INLINE void activate(Floats<LANES> (&x)[COUNT], int activation) {
    if (activation == ASAG_GELU) {
        gelu<LANES, COUNT>(x);
    } else {
        for (int j = 0; j < COUNT; ++j) x[j] = x[j] < 0.0f ? Floats<LANES>{} : x[j];
    }
}

// How all numbers are normalised, and what follows.
struct Normal {
    float mean;
    float scale;
    int activation;
};

// COUNT vectors of numbers.
template <int LANES, int COUNT, class Out>
ASAG_INLINE void finish(Out* out, const float* values, const Normal& how) {
    Floats<LANES> x[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        load<LANES>(x[j], values + j * LANES);
        x[j] = (x[j] - how.mean) * how.scale;
    }
    activate<LANES, COUNT>(x, how.activation);
    for (int j = 0; j < COUNT; ++j) store<LANES>(out + j * LANES, x[j]);
}

// Normalises all numbers together, and writes what the activation makes of them, in rows of `out_stride`.
template <int LANES, class Out>
ASAG_INLINE void normalise(Out* out, int out_stride, const Rows& rows, int activation) {
    constexpr int WIDTH = Lanes<LANES>::WIDTH;
    const float count = static_cast<float>(rows.count) * static_cast<float>(rows.columns);
    const float mean = sum_of<LANES, 1>(rows, 0.0f) / count;
    const float variance = sum_of<LANES, 2>(rows, mean) / count;
    const Normal how{mean, 1.0f / std::sqrt(variance + EPSILON), activation};
    for (int row = 0; row < rows.count; ++row) {
        const float* values = rows.values + row * rows.stride;
        Out* into = out + row * out_stride;
        int i = 0;
        for (; i + WIDTH * LANES <= rows.columns; i += WIDTH * LANES) finish<LANES, WIDTH>(into + i, values + i, how);
        for (; i + LANES <= rows.columns; i += LANES) finish<LANES, 1>(into + i, values + i, how);
        if (i < rows.columns) {
            const size_t left = static_cast<size_t>(rows.columns - i);
            float rest[LANES] = {};
            Out last[LANES];
            std::memcpy(rest, values + i, left * sizeof(float));
            finish<LANES, 1>(last, rest, how);
            std::memcpy(into + i, last, left * sizeof(Out));
        }
    }
}

// Copies `rows` rows of `columns` numbers that begin at element `first` of `from`, as float32 in rows of `stride`.
template <class In>
ASAG_INLINE void widen(float* into, int stride, const In* from, int rows, int columns) {
    for (int row = 0; row < rows; ++row) {
        for (int i = 0; i < columns; ++i) into[row * stride + i] = widened(from[row * columns + i]);
    }
}

ASAG_INLINE void read(float* into, int stride, const void* from, int64_t first, int type, int rows, int columns) {
    if (type == ASAG_BFLOAT16) {
        widen(into, stride, static_cast<const BFloat16*>(from) + first, rows, columns);
    } else {
        widen(into, stride, static_cast<const float*>(from) + first, rows, columns);
    }
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

// The sets `begin` to `end`, each of one query and group; `memory` holds zeros in what is padding.
template <int LANES>
ASAG_INLINE void mix(const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    const Layout at(a);
    const int64_t parameters = int64_t{a.channels} * a.channels + int64_t{a.out_points} * a.points;
    for (int64_t set = begin; set < end; ++set) {
        read(memory + at.sampled, a.channels, a.sampled, set * a.points * a.channels, a.sampled_type, a.points,
             a.channels);
        read(memory + at.channel_mix, at.stride, a.parameters, set * parameters, a.parameters_type, a.channels,
             a.channels);
        read(memory + at.point_mix, a.points, a.parameters, set * parameters + int64_t{a.channels} * a.channels,
             a.parameters_type, a.out_points, a.points);

        float* mixed = memory + at.mixed;
        multiply<LANES>(mixed, memory + at.sampled, memory + at.channel_mix, {a.points, a.channels, at.stride});
        const Rows of_channels = Rows{mixed, a.points, a.channels, at.stride}.joined();
        normalise<LANES>(mixed, of_channels.stride, of_channels, a.activation);

        float* result = memory + at.result;
        multiply<LANES>(result, memory + at.point_mix, mixed, {a.out_points, a.points, at.stride});
        const Rows of_points = Rows{result, a.out_points, a.channels, at.stride}.joined();
        const int64_t first = set * a.out_points * a.channels;
        if (out_type == ASAG_BFLOAT16) {
            normalise<LANES>(static_cast<BFloat16*>(a.out) + first, of_points.columns, of_points, a.activation);
        } else {
            normalise<LANES>(static_cast<float*>(a.out) + first, of_points.columns, of_points, a.activation);
        }
    }
}

using Mix = void (*)(const AsagAdaptiveMixing&, int, float*, int64_t, int64_t);

void mix_anywhere(const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<4>(a, out_type, memory, begin, end);
}

#if defined(__x86_64__) && defined(__GNUC__)

__attribute__((target("avx2,fma"))) void mix_avx2(
    const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<8>(a, out_type, memory, begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void mix_avx512(
    const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    mix<16>(a, out_type, memory, begin, end);
}

// The version for this processor's vector instructions.
Mix fastest() {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? mix_avx512 : avx2 ? mix_avx2 : mix_anywhere;
}

#else

Mix fastest() { return mix_anywhere; }

#endif

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
        const size_t each = Layout(*arguments).end;
        std::vector<float> memory(parts * each + MOST_LANES);
        constexpr uintptr_t LINE = MOST_LANES * sizeof(float);
        const uintptr_t misplaced = reinterpret_cast<uintptr_t>(memory.data()) % LINE;
        float* aligned = memory.data() + (misplaced == 0 ? 0 : (LINE - misplaced) / sizeof(float));
        const Mix run = fastest();
        std::atomic<size_t> taken{0};
        in_parallel(sets, how->threads, [&](int64_t begin, int64_t end) {
            run(*arguments, how->out_type, aligned + taken++ * each, begin, end);
        });
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left for the threads");
    }
    return ASAG_OK;
}
