// The kernels and their launchers, for CUDA compilers.  A launcher takes arguments that have been checked and a
// stream; it launches at most one kernel, never waits, and returns what the launch did.  add_node() makes the same
// launch a node of a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "asag/decide.h"
#include "asag/deformable_sample.h"
#include "asag/dispatch.h"
#include "asag/multiscale_roi_align.h"
#include "asag/pad_anchors.h"
#include "asag/patch_nms.h"
#include "asag/postprocess.h"
#include "asag/preprocess.h"
#include "asag/pyramid_sample.h"

namespace asag {

template <class T, int WIDTH>
__global__ void __launch_bounds__(ROI_THREADS)
    roi_align_kernel(const __grid_constant__ AsagMultiscaleRoIAlign arguments) {
    __shared__ RoiShared shared;
    roi_align_block<T, WIDTH>(DeviceBlock{}, arguments, blockIdx.x, shared);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(SAMPLE_THREADS)
    pyramid_sample_kernel(const __grid_constant__ AsagPyramidSample arguments) {
    __shared__ SampleShared shared;
    pyramid_sample_block<T, WIDTH>(DeviceBlock{}, arguments, blockIdx.x, shared);
}

template <class T, int WIDTH>
__global__ void __launch_bounds__(DEFORMABLE_THREADS)
    deformable_sample_kernel(const __grid_constant__ AsagDeformableSample arguments, int64_t packs) {
    const int64_t item = static_cast<int64_t>(blockIdx.x) * DEFORMABLE_THREADS + threadIdx.x;
    if (item < packs) deformable_sample_pack<T, WIDTH>(arguments, item);
}

static __global__ void __launch_bounds__(SELECT_THREADS)
    patch_nms_kernel(const __grid_constant__ AsagPatchNMS arguments) {
    extern __shared__ uint64_t asag_shared[];
    patch_nms_block(DeviceBlock{}, arguments, static_cast<int>(blockIdx.x), asag_shared);
}

static __global__ void __launch_bounds__(SELECT_THREADS)
    pad_anchors_kernel(const __grid_constant__ AsagPadAnchors arguments) {
    extern __shared__ uint64_t asag_shared[];
    pad_anchors_block(DeviceBlock{}, arguments, static_cast<int>(blockIdx.x), asag_shared);
}

static __global__ void __launch_bounds__(SELECT_THREADS)
    postprocess_kernel(const __grid_constant__ AsagPostprocess arguments) {
    extern __shared__ uint64_t asag_shared[];
    postprocess_block(DeviceBlock{}, arguments, static_cast<int>(blockIdx.x), asag_shared);
}

static __global__ void __launch_bounds__(PREPROCESS_THREADS)
    preprocess_kernel(const __grid_constant__ AsagPreprocess arguments, const __grid_constant__ ResizePlan plan) {
    __shared__ PreprocessShared shared;
    const int down = static_cast<int>(blockIdx.y), across = static_cast<int>(blockIdx.x);
    preprocess_block(DeviceBlock{}, arguments, plan, down, across, shared);
}

static __global__ void __launch_bounds__(DECIDE_THREADS) decide_kernel(const __grid_constant__ AsagDecide arguments) {
    bool goes_on = false;
    for (int i = static_cast<int>(threadIdx.x); i < arguments.batch; i += DECIDE_THREADS) {
        goes_on |= decide_image(arguments, i);
    }
    const int any = __syncthreads_or(goes_on) != 0 ? 1 : 0;
    if (threadIdx.x != 0) return;
    *arguments.any = any;
#if CUDART_VERSION >= 12040
    if (arguments.conditional != 0) cudaGraphSetConditional(arguments.condition, static_cast<unsigned>(any));
#endif
}

inline cudaError_t launch(const AsagMultiscaleRoIAlign& arguments, cudaStream_t stream) {
    const int64_t blocks = roi_align_blocks(arguments);
    if (blocks == 0) return cudaSuccess;
    const AsagPyramid& features = arguments.features;
    return by_access(features, features.channels, arguments.out, [&](auto access) {
        using A = decltype(access);
        roi_align_kernel<typename A::Type, A::WIDTH>
            <<<static_cast<unsigned>(blocks), ROI_THREADS, 0, stream>>>(arguments);
        return cudaGetLastError();
    });
}

inline cudaError_t launch(const AsagPyramidSample& arguments, cudaStream_t stream) {
    const int64_t blocks = pyramid_sample_blocks(arguments);
    if (blocks == 0 || arguments.points == 0) return cudaSuccess;
    const int32_t channels = arguments.features.channels / arguments.groups;
    return by_access(arguments.features, channels, arguments.out, [&](auto access) {
        using A = decltype(access);
        pyramid_sample_kernel<typename A::Type, A::WIDTH>
            <<<static_cast<unsigned>(blocks), SAMPLE_THREADS, 0, stream>>>(arguments);
        return cudaGetLastError();
    });
}

inline cudaError_t launch(const AsagDeformableSample& arguments, cudaStream_t stream) {
    if (deformable_packs(arguments, 1) == 0) return cudaSuccess;
    const int32_t channels = arguments.features.channels / arguments.groups;
    return by_access(arguments.features, channels, arguments.out, [&](auto access) {
        using A = decltype(access);
        const auto blocks = static_cast<unsigned>(deformable_sample_blocks(arguments, A::WIDTH));
        deformable_sample_kernel<typename A::Type, A::WIDTH>
            <<<blocks, DEFORMABLE_THREADS, 0, stream>>>(arguments, deformable_packs(arguments, A::WIDTH));
        return cudaGetLastError();
    });
}

inline cudaError_t launch(const AsagPatchNMS& arguments, cudaStream_t stream) {
    if (arguments.batch == 0) return cudaSuccess;
    const size_t shared = patch_nms_shared_bytes(arguments);
    patch_nms_kernel<<<static_cast<unsigned>(arguments.batch), SELECT_THREADS, shared, stream>>>(arguments);
    return cudaGetLastError();
}

inline cudaError_t launch(const AsagPadAnchors& arguments, cudaStream_t stream) {
    if (arguments.batch == 0) return cudaSuccess;
    const size_t shared = pad_anchors_shared_bytes(arguments);
    pad_anchors_kernel<<<static_cast<unsigned>(arguments.batch), SELECT_THREADS, shared, stream>>>(arguments);
    return cudaGetLastError();
}

inline cudaError_t launch(const AsagPostprocess& arguments, cudaStream_t stream) {
    if (arguments.batch == 0) return cudaSuccess;
    const size_t shared = postprocess_shared_bytes(arguments);
    postprocess_kernel<<<static_cast<unsigned>(arguments.batch), SELECT_THREADS, shared, stream>>>(arguments);
    return cudaGetLastError();
}

inline cudaError_t launch(const AsagDecide& arguments, cudaStream_t stream) {
    if (CUDART_VERSION < 12040 && arguments.conditional != 0) return cudaErrorNotSupported;
    decide_kernel<<<1, DECIDE_THREADS, 0, stream>>>(arguments);
    return cudaGetLastError();
}

inline cudaError_t add_node(
    const AsagDecide& arguments, cudaGraph_t graph, const cudaGraphNode_t* dependencies, size_t count,
    cudaGraphNode_t* node) {
    if (CUDART_VERSION < 12040 && arguments.conditional != 0) return cudaErrorNotSupported;
    AsagDecide copied = arguments;  // once more by the graph
    void* parameters[] = {&copied};
    cudaKernelNodeParams kernel = {};
    kernel.func = reinterpret_cast<void*>(decide_kernel);
    kernel.gridDim = dim3(1);
    kernel.blockDim = dim3(DECIDE_THREADS);
    kernel.kernelParams = parameters;
    const cudaError_t status = cudaGraphAddKernelNode(node, graph, dependencies, count, &kernel);
    cudaGetLastError();  // which would be that of the next launch otherwise
    return status;
}

inline cudaError_t launch(const AsagPreprocess& arguments, cudaStream_t stream) {
    const dim3 tiles(static_cast<unsigned>(tiles_across(arguments)), static_cast<unsigned>(tiles_down(arguments)));
    preprocess_kernel<<<tiles, PREPROCESS_THREADS, 0, stream>>>(arguments, resize_plan(arguments));
    return cudaGetLastError();
}

}  // namespace asag
