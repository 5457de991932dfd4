// Counting, compacting and sorting within one block; all stable, and so the same on every run and device.
#pragma once

#include "asag/block.h"

namespace asag {

constexpr int SELECT_THREADS = 512;
constexpr int RADIX = 256;
static_assert(RADIX <= SELECT_THREADS, "bins are counted where threads are");

// Shared memory of everything below.
struct SelectScratch {
    int counts[2][SELECT_THREADS];  // of threads, or of bins
    uint32_t threshold;
    int wanted;
};

// Greater scores have greater keys, equal scores (0 and -0 among them) equal ones.  No score but a negative NaN has the
// key 0, which means: not a candidate.
ASAG_HD inline uint32_t sort_key(float score) {
    const float value = add(score, 0.0f);  // -0 becomes 0
#ifdef __CUDA_ARCH__
    const uint32_t bits = __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
#endif
    return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

// Calls emit(slot, i) for each i of [begin, end) with flag(i), where slot counts 0, 1, ... in the order of i.
// Returns how many there are.
template <class Block, class Flag, class Emit>
ASAG_HD int compact(
    const Block& block, SelectScratch& scratch, int begin, int end, const Flag& flag, const Emit& emit) {
    const int threads = block.threads();
    const int share = (larger(end - begin, 0) + threads - 1) / threads;
    block.each([&](int thread) {
        const int first = begin + thread * share, last = smaller(first + share, end);
        int count = 0;
        ASAG_KEEP_LOOP for (int i = first; i < last; ++i) count += flag(i) ? 1 : 0;
        scratch.counts[0][thread] = count;
    });
    int from = 0;
    ASAG_KEEP_LOOP for (int distance = 1; distance < threads; distance *= 2) {  // inclusive prefix sum
        block.each([&](int thread) {
            const int before = thread >= distance ? scratch.counts[from][thread - distance] : 0;
            scratch.counts[from ^ 1][thread] = scratch.counts[from][thread] + before;
        });
        from ^= 1;
    }
    block.each([&](int thread) {
        const int first = begin + thread * share, last = smaller(first + share, end);
        int slot = thread > 0 ? scratch.counts[from][thread - 1] : 0;
        ASAG_KEEP_LOOP for (int i = first; i < last; ++i) {
            if (flag(i)) emit(slot++, i);
        }
    });
    return block.read(scratch.counts[from][threads - 1]);
}

// How many i of [begin, end) have flag(i).
template <class Block, class Flag>
ASAG_HD int count_if(const Block& block, SelectScratch& scratch, int begin, int end, const Flag& flag) {
    block.each([&](int thread) {
        if (thread == 0) scratch.wanted = 0;
    });
    block.each([&](int thread) {
        ASAG_KEEP_LOOP for (int i = begin + thread; i < end; i += block.threads()) {
            if (flag(i)) atomic_increment(&scratch.wanted);
        }
    });
    return block.read(scratch.wanted);
}

// Where the k greatest of more than k candidates end: all with a key over `key` are among them, and the first `ties`
// of those with that key.
struct Cut {
    uint32_t key;
    int ties;
};

// Radix selection, eight bits of the key at a time from the highest.
template <class Block, class Key>
ASAG_HD Cut find_cut(const Block& block, SelectScratch& scratch, int count, int k, const Key& key) {
    block.each([&](int thread) {
        if (thread == 0) {
            scratch.threshold = 0;
            scratch.wanted = k;
        }
    });
    ASAG_KEEP_LOOP for (int shift = 24; shift >= 0; shift -= 8) {
        const uint32_t prefix = block.read(scratch.threshold);
        const int wanted = block.read(scratch.wanted);
        const uint32_t settled = shift == 24 ? 0u : ~0u << (shift + 8);
        const auto each_bin = [&](const auto& step) {
            block.each([&](int thread) {
                for (int bin = thread; bin < RADIX; bin += block.threads()) step(bin);
            });
        };
        int from = 0;
        each_bin([&](int bin) { scratch.counts[from][bin] = 0; });
        block.each([&](int thread) {
            ASAG_KEEP_LOOP for (int i = thread; i < count; i += block.threads()) {
                const uint32_t value = key(i);
                if (value != 0 && ((value ^ prefix) & settled) == 0) {
                    atomic_increment(&scratch.counts[from][(value >> shift) & (RADIX - 1)]);
                }
            }
        });
        // How many there are from each bin upwards: one thread that went from bin to bin would be waited for by all.
        const auto from_bin = [&](int bin) { return bin < RADIX ? scratch.counts[from][bin] : 0; };
        ASAG_KEEP_LOOP for (int distance = 1; distance < RADIX; distance *= 2) {
            each_bin([&](int bin) { scratch.counts[from ^ 1][bin] = from_bin(bin) + from_bin(bin + distance); });
            from ^= 1;
        }
        each_bin([&](int bin) {
            if (from_bin(bin) < wanted || from_bin(bin + 1) >= wanted) return;
            scratch.threshold = prefix | (static_cast<uint32_t>(bin) << shift);
            scratch.wanted = wanted - from_bin(bin + 1);
        });
    }
    const Cut cut{block.read(scratch.threshold), block.read(scratch.wanted)};
    return cut;
}

// Room for the k best: three arrays of k in shared memory.
struct Best {
    int* index;
    uint32_t* key;
    int* sorted;
};

// The best k of [0, count) by key(i), ties in the order of i; those with key 0 are no candidates.
// Returns how many there are, at most k; best.sorted holds them, best first.  (index and key are free afterwards.)
template <class Block, class Key>
ASAG_HD int top_k(
    const Block& block, SelectScratch& scratch, int count, int k, const Key& key, const Best& best) {
    const auto candidate = [&](int i) { return key(i) != 0; };
    const auto place = [&](int slot, int i) {
        if (slot < k) {
            best.index[slot] = i;
            best.key[slot] = key(i);
        }
    };
    const int candidates = compact(block, scratch, 0, count, candidate, place);
    if (candidates > k) {
        if (k <= 0) return 0;
        const Cut cut = find_cut(block, scratch, count, k, key);
        compact(block, scratch, 0, count, [&](int i) { return key(i) > cut.key; }, place);
        const int over = k - cut.ties;
        compact(
            block, scratch, 0, count, [&](int i) { return key(i) == cut.key; },
            [&](int slot, int i) { place(over + slot, i); });
    }
    const int found = smaller(candidates, k);
    block.each([&](int thread) {
        ASAG_KEEP_LOOP for (int i = thread; i < found; i += block.threads()) {
            const uint32_t own = best.key[i];
            int rank = 0;
            for (int j = 0; j < found; ++j) {
                const bool earlier = best.key[j] == own && best.index[j] < best.index[i];
                rank += best.key[j] > own || earlier ? 1 : 0;
            }
            best.sorted[rank] = best.index[i];
        }
    });
    return found;
}

}  // namespace asag
