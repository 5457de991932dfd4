// The stop decision inside a CUDA graph: two nested levels, each in the body of a conditional node.

#include "checking.h"

namespace asag::checks {

#if CUDART_VERSION >= 13000
namespace {

// A graph of two nested If nodes, the second level's in the first one's body, as the loop on the device has them.  A
// memset in each body shows whether it ran.
class TwoLevels {
public:
    TwoLevels(const AsagDecide& first, const AsagDecide& second, int32_t* ran) {
        must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "conditional: stream");
        must(cudaStreamCreateWithFlags(&inner_, cudaStreamNonBlocking), "conditional: stream");
        must(cudaStreamCreateWithFlags(&innermost_, cudaStreamNonBlocking), "conditional: stream");
        must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "conditional: capture");
        must(cudaMemsetAsync(ran, 0, 2 * sizeof(int32_t), stream_), "conditional: memset");
        capture_if(stream_, inner_, first, [&] {
            must(cudaMemsetAsync(ran, 1, 1, inner_), "conditional: body");
            capture_if(inner_, innermost_, second, [&] {
                must(cudaMemsetAsync(ran + 1, 1, 1, innermost_), "conditional: body");
            });
        });
        cudaGraph_t graph = nullptr;
        must(cudaStreamEndCapture(stream_, &graph), "conditional: end of capture");
        must(cudaGraphInstantiate(&executable_, graph, 0), "conditional: instantiate");
        must(cudaGraphDestroy(graph), "conditional: destroy");
    }

    ~TwoLevels() {
        cudaGraphExecDestroy(executable_);
        for (cudaStream_t stream : {stream_, inner_, innermost_}) cudaStreamDestroy(stream);
    }

    void launch() {
        must(cudaGraphLaunch(executable_, stream_), "conditional: launch");
        must(cudaStreamSynchronize(stream_), "conditional: run");
    }

private:
    template <class Body>
    static void capture_if(cudaStream_t stream, cudaStream_t inner, AsagDecide decision, const Body& body) {
        cudaStreamCaptureStatus status;
        cudaGraph_t graph = nullptr, inside = nullptr;
        const cudaGraphNode_t* before = nullptr;
        size_t count = 0;
        must(
            cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &before, nullptr, &count), "conditional: graph");
        cudaGraphConditionalHandle handle;
        must(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault), "conditional: handle");
        decision.condition = handle;
        decision.conditional = 1;
        must(asag_cuda_decide(&decision, stream), "conditional: decide");
        must(
            cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &before, nullptr, &count), "conditional: graph");
        cudaGraphNodeParams node = {};
        node.type = cudaGraphNodeTypeConditional;
        node.conditional.handle = handle;
        node.conditional.type = cudaGraphCondTypeIf;
        node.conditional.size = 1;
        cudaGraphNode_t added;
        must(cudaGraphAddNode(&added, graph, before, nullptr, count, &node), "conditional: node");
        must(
            cudaStreamUpdateCaptureDependencies(stream, &added, nullptr, 1, cudaStreamSetCaptureDependencies),
            "conditional: order");
        must(
            cudaStreamBeginCaptureToGraph(
                inner, node.conditional.phGraph_out[0], nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal),
            "conditional: body");
        body();
        must(cudaStreamEndCapture(inner, &inside), "conditional: body");
    }

    cudaStream_t stream_ = nullptr, inner_ = nullptr, innermost_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

}  // namespace

// The same graph over batches that stop at the first level, at the second, and not at all.
void check_conditional_graph() {
    constexpr int BATCH = 3, LEVELS = 2;
    Twin<int64_t> first(4 * BATCH), second(4 * BATCH), patches(BATCH);
    Twin<uint8_t> probed(LEVELS * BATCH);
    Twin<int32_t> any(1), ran(2);
    const AsagDecide decision = {
        first.upload(), probed.upload(), patches.upload(), any.upload(), 0, 0, BATCH, 0, LEVELS, 3, 15};
    AsagDecide next = decision;
    next.counts = second.upload();
    next.level = 1;
    int32_t* flags = ran.upload();
    TwoLevels graph(decision, next, flags);
    for (int depth = 0; depth <= LEVELS; ++depth) {
        first.host.assign(first.host.size(), 0);
        second.host.assign(second.host.size(), 0);
        if (depth > 0) first.host[4] = 3, first.host[5] = 20;
        if (depth > 1) second.host[4] = 5, second.host[5] = 4;
        second.host[0] = 9;  // of an image that has stopped before
        must(
            cudaMemcpy(const_cast<int64_t*>(decision.counts), first.host.data(), first.host.size() * sizeof(int64_t),
                       cudaMemcpyHostToDevice), "conditional: counts");
        must(
            cudaMemcpy(const_cast<int64_t*>(next.counts), second.host.data(), second.host.size() * sizeof(int64_t),
                       cudaMemcpyHostToDevice), "conditional: counts");
        graph.launch();
        ran.host = {depth > 0 ? 1 : 0, depth > 1 ? 1 : 0};
        compare(ran, 0, "conditional graph to level " + std::to_string(depth));
    }
}
#else
void check_conditional_graph() {}
#endif

}  // namespace asag::checks
