// Exact greedy non-maximum suppression within one block, over candidates that are sorted, the best first.
#pragma once

#include "asag/block.h"

namespace asag {

constexpr int GREEDY_CHUNK = 32;  // candidates settled at a time, one bit each

// Shared memory of greedy().
struct GreedyShared {
    uint32_t suppressors[GREEDY_CHUNK];  // bit i of entry j: candidate i of the chunk would suppress candidate j
    uint32_t kept;
};

// Keeps each of [0, found) that no kept one before it suppresses: suppresses(i, j), with i < j, says whether i would.
// Calls keep(slot, i) for each that is kept, where slot counts 0, 1, ... in the order of i.  Returns how many are kept.
// `suppressed`: shared memory for `found` flags.
template <class Block, class Suppresses, class Keep>
ASAG_HD int greedy(
    const Block& block, GreedyShared& shared, int found, uint8_t* suppressed, const Suppresses& suppresses,
    const Keep& keep) {
    block.each([&](int thread) {
        for (int i = thread; i < found; i += block.threads()) suppressed[i] = 0;
        for (int i = thread; i < GREEDY_CHUNK; i += block.threads()) shared.suppressors[i] = 0;
    });
    int kept = 0;
    for (int begin = 0; begin < found; begin += GREEDY_CHUNK) {
        const int chunk = smaller(GREEDY_CHUNK, found - begin);
        block.each([&](int thread) {
            for (int pair = thread; pair < GREEDY_CHUNK * chunk; pair += block.threads()) {
                const int i = pair % GREEDY_CHUNK, j = pair / GREEDY_CHUNK;
                if (i < j && suppresses(begin + i, begin + j)) atomic_set(&shared.suppressors[j], 1u << i);
            }
        });
        block.each([&](int thread) {
            if (thread != 0) return;
            uint32_t of_chunk = 0;
            for (int j = 0; j < chunk; ++j) {
                const bool stays = !suppressed[begin + j] && (shared.suppressors[j] & of_chunk) == 0;
                if (stays) of_chunk |= 1u << j;
            }
            shared.kept = of_chunk;
        });
        const uint32_t of_chunk = block.read(shared.kept);
        block.each([&](int thread) {
            for (int j = thread; j < GREEDY_CHUNK; j += block.threads()) {
                shared.suppressors[j] = 0;
                if ((of_chunk >> j & 1u) != 0) keep(kept + popcount(of_chunk & ((1u << j) - 1)), begin + j);
            }
            for (int j = begin + chunk + thread; j < found; j += block.threads()) {
                if (suppressed[j]) continue;
                int i = begin;
                for (uint32_t rest = of_chunk; rest != 0; rest >>= 1, ++i) {
                    if ((rest & 1u) != 0 && suppresses(i, j)) {
                        suppressed[j] = 1;
                        break;
                    }
                }
            }
        });
        kept += popcount(of_chunk);
    }
    return kept;
}

}  // namespace asag
