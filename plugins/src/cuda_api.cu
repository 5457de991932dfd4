// asag_cuda_*: checks, then one launch.

#include "asag/launch.h"
#include "checks.h"

namespace {

template <class Arguments>
int checked_launch(const Arguments* arguments, void* stream) {
    const int status = asag::check(arguments);
    if (status != ASAG_OK) return status;
    return static_cast<int>(asag::launch(*arguments, static_cast<cudaStream_t>(stream)));
}

}  // namespace

int asag_cuda_multiscale_roi_align(const AsagMultiscaleRoIAlign* arguments, void* stream) {
    return checked_launch(arguments, stream);
}

int asag_cuda_pyramid_sample(const AsagPyramidSample* arguments, void* stream) {
    return checked_launch(arguments, stream);
}

int asag_cuda_deformable_sample(const AsagDeformableSample* arguments, void* stream) {
    return checked_launch(arguments, stream);
}

int asag_cuda_patch_nms(const AsagPatchNMS* arguments, void* stream) { return checked_launch(arguments, stream); }

int asag_cuda_pad_anchors(const AsagPadAnchors* arguments, void* stream) { return checked_launch(arguments, stream); }

int asag_cuda_preprocess(const AsagPreprocess* arguments, void* stream) { return checked_launch(arguments, stream); }

int asag_cuda_postprocess(const AsagPostprocess* arguments, void* stream) { return checked_launch(arguments, stream); }

int asag_cuda_decide(const AsagDecide* arguments, void* stream) { return checked_launch(arguments, stream); }

int asag_cuda_add_decide(
    const AsagDecide* arguments, void* graph, void* const* dependencies, size_t count, void** node) {
    int status = asag::check(arguments);
    if (status == ASAG_OK) status = asag::check_place(graph, dependencies, count, node);
    if (status != ASAG_OK) return status;
    return static_cast<int>(asag::add_node(
        *arguments, static_cast<cudaGraph_t>(graph), reinterpret_cast<const cudaGraphNode_t*>(dependencies), count,
        reinterpret_cast<cudaGraphNode_t*>(node)));
}

int asag_cuda_ready(void) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, asag::preprocess_kernel);
    cudaGetLastError();  // which would be that of the next launch otherwise
    return static_cast<int>(status);
}

const char* asag_message(int status) {
    if (status == ASAG_OK) return "no error";
    return status < 0 ? asag::last_problem() : cudaGetErrorString(static_cast<cudaError_t>(status));
}

int asag_interface_version(void) { return ASAG_INTERFACE_VERSION; }
