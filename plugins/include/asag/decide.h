// Which images are probed on the next level, and with how many patches: the stop decision of adaptive probing.
//
// The rule is that of asag_deploy.loop.stopping.Decisions.  On the device one block decides for the whole
// batch, and sets the conditional node of a CUDA graph that holds the next level.
#pragma once

#include "asag/asag_kernels.h"
#include "asag/platform.h"

namespace asag {

constexpr int DECIDE_THREADS = 256;

// Whether image `i` goes on; writes its flag and its number of patches.
ASAG_HD inline bool decide_image(const AsagDecide& arguments, int i) {
    const int64_t* counts = arguments.counts + static_cast<int64_t>(i) * ASAG_COUNT_COLUMNS;
    uint8_t* probed = arguments.probed + static_cast<int64_t>(i) * arguments.levels;
    const bool was_probed = arguments.level == 0 || probed[arguments.level - 1] != 0;
    const bool goes_on = was_probed && counts[ASAG_SELECTED] >= arguments.min_selected;
    const int64_t found = counts[ASAG_PATCHES];
    const int64_t patches = found < arguments.max_patches ? found : arguments.max_patches;
    probed[arguments.level] = goes_on ? 1 : 0;
    arguments.patch_count[i] = goes_on ? patches : 0;
    return goes_on;
}

}  // namespace asag
