/* The C interface of the kernels: plain structures of pointers and sizes, and one function for each operator.
 *
 * `asag_cuda_*` take device pointers and a stream, launch one kernel and return at once; they neither allocate
 * nor synchronise, so they can be captured in a CUDA graph.  `asag_host_*` take host pointers and execute the
 * very same steps on the CPU, thread by thread, for tests.  `asag_cpu_*` take host pointers and are made for speed on
 * a CPU.  The first live in the library asag_kernels, the others in asag_kernels_host.
 *
 * Every function returns 0, or a negative AsagStatus for an argument that makes no sense (nothing was launched),
 * or a positive cudaError_t.  asag_message() says in one sentence what the status means.
 *
 * Shapes: B images, Q queries, N anchors, h x w cells, C channels.  All tensors are contiguous, the last
 * dimension fastest.
 */
#ifndef ASAG_KERNELS_H
#define ASAG_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ASAG_API __declspec(dllexport)
#else
#define ASAG_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ASAG_INTERFACE_VERSION 10
#define ASAG_MAX_LEVELS 4
#define ASAG_MOST_POINTS 64

/* Element types; bfloat16 is for asag_cpu_* alone. */
enum { ASAG_FLOAT32 = 0, ASAG_FLOAT16 = 1, ASAG_UINT8 = 2, ASAG_BFLOAT16 = 3 };

/* Columns of the counts (B, 4) that an image has after each level of probing. */
enum {
    ASAG_SELECTED = 0,          /* anchors that ask for a finer level */
    ASAG_PATCHES = 1,           /* patches that are left of them after NMS */
    ASAG_PASSING = 2,           /* anchors that pass if probing stops here */
    ASAG_PASSING_IF_PROBED = 3, /* anchors that pass if it goes on */
    ASAG_COUNT_COLUMNS = 4
};

typedef enum AsagStatus {
    ASAG_OK = 0,
    ASAG_NULL_POINTER = -1,
    ASAG_OUT_OF_RANGE = -2,
    ASAG_BAD_TYPE = -3,
    ASAG_NO_MEMORY = -4,
    ASAG_NOT_SUPPORTED = -5
} AsagStatus;

/* A feature pyramid, finest level first; maps[i] is (batch, heights[i], widths[i], channels) of `type`. */
typedef struct AsagPyramid {
    const void* maps[ASAG_MAX_LEVELS];
    int32_t heights[ASAG_MAX_LEVELS];
    int32_t widths[ASAG_MAX_LEVELS];
    int32_t strides[ASAG_MAX_LEVELS]; /* pixels per cell, where points are in pixels; for RoIAlign each twice the last */
    int32_t levels;
    int32_t batch;
    int32_t channels;
    int32_t type;
} AsagPyramid;

typedef struct AsagMultiscaleRoIAlign {
    AsagPyramid features;
    const float* boxes; /* (B, Q, 4) x1, y1, x2, y2 in pixels */
    void* out;          /* (B, Q, 7, 7, C) of features.type */
    int32_t queries;
} AsagMultiscaleRoIAlign;

typedef struct AsagPyramidSample {
    AsagPyramid features;
    const float* xy;     /* (B, Q, G, P, 2) in pixels */
    const float* weight; /* (B, Q, G, P, levels) */
    void* out;           /* (B, Q, G, P, C / G) of features.type */
    int32_t queries;
    int32_t groups;
    int32_t points;
} AsagPyramidSample;

/* Each level at points of its own, all of a group added up. */
typedef struct AsagDeformableSample {
    AsagPyramid features; /* without strides */
    const float* xy;      /* (B, Q, G, levels, P, 2) relative to the whole map: 0 and 1 are its edges */
    const float* weight;  /* (B, Q, G, levels, P) */
    void* out;            /* (B, Q, C) of features.type */
    int32_t queries;
    int32_t groups;
    int32_t points; /* of a level, at most ASAG_MOST_POINTS */
} AsagDeformableSample;

typedef struct AsagPatchNMS {
    const void* anchors;       /* (B, N, 5) cx, cy, w, h in pixels, and score, of `type` */
    const uint8_t* selected;   /* (B, N) 0 or 1 */
    const int64_t* image_size; /* (B, 2) valid height, width in pixels */
    int64_t* origins;          /* (B, capacity, 2) x, y in cells, zeros beyond the last patch */
    int64_t* counts;           /* (B, 4), of which only column ASAG_PATCHES is written: it may exceed the capacity */
    int32_t type;
    int32_t batch;
    int32_t anchor_count;
    int32_t stride;
    int32_t patch_size;
    int32_t capacity;
    int32_t max_candidates;
    float iou_threshold;
} AsagPatchNMS;

typedef struct AsagPadAnchors {
    const void* anchors;       /* (B, N, 5) cx, cy, w, h in pixels, and score, of `type` */
    const uint8_t* keep;       /* (B, N) 0 or 1 */
    const int64_t* image_size; /* (B, 2) valid height, width in pixels */
    void* queries;             /* (B, slots, 4) cx, cy, w, h in pixels, of `type` */
    int64_t* counts;           /* (B,) how many anchors are real: at most `cap`, and `slots` */
    int32_t type;
    int32_t batch;
    int32_t anchor_count;
    int32_t slots;
    int32_t first_level;
    int32_t floor;
    int32_t cap;
} AsagPadAnchors;

/* One image into one slot of the input batch: resized to (new_height, new_width), zero right of and below that. */
typedef struct AsagPreprocess {
    const uint8_t* image; /* (height, width, 3) RGB, or BGR if `bgr` is not 0; the result is RGB */
    void* out; /* ASAG_UINT8: (batch_height, batch_width, 3), else normalised (3, batch_height, batch_width) */
    int32_t height;
    int32_t width;
    int32_t new_height; /* both at least the old ones, or both at most */
    int32_t new_width;
    int32_t batch_height;
    int32_t batch_width;
    int32_t type;
    float mean[3]; /* of values 0 to 255; for a normalised result only */
    float deviation[3];
    int32_t bgr;
} AsagPreprocess;

/* The decoder's detections as those of the original images, best first, with zeros beyond the last. */
typedef struct AsagPostprocess {
    const void* scores;            /* (B, detections) of `type`; those of 0 are padding */
    const int64_t* labels;         /* (B, detections) */
    const void* boxes;             /* (B, detections, 4) x1, y1, x2, y2 relative to the valid image, of `type` */
    const int64_t* original_shape; /* (B, 2) height, width in pixels */
    float* xyxy;                   /* (B, detections, 4) pixels of the original image, clipped to it */
    float* confidence;             /* (B, detections) */
    int64_t* class_id;             /* (B, detections) */
    int64_t* counts;               /* (B,) how many are left */
    int32_t type;
    int32_t batch;
    int32_t detections;
    float nms_iou; /* of class-wise NMS; negative for none */
} AsagPostprocess;

/* Whether any image is probed on the next level: the decision between two levels of the probing loop. */
typedef struct AsagDecide {
    const int64_t* counts; /* (B, 4) of the level before */
    uint8_t* probed;       /* (B, levels) 0 or 1: column `level` is written, the one before it read */
    int64_t* patch_count;  /* (B,) patches to predict on, 0 for images that stop */
    int32_t* any;          /* (1,) 1 if an image goes on, else 0 */
    uint64_t condition;    /* cudaGraphConditionalHandle that is set to `any`; the host build leaves it alone */
    int32_t conditional;   /* 0 if there is no such handle */
    int32_t batch;
    int32_t level;
    int32_t levels;
    int32_t min_selected; /* images with fewer selected anchors stop */
    int32_t max_patches;
} AsagDecide;

/* `stream` is a cudaStream_t. */
ASAG_API int asag_cuda_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, void* stream);
ASAG_API int asag_cuda_pyramid_sample(const AsagPyramidSample* arguments, void* stream);
ASAG_API int asag_cuda_deformable_sample(const AsagDeformableSample* arguments, void* stream);
ASAG_API int asag_cuda_patch_nms(const AsagPatchNMS* arguments, void* stream);
ASAG_API int asag_cuda_pad_anchors(const AsagPadAnchors* arguments, void* stream);
ASAG_API int asag_cuda_preprocess(const AsagPreprocess* arguments, void* stream);
ASAG_API int asag_cuda_postprocess(const AsagPostprocess* arguments, void* stream);
/* With a `condition` it can only run in the graph that the handle belongs to; that takes CUDA 12.4. */
ASAG_API int asag_cuda_decide(const AsagDecide* arguments, void* stream);

/* Adds the launch of asag_cuda_decide to a graph as a node, after the nodes that it depends on.  Nothing is captured,
 * for a capture that fails inside the body of a conditional node can end the process.  `graph` is a cudaGraph_t (a
 * CUgraph), which another copy of the CUDA runtime may have made.  `dependencies` are `count` nodes of that graph, null
 * if there are none.  `node` is written. */
ASAG_API int asag_cuda_add_decide(
    const AsagDecide* arguments, void* graph, void* const* dependencies, size_t count, void** node);

/* 0 if the current device can run these kernels, else a cudaError_t: another architecture than they were compiled for,
 * or a driver that is too old.  Nothing is launched. */
ASAG_API int asag_cuda_ready(void);

/* How the host executes a block: with `threads` threads (1 to 512), whose turns between two barriers come in
 * ascending order for `seed` 0 and in a random one for any other, so that a missing barrier shows. */
typedef struct AsagHostBlock {
    int32_t threads;
    uint32_t seed;
} AsagHostBlock;

ASAG_API int asag_host_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_pyramid_sample(const AsagPyramidSample* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_deformable_sample(const AsagDeformableSample* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_patch_nms(const AsagPatchNMS* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_pad_anchors(const AsagPadAnchors* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_preprocess(const AsagPreprocess* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_postprocess(const AsagPostprocess* arguments, const AsagHostBlock* block);
ASAG_API int asag_host_decide(const AsagDecide* arguments, const AsagHostBlock* block);

/* How a CPU runs an operator: on how many threads (1 to 512), the type of the result, which may be another float than
 * the features', and which maps of a pyramid are integers: a map of a scale that is not 0 is int8, and stands for its
 * values times the scale. */
typedef struct AsagCpu {
    int32_t threads;
    int32_t out_type;
    float scales[ASAG_MAX_LEVELS];
} AsagCpu;

/* The largest values of each row, the largest first, of equal ones the first; NaN counts as the smallest. */
typedef struct AsagTopK {
    const float* values; /* (rows, count) */
    float* largest;      /* (rows, k) */
    int64_t* indices;    /* (rows, k) */
    int64_t rows;
    int64_t count;
    int64_t k; /* at most `count` */
} AsagTopK;

/* Activations of a network. */
enum { ASAG_GELU = 0, ASAG_RELU = 1 };

/* Adaptive mixing: the samples of a query and group are multiplied by a matrix of their own over channels, then by one
 * over points; after each product they are normalised over both axes, and go through the activation. */
typedef struct AsagAdaptiveMixing {
    const void* sampled;    /* (B, Q, G, P, C) of `sampled_type` */
    const void* parameters; /* (B, Q, G, C x C + O x P) of `parameters_type`: over channels, then over points */
    void* out;              /* (B, Q, G, O, C) */
    int32_t batch;
    int32_t queries;
    int32_t groups;
    int32_t points;
    int32_t out_points;
    int32_t channels; /* of a group */
    int32_t activation;
    int32_t sampled_type; /* float32 or bfloat16, as `parameters_type` and the result */
    int32_t parameters_type;
} AsagAdaptiveMixing;

ASAG_API int asag_cpu_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, const AsagCpu* how);
ASAG_API int asag_cpu_pyramid_sample(const AsagPyramidSample* arguments, const AsagCpu* how);
ASAG_API int asag_cpu_deformable_sample(const AsagDeformableSample* arguments, const AsagCpu* how);
ASAG_API int asag_cpu_adaptive_mixing(const AsagAdaptiveMixing* arguments, const AsagCpu* how);
ASAG_API int asag_cpu_pad_anchors(const AsagPadAnchors* arguments, const AsagCpu* how);
ASAG_API int asag_cpu_top_k(const AsagTopK* arguments, const AsagCpu* how);
/* Of any number of candidates. */
ASAG_API int asag_cpu_patch_nms(const AsagPatchNMS* arguments, const AsagCpu* how);

/* One sentence on a status.  For a negative one: on the last that this thread was given by this library. */
ASAG_API const char* asag_message(int status);

/* ASAG_INTERFACE_VERSION of the library: structures of another version must not be passed to it. */
ASAG_API int asag_interface_version(void);

#ifdef __cplusplus
}
#endif

#endif
