// Adaptive mixing in bfloat16 by the matrix unit of x86 processors (AMX).
//
// Its registers are tiles of 16 rows of 64 bytes: of a first factor 16 rows of 32 numbers, of a second 32 rows of 16,
// two by two side by side, of a result 16 rows of 16 float32.  What fills no tile is padded with zeros.  The result of
// the first product is rounded to bfloat16 once it is normalised and activated; sums are float32.

#include "cpu.h"

#if defined(ASAG_X86) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define ASAG_TILES 1
#define ASAG_VECTOR_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#endif

#include "mixing.h"

#ifdef ASAG_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace asag {
namespace {

// A bfloat16 that the processor itself makes: as `BFloat16`, but for what is smaller than 1e-38, which becomes 0.
struct NativeBFloat16 {
    uint16_t bits;
};

template <int LANES>
ASAG_VECTOR void store(NativeBFloat16* into, const Floats<LANES>& from) {
    const __m256bh halves = _mm512_cvtneps_pbh(__m512(from));
    std::memcpy(into, &halves, sizeof halves);
}

constexpr int ROWS = 16;   // of a tile
constexpr int DEPTH = 32;  // of a product of two tiles
constexpr int AT_A_TIME = 4;  // tiles of a result beside each other

int padded(int size, int unit) { return (size + unit - 1) / unit * unit; }

// Where in the memory of a thread what is, in float32; two bfloat16 take as much.
struct Layout {
    int points, out_points;          // rows of a first factor
    int channel_depth, point_depth;  // depths of the two products
    int stride;                      // of rows of channels
    size_t sampled, channel_mix, mixed, narrow, narrow_pairs, point_mix, result, end;

    explicit Layout(const AsagAdaptiveMixing& a) {
        points = padded(a.points, ROWS);
        out_points = padded(a.out_points, ROWS);
        channel_depth = padded(a.channels, DEPTH);
        point_depth = padded(a.points, DEPTH);
        stride = padded(a.channels, ROWS);
        size_t at = 0;
        const auto place = [&at](int rows, int columns) {
            const size_t here = at;
            at += static_cast<size_t>(rows) * static_cast<size_t>(columns);
            return here;
        };
        sampled = place(points, channel_depth / 2);
        channel_mix = place(channel_depth / 2, stride);
        mixed = place(points, stride);
        narrow = place(points, stride / 2);
        narrow_pairs = place(point_depth / 2, stride);
        point_mix = place(out_points, point_depth / 2);
        result = place(out_points, stride);
        end = at;
    }
};

// The sizes of a product, all padded: `rows` x `depth` by `depth` x `stride`.
struct Product {
    int rows;
    int depth;
    int stride;
};

// The second factor holds the numbers of two rows side by side.
ASAG_VECTOR_TARGET void multiply(float* out, const float* first, const float* second, const Product& sizes) {
    const int stride = sizes.stride;
    for (int row = 0; row < sizes.rows; row += ROWS) {
        for (int column = 0; column < stride; column += AT_A_TIME * ROWS) {
            const int count = std::min(AT_A_TIME, (stride - column) / ROWS);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < sizes.depth; k += DEPTH) {
                const float* other = second + k / 2 * stride + column;
                _tile_loadd(4, first + (row * sizes.depth + k) / 2, sizes.depth * 2);
                _tile_loadd(5, other, stride * 4);
                _tile_dpbf16ps(0, 4, 5);
                if (count > 1) {
                    _tile_loadd(6, other + ROWS, stride * 4);
                    _tile_dpbf16ps(1, 4, 6);
                }
                if (count > 2) {
                    _tile_loadd(7, other + 2 * ROWS, stride * 4);
                    _tile_dpbf16ps(2, 4, 7);
                }
                if (count > 3) {
                    _tile_loadd(5, other + 3 * ROWS, stride * 4);
                    _tile_dpbf16ps(3, 4, 5);
                }
            }
            float* into = out + row * stride + column;
            _tile_stored(0, into, stride * 4);
            if (count > 1) _tile_stored(1, into + ROWS, stride * 4);
            if (count > 2) _tile_stored(2, into + 2 * ROWS, stride * 4);
            if (count > 3) _tile_stored(3, into + 3 * ROWS, stride * 4);
        }
    }
}

// Copies rows, which become `stride` numbers long.
ASAG_VECTOR void copy_rows(float* into, int stride, const BFloat16* from, int rows, int columns) {
    char* to = reinterpret_cast<char*>(into);
    const size_t size = static_cast<size_t>(columns) * sizeof(BFloat16);
    for (int row = 0; row < rows; ++row) {
        std::memcpy(to + row * stride * 2, from + row * columns, size);
    }
}

// Puts the numbers of two rows side by side; rows are `from_stride` and become `stride` pairs long.
template <class In>
ASAG_VECTOR void pair_rows(float* into, int stride, const In* from, int from_stride, int rows, int columns) {
    for (int row = 0; row < rows; row += 2) {
        const In* first = from + row * from_stride;
        const In* second = row + 1 < rows ? first + from_stride : nullptr;
        float* to = into + row / 2 * stride;
        for (int i = 0; i < columns; ++i) {
            const uint32_t upper = second == nullptr ? 0 : second[i].bits;
            const uint32_t pair = first[i].bits | upper << 16;
            std::memcpy(to + i, &pair, sizeof pair);
        }
    }
}

// What tells the matrix unit how large its tiles are.
struct alignas(64) TileSizes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileSizes() {
        std::fill(row_bytes, row_bytes + 8, static_cast<uint16_t>(64));
        std::fill(rows, rows + 8, static_cast<uint8_t>(ROWS));
    }
};

ASAG_VECTOR_TARGET void mix_by_tiles(
    const AsagAdaptiveMixing& a, int out_type, float* memory, int64_t begin, int64_t end) {
    constexpr int LANES = MOST_LANES;
    const TileSizes tiles;
    _tile_loadconfig(&tiles);
    const Layout at(a);
    const int64_t over_channels = int64_t{a.channels} * a.channels;
    const int64_t parameters = over_channels + int64_t{a.out_points} * a.points;
    for (int64_t set = begin; set < end; ++set) {
        const BFloat16* sampled = static_cast<const BFloat16*>(a.sampled) + set * a.points * a.channels;
        const BFloat16* matrices = static_cast<const BFloat16*>(a.parameters) + set * parameters;
        copy_rows(memory + at.sampled, at.channel_depth, sampled, a.points, a.channels);
        pair_rows(memory + at.channel_mix, at.stride, matrices, a.channels, a.channels, a.channels);
        copy_rows(memory + at.point_mix, at.point_depth, matrices + over_channels, a.out_points, a.points);

        float* mixed = memory + at.mixed;
        multiply(mixed, memory + at.sampled, memory + at.channel_mix, {at.points, at.channel_depth, at.stride});
        const Rows of_channels = Rows{mixed, a.points, a.channels, at.stride}.joined();
        NativeBFloat16* narrow = reinterpret_cast<NativeBFloat16*>(memory + at.narrow);
        normalise<LANES>(narrow, of_channels.stride, of_channels, a.activation);
        pair_rows(memory + at.narrow_pairs, at.stride, narrow, at.stride, a.points, a.channels);

        float* result = memory + at.result;
        multiply(result, memory + at.point_mix, memory + at.narrow_pairs, {at.out_points, at.point_depth, at.stride});
        const Rows of_points = Rows{result, a.out_points, a.channels, at.stride}.joined();
        const int64_t first = set * a.out_points * a.channels;
        if (out_type == ASAG_BFLOAT16) {
            normalise<LANES>(static_cast<NativeBFloat16*>(a.out) + first, of_points.columns, of_points, a.activation);
        } else {
            normalise<LANES>(static_cast<float*>(a.out) + first, of_points.columns, of_points, a.activation);
        }
    }
    _tile_release();
}

// Linux lets a process use tiles once it has asked, for they make a thread's state larger.
bool may_use_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    static const bool may = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                            __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return may;
}

}  // namespace

Mixer mixer_by_tiles(const AsagAdaptiveMixing& arguments) {
    return {may_use_tiles() ? mix_by_tiles : nullptr, Layout(arguments).end};
}

}  // namespace asag

#else

asag::Mixer asag::mixer_by_tiles(const AsagAdaptiveMixing&) { return {nullptr, 0}; }

#endif
