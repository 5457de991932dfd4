// What each call is asked for, before anything is launched: see checks.h.

#include "checks.h"

#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "asag/deformable_sample.h"
#include "asag/multiscale_roi_align.h"
#include "asag/pad_anchors.h"
#include "asag/patch_nms.h"
#include "asag/postprocess.h"

namespace asag {
namespace {

constexpr size_t SHARED_LIMIT = 48 * 1024;  // what every device gives a block without being asked
constexpr int SIDE_LIMIT = 32768;  // cells, so that their number in a map fits into an int
constexpr int COUNT_LIMIT = 1 << 24;  // anchors, queries, slots: indices within an image fit into an int

thread_local char last[256] = "no call has failed in this thread";

struct Checks {
    int status = ASAG_OK;

    Checks& given(const void* pointer, const char* name) {
        if (status == ASAG_OK && pointer == nullptr) {
            status = problem(ASAG_NULL_POINTER, "%s is a null pointer; pass the address of the tensor", name);
        }
        return *this;
    }

    Checks& range(int64_t value, const char* name, int64_t low, int64_t high) {
        if (status == ASAG_OK && (value < low || value > high)) {
            status = problem(
                ASAG_OUT_OF_RANGE, "%s is %lld, expected %lld to %lld", name, static_cast<long long>(value),
                static_cast<long long>(low), static_cast<long long>(high));
        }
        return *this;
    }

    Checks& type(int32_t value) {
        if (status == ASAG_OK && value != ASAG_FLOAT32 && value != ASAG_FLOAT16) {
            status = problem(ASAG_BAD_TYPE, "type is %d, expected 0 (float32) or 1 (float16)", value);
        }
        return *this;
    }

    Checks& float_for_cpu(int32_t value, const char* name) {
        if (status == ASAG_OK && value != ASAG_FLOAT32 && value != ASAG_BFLOAT16) {
            status = problem(ASAG_BAD_TYPE, "%s is %d, expected 0 (float32) or 3 (bfloat16)", name, value);
        }
        return *this;
    }

    Checks& pyramid(const AsagPyramid& features) {
        type(features.type);
        range(features.levels, "levels", 1, ASAG_MAX_LEVELS);
        range(features.batch, "batch", 0, 65535);
        range(features.channels, "channels", 1, 65536);
        for (int i = 0; status == ASAG_OK && i < features.levels; ++i) {
            char name[32];
            std::snprintf(name, sizeof name, "heights[%d]", i);
            range(features.heights[i], name, 1, SIDE_LIMIT);
            std::snprintf(name, sizeof name, "widths[%d]", i);
            range(features.widths[i], name, 1, SIDE_LIMIT);
        }
        return *this;
    }

    Checks& strides(const AsagPyramid& features) {
        for (int i = 0; status == ASAG_OK && i < features.levels; ++i) {
            char name[32];
            std::snprintf(name, sizeof name, "strides[%d]", i);
            range(features.strides[i], name, 1, 65536);
        }
        return *this;
    }

    Checks& groups(int32_t value, const AsagPyramid& features) {
        range(value, "groups", 1, features.channels);
        if (status == ASAG_OK && features.channels % value != 0) {
            status = problem(
                ASAG_OUT_OF_RANGE, "groups is %d, expected a divisor of the %d channels", value, features.channels);
        }
        return *this;
    }

    Checks& maps(const AsagPyramid& features) {
        for (int i = 0; status == ASAG_OK && i < features.levels; ++i) {
            char name[32];
            std::snprintf(name, sizeof name, "maps[%d]", i);
            given(features.maps[i], name);
        }
        return *this;
    }
};

}  // namespace

int check(const AsagMultiscaleRoIAlign* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    const AsagPyramid& features = arguments->features;
    checks.pyramid(features).strides(features).range(arguments->queries, "queries", 0, COUNT_LIMIT);
    for (int i = 1; checks.status == ASAG_OK && i < features.levels; ++i) {
        if (features.strides[i] != 2 * features.strides[i - 1]) {
            return problem(
                ASAG_OUT_OF_RANGE, "strides[%d] is %d, expected %d: each level has twice the stride of the one before",
                i, features.strides[i], 2 * features.strides[i - 1]);
        }
    }
    if (checks.status != ASAG_OK) return checks.status;
    const int64_t boxes = static_cast<int64_t>(features.batch) * arguments->queries;
    checks.range(boxes, "batch x queries", 0, INT_MAX / ROI_BINS);
    if (checks.status != ASAG_OK || boxes == 0) return checks.status;
    return checks.maps(features).given(arguments->boxes, "boxes").given(arguments->out, "out").status;
}

int check(const AsagPyramidSample* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    const AsagPyramid& features = arguments->features;
    checks.pyramid(features)
        .strides(features)
        .range(arguments->queries, "queries", 0, COUNT_LIMIT)
        .range(arguments->points, "points", 0, 65536)
        .groups(arguments->groups, features);
    const int64_t blocks = static_cast<int64_t>(features.batch) * arguments->queries * arguments->groups;
    checks.range(blocks, "batch x queries x groups", 0, INT_MAX);
    if (checks.status != ASAG_OK || blocks == 0 || arguments->points == 0) return checks.status;
    checks.maps(features).given(arguments->xy, "xy").given(arguments->weight, "weight");
    return checks.given(arguments->out, "out").status;
}

int check(const AsagDeformableSample* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    const AsagPyramid& features = arguments->features;
    checks.pyramid(features)
        .range(arguments->queries, "queries", 0, COUNT_LIMIT)
        .range(arguments->points, "points", 0, ASAG_MOST_POINTS)
        .groups(arguments->groups, features);
    const int64_t queries = static_cast<int64_t>(features.batch) * arguments->queries;
    if (checks.status != ASAG_OK || queries == 0) return checks.status;
    checks.range(deformable_sample_blocks(*arguments, 1), "batch x queries x channels / 128", 0, INT_MAX);
    checks.maps(features).given(arguments->out, "out");
    if (arguments->points == 0) return checks.status;
    return checks.given(arguments->xy, "xy").given(arguments->weight, "weight").status;
}

int check(const AsagPatchNMS* arguments, bool in_a_block) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    checks.type(arguments->type)
        .range(arguments->batch, "batch", 0, 65535)
        .range(arguments->anchor_count, "anchor_count", 0, COUNT_LIMIT)
        .range(arguments->stride, "stride", 1, 65536)
        .range(arguments->patch_size, "patch_size", 1, 1024)
        .range(arguments->capacity, "capacity", 0, COUNT_LIMIT)
        .range(arguments->max_candidates, "max_candidates", 0, INT_MAX);
    if (checks.status == ASAG_OK && !(arguments->iou_threshold >= 0.0f && arguments->iou_threshold <= 1.0f)) {
        return problem(
            ASAG_OUT_OF_RANGE, "iou_threshold is %g, expected 0 to 1", static_cast<double>(arguments->iou_threshold));
    }
    if (checks.status == ASAG_OK && in_a_block && patch_nms_shared_bytes(*arguments) > SHARED_LIMIT) {
        return problem(
            ASAG_OUT_OF_RANGE, "max_candidates is %d with %d anchors, expected at most %d that can be considered",
            arguments->max_candidates, arguments->anchor_count,
            static_cast<int>((SHARED_LIMIT - sizeof(PatchNmsShared)) / 13));
    }
    if (checks.status != ASAG_OK || arguments->batch == 0) return checks.status;
    checks.given(arguments->image_size, "image_size").given(arguments->counts, "counts");
    if (arguments->capacity > 0) checks.given(arguments->origins, "origins");
    if (arguments->anchor_count > 0) {
        checks.given(arguments->anchors, "anchors").given(arguments->selected, "selected");
    }
    return checks.status;
}

int check(const AsagPadAnchors* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    checks.type(arguments->type)
        .range(arguments->batch, "batch", 0, 65535)
        .range(arguments->anchor_count, "anchor_count", 0, COUNT_LIMIT)
        .range(arguments->slots, "slots", 0, COUNT_LIMIT)
        .range(arguments->first_level, "first_level", 0, 16384)
        .range(arguments->floor, "floor", 0, 2048)
        .range(arguments->cap, "cap", 0, 2048);
    if (checks.status != ASAG_OK || arguments->batch == 0) return checks.status;
    checks.given(arguments->image_size, "image_size").given(arguments->counts, "counts");
    if (arguments->slots > 0) checks.given(arguments->queries, "queries");
    if (arguments->anchor_count > 0) checks.given(arguments->anchors, "anchors").given(arguments->keep, "keep");
    return checks.status;
}

static_assert(
    sizeof(PadAnchorsShared) + 2048 * 12 + 16384 <= SHARED_LIMIT, "what check() lets through must fit into a block");

int check(const AsagPreprocess* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    if (arguments->type != ASAG_UINT8) checks.type(arguments->type);
    checks.range(arguments->height, "height", 1, SIDE_LIMIT)
        .range(arguments->width, "width", 1, SIDE_LIMIT)
        .range(arguments->batch_height, "batch_height", 1, SIDE_LIMIT)
        .range(arguments->batch_width, "batch_width", 1, SIDE_LIMIT)
        .range(arguments->new_height, "new_height", 1, arguments->batch_height)
        .range(arguments->new_width, "new_width", 1, arguments->batch_width);
    const int taller = arguments->new_height - arguments->height, wider = arguments->new_width - arguments->width;
    if (checks.status == ASAG_OK && ((taller < 0 && wider > 0) || (taller > 0 && wider < 0))) {
        return problem(
            ASAG_OUT_OF_RANGE, "an image of %d x %d to become %d x %d would grow one way and shrink the other",
            arguments->height, arguments->width, arguments->new_height, arguments->new_width);
    }
    for (int i = 0; checks.status == ASAG_OK && arguments->type != ASAG_UINT8 && i < 3; ++i) {
        if (!(arguments->deviation[i] > 0.0f)) {
            return problem(
                ASAG_OUT_OF_RANGE, "deviation[%d] is %g, expected a positive number", i,
                static_cast<double>(arguments->deviation[i]));
        }
    }
    return checks.given(arguments->image, "image").given(arguments->out, "out").status;
}

int check(const AsagPostprocess* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    checks.type(arguments->type)
        .range(arguments->batch, "batch", 0, 65535)
        .range(arguments->detections, "detections", 0, 2048);
    if (checks.status == ASAG_OK && !(arguments->nms_iou <= 1.0f)) {
        return problem(
            ASAG_OUT_OF_RANGE, "nms_iou is %g, expected 0 to 1, or a negative number for none",
            static_cast<double>(arguments->nms_iou));
    }
    if (checks.status != ASAG_OK || arguments->batch == 0) return checks.status;
    checks.given(arguments->original_shape, "original_shape").given(arguments->counts, "counts");
    if (arguments->detections == 0) return checks.status;
    checks.given(arguments->scores, "scores").given(arguments->labels, "labels").given(arguments->boxes, "boxes");
    checks.given(arguments->xyxy, "xyxy").given(arguments->confidence, "confidence");
    return checks.given(arguments->class_id, "class_id").status;
}

static_assert(sizeof(PostprocessShared) + 2048 * 13 <= SHARED_LIMIT, "what check() lets through must fit into a block");

int check(const AsagDecide* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    checks.range(arguments->batch, "batch", 0, 65535)
        .range(arguments->levels, "levels", 1, ASAG_MAX_LEVELS)
        .range(arguments->level, "level", 0, int64_t{arguments->levels} - 1)
        .range(arguments->min_selected, "min_selected", 0, COUNT_LIMIT)
        .range(arguments->max_patches, "max_patches", 0, COUNT_LIMIT)
        .given(arguments->any, "any");
    if (checks.status != ASAG_OK || arguments->batch == 0) return checks.status;
    checks.given(arguments->counts, "counts").given(arguments->probed, "probed");
    return checks.given(arguments->patch_count, "patch_count").status;
}

int check(const AsagHostBlock* block) {
    Checks checks;
    if (checks.given(block, "block").status != ASAG_OK) return checks.status;
    return checks.range(block->threads, "threads", 1, SELECT_THREADS).status;
}

int check(const AsagAdaptiveMixing* arguments) {
    Checks checks;
    if (checks.given(arguments, "arguments").status != ASAG_OK) return checks.status;
    checks.range(arguments->batch, "batch", 0, 65535)
        .range(arguments->queries, "queries", 0, COUNT_LIMIT)
        .range(arguments->groups, "groups", 1, 4096)
        .range(arguments->points, "points", 1, 4096)
        .range(arguments->out_points, "out_points", 1, 4096)
        .range(arguments->channels, "channels", 1, 4096)
        .range(arguments->activation, "activation", ASAG_GELU, ASAG_RELU)
        .float_for_cpu(arguments->sampled_type, "sampled_type")
        .float_for_cpu(arguments->parameters_type, "parameters_type");
    if (checks.status != ASAG_OK || arguments->batch == 0 || arguments->queries == 0) return checks.status;
    checks.given(arguments->sampled, "sampled").given(arguments->parameters, "parameters");
    return checks.given(arguments->out, "out").status;
}

int check(const AsagCpu* how) {
    if (how == nullptr) return problem(ASAG_NULL_POINTER, "how is a null pointer; pass the address of an AsagCpu");
    Checks checks;
    if (checks.range(how->threads, "threads", 1, 512).status != ASAG_OK) return checks.status;
    for (int level = 0; level < ASAG_MAX_LEVELS; ++level) {
        const float scale = how->scales[level];
        if (!(scale >= 0.0f && std::isfinite(scale))) {
            return problem(ASAG_OUT_OF_RANGE, "scales[%d] is %g, expected a positive number or 0", level, scale);
        }
    }
    return ASAG_OK;
}

int check_place(const void* graph, void* const* dependencies, size_t count, void* const* node) {
    if (graph == nullptr) return problem(ASAG_NULL_POINTER, "graph is a null pointer; pass a graph that has been made");
    if (node == nullptr) return problem(ASAG_NULL_POINTER, "node is a null pointer; pass where to write the node");
    if (count > 0 && dependencies == nullptr) {
        return problem(ASAG_NULL_POINTER, "dependencies is a null pointer, expected %zu nodes of the graph", count);
    }
    for (size_t i = 0; i < count; ++i) {
        if (dependencies[i] != nullptr) continue;
        return problem(ASAG_NULL_POINTER, "dependencies[%zu] is a null pointer, expected a node of the graph", i);
    }
    return ASAG_OK;
}

int problem(AsagStatus status, const char* format, ...) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(last, sizeof last, format, values);
    va_end(values);
    return status;
}

const char* last_problem() { return last; }

}  // namespace asag
