// asag_host_*: the kernels executed on the CPU, block by block and step by step.

#include <algorithm>
#include <new>
#include <numeric>
#include <random>
#include <vector>

#include "asag/decide.h"
#include "asag/deformable_sample.h"
#include "asag/dispatch.h"
#include "asag/multiscale_roi_align.h"
#include "asag/pad_anchors.h"
#include "asag/patch_nms.h"
#include "asag/postprocess.h"
#include "asag/preprocess.h"
#include "asag/pyramid_sample.h"
#include "checks.h"

namespace {

using namespace asag;

// The order in which the threads of a block take their turns.
std::vector<int> turns(const AsagHostBlock& block) {
    std::vector<int> order(static_cast<size_t>(block.threads));
    std::iota(order.begin(), order.end(), 0);
    if (block.seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(block.seed));
    return order;
}

// Shared memory, which holds anything before it is written.
class Shared {
public:
    explicit Shared(size_t bytes) : words_((bytes + 7) / 8) {}

    void* fresh() {
        std::fill(words_.begin(), words_.end(), 0xcdcdcdcdcdcdcdcdu);
        return words_.data();
    }

    template <class T>
    T& fresh_as() {
        return *static_cast<T*>(fresh());
    }

private:
    std::vector<uint64_t> words_;
};

template <class Arguments, class Run>
int guarded(const Arguments* arguments, const AsagHostBlock* block, const Run& run) {
    int status = check(block);
    if (status == ASAG_OK) status = check(arguments);
    if (status != ASAG_OK) return status;
    try {
        const std::vector<int> order = turns(*block);
        run(HostBlock(order.data(), block->threads));
        return ASAG_OK;
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left for the threads and the shared memory of a block");
    }
}

}  // namespace

int asag_host_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(sizeof(RoiShared));
        by_access(arguments->features, arguments->features.channels, arguments->out, [&](auto access) {
            using A = decltype(access);
            const int64_t blocks = roi_align_blocks(*arguments);
            for (int64_t i = 0; i < blocks; ++i) {
                roi_align_block<typename A::Type, A::WIDTH>(threads, *arguments, i, shared.fresh_as<RoiShared>());
            }
        });
    });
}

int asag_host_pyramid_sample(const AsagPyramidSample* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(sizeof(SampleShared));
        const int32_t channels = arguments->features.channels / arguments->groups;
        by_access(arguments->features, channels, arguments->out, [&](auto access) {
            using A = decltype(access);
            const int64_t blocks = pyramid_sample_blocks(*arguments);
            for (int64_t i = 0; i < blocks; ++i) {
                pyramid_sample_block<typename A::Type, A::WIDTH>(
                    threads, *arguments, i, shared.fresh_as<SampleShared>());
            }
        });
    });
}

int asag_host_deformable_sample(const AsagDeformableSample* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock&) {
        const int32_t channels = arguments->features.channels / arguments->groups;
        by_access(arguments->features, channels, arguments->out, [&](auto access) {
            using A = decltype(access);
            const int64_t packs = deformable_packs(*arguments, A::WIDTH);
            for (int64_t i = 0; i < packs; ++i) deformable_sample_pack<typename A::Type, A::WIDTH>(*arguments, i);
        });
    });
}

int asag_host_patch_nms(const AsagPatchNMS* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(patch_nms_shared_bytes(*arguments));
        for (int i = 0; i < arguments->batch; ++i) patch_nms_block(threads, *arguments, i, shared.fresh());
    });
}

int asag_host_pad_anchors(const AsagPadAnchors* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(pad_anchors_shared_bytes(*arguments));
        for (int i = 0; i < arguments->batch; ++i) pad_anchors_block(threads, *arguments, i, shared.fresh());
    });
}

int asag_host_preprocess(const AsagPreprocess* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(sizeof(PreprocessShared));
        const ResizePlan plan = resize_plan(*arguments);
        for (int i = 0; i < tiles_down(*arguments); ++i) {
            for (int j = 0; j < tiles_across(*arguments); ++j) {
                preprocess_block(threads, *arguments, plan, i, j, shared.fresh_as<PreprocessShared>());
            }
        }
    });
}

int asag_host_postprocess(const AsagPostprocess* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock& threads) {
        Shared shared(postprocess_shared_bytes(*arguments));
        for (int i = 0; i < arguments->batch; ++i) postprocess_block(threads, *arguments, i, shared.fresh());
    });
}

int asag_host_decide(const AsagDecide* arguments, const AsagHostBlock* block) {
    return guarded(arguments, block, [&](const HostBlock&) {
        int any = 0;
        for (int i = 0; i < arguments->batch; ++i) any |= decide_image(*arguments, i) ? 1 : 0;
        *arguments->any = any;
    });
}
