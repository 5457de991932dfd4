// asag_cpu_*: what is so little work that more than the calling thread would only cost.

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "asag/patch_nms.h"
#include "checks.h"

// One version of a function for each generation of vector instructions, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define ASAG_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ASAG_VECTORISED
#endif

namespace {

using namespace asag;

// A number and where it was.
struct Ranked {
    float key;
    int64_t index;

    bool operator<(const Ranked& other) const { return key != other.key ? key > other.key : index < other.index; }
};

// Few of the values are ever among the k largest so far: these are gathered, and from time to time the k largest of
// them kept, of which the last is what those to come have to exceed.
void top_k(const AsagTopK& a, int64_t row, std::vector<Ranked>& best) {
    const float* values = a.values + row * a.count;
    const size_t k = static_cast<size_t>(a.k);
    best.clear();
    bool full = false;
    float last = 0.0f;
    for (int64_t i = 0; i < a.count; ++i) {
        const float value = values[i];
        if (full && !(value > last)) continue;
        best.push_back({std::isnan(value) ? -INFINITY : value, i});
        if (best.size() < 2 * k) continue;
        std::nth_element(best.begin(), best.begin() + (a.k - 1), best.end());
        best.resize(k);
        last = best.back().key;
        full = true;
    }
    std::partial_sort(best.begin(), best.begin() + a.k, best.end());
    for (size_t i = 0; i < k; ++i) {
        a.indices[row * a.k + static_cast<int64_t>(i)] = best[i].index;
        a.largest[row * a.k + static_cast<int64_t>(i)] = values[best[i].index];
    }
}

// Which of the patches round `count` centres another suppresses.
ASAG_VECTORISED void find_suppressed(
    int32_t* found, const float* x, const float* y, int count, const Square& patch, const AsagPatchNMS& arguments) {
    for (int i = 0; i < count; ++i) {
        found[i] = suppresses(patch, patch_around(x[i], y[i], arguments), arguments.iou_threshold);
    }
}

// Where the patches of an image are looked for.
struct Centres {
    std::vector<Ranked> order;
    std::vector<float> x, y;
    std::vector<int32_t> suppressed;
};

// One image: as `patch_nms_block`, with the same decisions.
void patch_nms(const AsagPatchNMS& a, int64_t image, Centres& centres) {
    const AnyFloats anchors{a.anchors, a.type == ASAG_FLOAT16};
    const int64_t first = image * a.anchor_count;
    centres.order.clear();
    for (int64_t i = first; i < first + a.anchor_count; ++i) {
        if (!a.selected[i]) continue;
        const float score = anchors[5 * i + 4];
        if (score >= 0.0f) centres.order.push_back({score, i});
    }
    const size_t candidates = centres.order.size();
    const size_t found = std::min(candidates, static_cast<size_t>(a.max_candidates));
    std::partial_sort(
        centres.order.begin(), centres.order.begin() + static_cast<int64_t>(found), centres.order.end());
    centres.x.resize(found);
    centres.y.resize(found);
    centres.suppressed.resize(found);
    float *x = centres.x.data(), *y = centres.y.data();
    for (size_t i = 0; i < found; ++i) {
        x[i] = anchors[5 * centres.order[i].index];
        y[i] = anchors[5 * centres.order[i].index + 1];
    }

    const int64_t* size = a.image_size + 2 * image;  // height, width
    int64_t* origins = a.origins + image * a.capacity * 2;
    int64_t kept = 0;
    for (int left = static_cast<int>(found); left > 0;) {  // those not yet settled are moved to the front
        const Square patch = patch_around(x[0], y[0], a);
        if (kept < a.capacity) {
            origins[2 * kept] = patch_origin(patch.left, patch.right, size[1], a);
            origins[2 * kept + 1] = patch_origin(patch.top, patch.bottom, size[0], a);
        }
        ++kept;
        const int others = left - 1;
        find_suppressed(centres.suppressed.data(), x + 1, y + 1, others, patch, a);
        left = 0;
        for (int i = 0; i < others; ++i) {
            x[left] = x[i + 1];
            y[left] = y[i + 1];
            left += centres.suppressed[static_cast<size_t>(i)] ? 0 : 1;
        }
    }
    for (int64_t i = 2 * kept; i < 2 * a.capacity; ++i) origins[i] = 0;
    a.counts[image * ASAG_COUNT_COLUMNS + ASAG_PATCHES] = kept;
}

}  // namespace

// It takes so little that the steps of the GPU do, one after the other.
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
        std::vector<Ranked> best;
        for (int64_t row = 0; row < a.rows; ++row) top_k(a, row, best);
    } catch (const std::bad_alloc&) {
        return problem(ASAG_NO_MEMORY, "no memory is left to sort %lld values", static_cast<long long>(a.count));
    }
    return ASAG_OK;
}

int asag_cpu_patch_nms(const AsagPatchNMS* arguments, const AsagCpu* how) {
    int status = check(how);
    if (status == ASAG_OK) status = check(arguments, false);
    if (status != ASAG_OK) return status;
    try {
        Centres centres;
        for (int64_t image = 0; image < arguments->batch; ++image) patch_nms(*arguments, image, centres);
    } catch (const std::bad_alloc&) {
        return problem(
            ASAG_NO_MEMORY, "no memory is left to sort %lld anchors", static_cast<long long>(arguments->anchor_count));
    }
    return ASAG_OK;
}
