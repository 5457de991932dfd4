// What is done to the products of adaptive mixing, by vectors of any length: normalisation and activation.
#pragma once

#include <cmath>
#include <type_traits>

#include "asag/asag_kernels.h"
#include "vectors.h"

namespace asag {
namespace {  // since each file has its own

constexpr float EPSILON = 1e-5f;  // of the normalisation, as PyTorch's

// Rows of `columns` numbers, each `stride` after the one before.
struct Rows {
    float* values;
    int count;
    int columns;
    int stride;

    // What is not padded is one row.
    ASAG_VECTOR Rows joined() const { return stride == columns ? Rows{values, 1, count * columns, count * columns} : *this; }
};

// The sum of (x - centre)^POWER over all numbers.
template <int LANES, int POWER>
ASAG_VECTOR float sum_of(const Rows& rows, float centre) {
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

// The normal distribution's integral up to x is 0.5 + y P(t), where y is x within what of the integral is not yet 0 or 1,
// and t is y^2 moved to -1 to 1.  P was fitted for the least absolute error.
struct Precise {  // GELU is off by at most 8e-7, less than PyTorch's own in float32
    static constexpr float END = 5.5f;
    static constexpr float P[] = {0.12855193f,    -0.0641724765f,  0.0477369912f, -0.0387872681f,  0.0320817418f,
                                  -0.0261124689f, 0.0202879831f,   -0.0146713639f, 0.010468618f,   -0.00767467404f,
                                  0.00423638616f, -0.00122939807f, 0.00102383783f, -0.00136883033f, 0.000538080116f};
};
struct Rounded {  // GELU is off by at most 4e-5, for results in bfloat16
    static constexpr float END = 4.25f;
    static constexpr float P[] = {0.165935382f,   -0.0807615072f, 0.0557009205f,  -0.0393511504f, 0.0255925432f,
                                  -0.0141096348f, 0.00858274102f, -0.00640560454f, 0.00246285996f};
};

// Puts x within -end to end; what is no number stays so.
template <int LANES>
ASAG_VECTOR void clamp(Floats<LANES>& x, float end) {
    x = x < -end ? Floats<LANES>{} - end : x;
    x = x > end ? Floats<LANES>{} + end : x;
}

// What replaces x: x times the integral.  Several vectors go through the steps together, since each step waits for the
// one before.
template <int LANES, int COUNT, class Fit>
ASAG_VECTOR void gelu(Floats<LANES> (&x)[COUNT]) {
    constexpr int DEGREE = sizeof Fit::P / sizeof Fit::P[0] - 1;
    Floats<LANES> y[COUNT], t[COUNT], value[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        y[j] = x[j];
        clamp<LANES>(y[j], Fit::END);
        t[j] = y[j] * y[j] * (2.0f / (Fit::END * Fit::END)) - 1.0f;
        value[j] = Floats<LANES>{} + Fit::P[DEGREE];
    }
    for (int i = DEGREE - 1; i >= 0; --i) {
        for (int j = 0; j < COUNT; ++j) value[j] = value[j] * t[j] + Fit::P[i];
    }
    for (int j = 0; j < COUNT; ++j) x[j] *= y[j] * value[j] + 0.5f;
}

template <int LANES, int COUNT, class Fit>
ASAG_VECTOR void activate(Floats<LANES> (&x)[COUNT], int activation) {
    if (activation == ASAG_GELU) {
        gelu<LANES, COUNT, Fit>(x);
    } else {
        for (int j = 0; j < COUNT; ++j) x[j] = x[j] < 0.0f ? Floats<LANES>{} : x[j];
    }
}

// How all numbers are normalised, x * scale + shift, and what follows.
struct Normal {
    float scale;
    float shift;
    int activation;
};

// COUNT vectors of numbers.
template <int LANES, int COUNT, class Out>
ASAG_VECTOR void finish(Out* out, const float* values, const Normal& how) {
    Floats<LANES> x[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        load<LANES>(x[j], values + j * LANES);
        x[j] = x[j] * how.scale + how.shift;
    }
    using Fit = std::conditional_t<sizeof(Out) < sizeof(float), Rounded, Precise>;
    activate<LANES, COUNT, Fit>(x, how.activation);
    for (int j = 0; j < COUNT; ++j) store<LANES>(out + j * LANES, x[j]);
}

// Normalises all numbers together, and writes what the activation makes of them, in rows of `out_stride`.
template <int LANES, class Out>
ASAG_VECTOR void normalise(Out* out, int out_stride, const Rows& rows, int activation) {
    constexpr int WIDTH = Lanes<LANES>::WIDTH;
    const float count = static_cast<float>(rows.count) * static_cast<float>(rows.columns);
    const float mean = sum_of<LANES, 1>(rows, 0.0f) / count;
    const float variance = sum_of<LANES, 2>(rows, mean) / count;
    const float scale = 1.0f / std::sqrt(variance + EPSILON);
    const Normal how{scale, -mean * scale, activation};
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

}  // namespace

// A way to mix the sets `begin` to `end`, each of one query and group, in the memory of a thread, which holds zeros.
struct Mixer {
    void (*run)(const AsagAdaptiveMixing& arguments, int out_type, float* memory, int64_t begin, int64_t end);
    size_t memory;  // of a thread, in float32
};

// The way by the processor's matrix unit, which multiplies bfloat16; `run` is null where there is none.
Mixer mixer_by_tiles(const AsagAdaptiveMixing& arguments);

}  // namespace asag
