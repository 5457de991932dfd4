// The probing loop as one CUDA graph that is built by hand, as the runtime builds it: stages that are captured alone
// become child graphs of the root and of the bodies of two nested If nodes; `decide` is a kernel node.  The stages are
// stand-ins that do what the loop can see of real ones.

#include "checking.h"

namespace asag::checks {

#if CUDART_VERSION >= 13000
namespace {

constexpr int BATCH = 2, LEVELS = 2, ANCHORS = 40, CAPACITY = 16, SIDE = 900;
constexpr int FEWEST = 3, MOST = 6;  // selected anchors to go on, patches of an image

// Everything that the loop reads and writes, on one side.  Stage 0 is the backbone, stage i + 1 probes level i.
struct Memory {
    const float* anchors;       // (LEVELS, B, ANCHORS, 5)
    const int32_t* depth;       // (B,) the last level that each image is to be probed on, counted from 1
    const int64_t* image_size;  // (B, 2)
    uint8_t* selected;          // (LEVELS, B, ANCHORS)
    int64_t* origins;           // (LEVELS, B, CAPACITY, 2)
    int64_t* counts;            // (LEVELS, B, 4)
    int64_t* patch_count;       // (LEVELS, B)
    uint8_t* probed;            // (B, LEVELS)
    int32_t* any;               // (1,)
    int64_t* seen;              // (LEVELS + 1, B) what each stage leaves behind, 0 if it has not run
    int64_t* decoded;           // (B,)
};

// Thread `i` of a stage: anchor i % ANCHORS of image i / ANCHORS.  What it writes depends on all that it is given.
ASAG_HD void stage_step(const Memory& memory, int stage, int i) {
    const int image = i / ANCHORS, anchor = i % ANCHORS;
    if (stage > LEVELS) {  // the decoder
        if (anchor != 0) return;
        memory.decoded[image] = 0;
        for (int j = 0; j <= LEVELS; ++j) {
            memory.decoded[image] = 100003 * memory.decoded[image] + memory.seen[j * BATCH + image];
        }
        return;
    }
    const bool takes_part = stage == 0 || memory.probed[image * LEVELS + stage - 1] != 0;
    if (anchor == 0) {
        int64_t sum = stage == 0 ? 1 : 0;
        if (stage > 0 && takes_part) {
            const int before = (stage - 1) * BATCH + image;
            const int64_t patches = memory.patch_count[before];
            sum = patches;
            for (int64_t j = 0; j < 2 * patches; ++j) sum += (j + 1) * memory.origins[before * CAPACITY * 2 + j];
        }
        memory.seen[stage * BATCH + image] = sum;
    }
    if (stage == LEVELS) return;
    // An image that has stopped selects as well: what comes of it must be ignored.
    const bool goes_on = !takes_part || memory.depth[image] > stage;
    memory.selected[(stage * BATCH + image) * ANCHORS + anchor] = goes_on ? anchor % 3 != 0 : anchor < FEWEST - 1;
    if (anchor != 0) return;
    int64_t* counts = memory.counts + (stage * BATCH + image) * ASAG_COUNT_COLUMNS;
    counts[ASAG_SELECTED] = goes_on ? ANCHORS - (ANCHORS + 2) / 3 : FEWEST - 1;
    counts[ASAG_PATCHES] = 0;
    counts[ASAG_PASSING] = 5;
    counts[ASAG_PASSING_IF_PROBED] = 7;
}

__global__ void stage_kernel(const Memory memory, int stage) {
    stage_step(memory, stage, static_cast<int>(threadIdx.x));
}

AsagPatchNMS selection(const Memory& memory, int level) {
    return AsagPatchNMS{
        memory.anchors + level * BATCH * ANCHORS * 5, memory.selected + level * BATCH * ANCHORS, memory.image_size,
        memory.origins + level * BATCH * CAPACITY * 2, memory.counts + level * BATCH * ASAG_COUNT_COLUMNS,
        ASAG_FLOAT32, BATCH, ANCHORS, 16 >> level, 7, CAPACITY, 2048, 0.25f};
}

AsagDecide decision(const Memory& memory, int level) {
    return AsagDecide{
        memory.counts + level * BATCH * ASAG_COUNT_COLUMNS, memory.probed, memory.patch_count + level * BATCH,
        memory.any, 0, 0, BATCH, level, LEVELS, FEWEST, MOST};
}

// Both sides of the memory.
struct Sides {
    Twin<float> anchors{LEVELS * BATCH * ANCHORS * 5};
    Twin<int32_t> depth{BATCH}, any{1};
    Twin<int64_t> image_size{BATCH * 2}, origins{LEVELS * BATCH * CAPACITY * 2};
    Twin<int64_t> counts{LEVELS * BATCH * ASAG_COUNT_COLUMNS}, patch_count{LEVELS * BATCH};
    Twin<int64_t> seen{(LEVELS + 1) * BATCH}, decoded{BATCH};
    Twin<uint8_t> selected{LEVELS * BATCH * ANCHORS}, probed{BATCH * LEVELS};
    Memory host{}, device{};

    Sides() {
        for (size_t i = 0; i < anchors.host.size(); i += 5) {
            anchors.host[i] = uniform(0, SIDE), anchors.host[i + 1] = uniform(0, SIDE);
            anchors.host[i + 2] = anchors.host[i + 3] = 30, anchors.host[i + 4] = uniform(0, 1);
        }
        for (int64_t& side : image_size.host) side = SIDE;
        host = {
            anchors.host.data(), depth.host.data(), image_size.host.data(), selected.host.data(), origins.host.data(),
            counts.host.data(), patch_count.host.data(), probed.host.data(), any.host.data(), seen.host.data(),
            decoded.host.data()};
        device = {
            anchors.upload(), depth.upload(), image_size.upload(), selected.upload(), origins.upload(),
            counts.upload(), patch_count.upload(), probed.upload(), any.upload(), seen.upload(), decoded.upload()};
    }
};

void run_stage_on_host(const Memory& memory, int stage) {
    for (int i = 0; i < BATCH * ANCHORS; ++i) stage_step(memory, stage, i);
}

// The same loop on the host, by the host's decisions.
void run_on_host(Sides& sides) {
    const Memory& memory = sides.host;
    for (int64_t& value : sides.seen.host) value = 0;
    for (uint8_t& value : sides.probed.host) value = 0;
    for (int64_t& value : sides.patch_count.host) value = 0;
    run_stage_on_host(memory, 0);
    for (int level = 0; level < LEVELS; ++level) {
        const AsagPatchNMS select = selection(memory, level);
        const AsagDecide decide = decision(memory, level);
        must(asag_host_patch_nms(&select, &BLOCK), "loop: select on the host");
        must(asag_host_decide(&decide, &BLOCK), "loop: decide on the host");
        if (*memory.any == 0) break;
        run_stage_on_host(memory, level + 1);
    }
    run_stage_on_host(memory, LEVELS + 1);
}

// One graph of the loop, and the stream it runs on.
class LoopGraph {
public:
    explicit LoopGraph(const Memory& memory) : memory_(memory) {
        must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "loop: stream");
        cudaGraph_t root;
        must(cudaGraphCreate(&root, 0), "loop: graph");
        cudaGraphNode_t last = nullptr;
        last = add_clear(root, last, memory.seen, sizeof(int64_t) * (LEVELS + 1) * BATCH);
        last = add_clear(root, last, memory.probed, BATCH * LEVELS);
        last = add_clear(root, last, memory.patch_count, sizeof(int64_t) * LEVELS * BATCH);
        last = add_stage(root, last, 0);
        last = add_level(root, last, 0);
        add_stage(root, last, LEVELS + 1);
        must(cudaGraphInstantiate(&executable_, root, 0), "loop: instantiate");
        must(cudaGraphDestroy(root), "loop: destroy");
    }

    ~LoopGraph() {
        cudaGraphExecDestroy(executable_);
        cudaStreamDestroy(stream_);
    }

    LoopGraph(const LoopGraph&) = delete;
    LoopGraph& operator=(const LoopGraph&) = delete;

    void launch() {
        must(cudaGraphLaunch(executable_, stream_), "loop: launch");
        must(cudaStreamSynchronize(stream_), "loop: run");
    }

private:
    static size_t count_of(const cudaGraphNode_t& last) { return last == nullptr ? 0 : 1; }

    static cudaGraphNode_t add_clear(cudaGraph_t graph, cudaGraphNode_t last, void* memory, size_t bytes) {
        cudaMemsetParams clear = {};
        clear.dst = memory;
        clear.elementSize = 1;
        clear.width = bytes;
        clear.height = 1;
        cudaGraphNode_t added;
        must(cudaGraphAddMemsetNode(&added, graph, &last, count_of(last), &clear), "loop: memset");
        return added;
    }

    // A stage, with the selection of the next level's patches, captured alone: if that fails, nothing else is harmed.
    cudaGraphNode_t add_stage(cudaGraph_t graph, cudaGraphNode_t last, int stage) {
        cudaGraph_t captured = nullptr;
        must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "loop: capture");
        stage_kernel<<<1, BATCH * ANCHORS, 0, stream_>>>(memory_, stage);
        if (stage < LEVELS) {
            const AsagPatchNMS select = selection(memory_, stage);
            must(asag_cuda_patch_nms(&select, stream_), "loop: select");
        }
        must(cudaStreamEndCapture(stream_, &captured), "loop: end of capture");
        cudaGraphNode_t added;
        must(cudaGraphAddChildGraphNode(&added, graph, &last, count_of(last), captured), "loop: child graph");
        must(cudaGraphDestroy(captured), "loop: destroy a stage");  // the node has its own copy
        return added;
    }

    // Decides, and in the body of an If node probes the level, and after it the next one.
    cudaGraphNode_t add_level(cudaGraph_t graph, cudaGraphNode_t last, int level) {
        if (level == LEVELS) return last;
        AsagDecide decide = decision(memory_, level);
        cudaGraphConditionalHandle handle;
        must(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault), "loop: handle");
        decide.condition = handle;
        decide.conditional = 1;
        void *before[] = {last}, *decided = nullptr;
        must(asag_cuda_add_decide(&decide, graph, before, 1, &decided), "loop: decide");

        cudaGraphNodeParams node = {};
        node.type = cudaGraphNodeTypeConditional;
        node.conditional.handle = handle;
        node.conditional.type = cudaGraphCondTypeIf;
        node.conditional.size = 1;
        const cudaGraphNode_t after = static_cast<cudaGraphNode_t>(decided);
        cudaGraphNode_t added;
        must(cudaGraphAddNode(&added, graph, &after, nullptr, 1, &node), "loop: If node");
        const cudaGraph_t body = node.conditional.phGraph_out[0];
        add_level(body, add_stage(body, nullptr, level + 1), level + 1);
        return added;
    }

    const Memory memory_;
    cudaStream_t stream_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

void check_depths(Sides& sides, LoopGraph& graph, int first, int second) {
    const std::string name = "conditional graph to level " + std::to_string(std::max(first, second)) + ", images to " +
                             std::to_string(first) + " and " + std::to_string(second);
    sides.depth.host = {first, second};
    sides.depth.upload();
    graph.launch();
    run_on_host(sides);
    compare(sides.probed, 0, name + ": probed");
    compare(sides.patch_count, 0, name + ": patches");
    compare(sides.decoded, 0, name + ": result");
    for (int image = 0; image < BATCH; ++image) {  // that the host's loop went as far as it was meant to
        const int depth = image == 0 ? first : second;
        for (int level = 0; level < LEVELS; ++level) {
            const size_t at = static_cast<size_t>(image * LEVELS + level);
            if (sides.probed.host[at] == (level < depth ? 1 : 0)) continue;
            ++failures;
            std::fprintf(stderr, "failed: %s: the host decides otherwise than was asked for\n", name.c_str());
        }
    }
}

}  // namespace

// The same graph over batches whose images stop at any level, in any combination.
void check_conditional_graph() {
    Sides sides;
    LoopGraph graph(sides.device);
    for (int first = 0; first <= LEVELS; ++first) {
        for (int second = 0; second <= LEVELS; ++second) check_depths(sides, graph, first, second);
    }
}
#else
void check_conditional_graph() {}
#endif

}  // namespace asag::checks
