// Checks every kernel on the GPU against the same steps on the CPU, without Python; to be run by itself and under
// compute-sanitizer (memcheck, racecheck, initcheck, synccheck):
//
//     asag_check_device [kernels | graph]
//
// `graph` is the loop as a CUDA graph with conditional nodes, `kernels` is all else; without a word it is both.
// Prints what differs and returns 1, or returns 0; 77 if there is no GPU, 2 for another word.

#include "checking.h"

namespace {

using namespace asag::checks;

template <class T>
struct Maps {
    std::vector<Twin<T>*> levels;
    AsagPyramid host{}, device{};

    Maps(int batch, int height, int width, int channels) {
        host.levels = ASAG_MAX_LEVELS;
        host.batch = batch;
        host.channels = channels;
        host.type = std::is_same_v<T, asag::Half> ? ASAG_FLOAT16 : ASAG_FLOAT32;
        for (int i = 0; i < ASAG_MAX_LEVELS; ++i) {
            host.strides[i] = 4 << i;
            host.heights[i] = (height + host.strides[i] - 1) / host.strides[i];
            host.widths[i] = (width + host.strides[i] - 1) / host.strides[i];
            const size_t count = static_cast<size_t>(batch) * host.heights[i] * host.widths[i] * channels;
            levels.push_back(new Twin<T>(count));
            for (T& value : levels.back()->host) value = asag::from_float<T>(uniform(-1, 1));
        }
        device = host;
        for (int i = 0; i < ASAG_MAX_LEVELS; ++i) {
            host.maps[i] = levels[i]->host.data();
            device.maps[i] = levels[i]->upload();
        }
    }

    ~Maps() {
        for (Twin<T>* level : levels) delete level;
    }
};

// Half precision may round the other way where the sums differ in their last bit.
template <class T>
constexpr double tolerance() {
    return std::is_same_v<T, asag::Half> ? 2e-3 : 1e-5;
}

template <class T>
void check_roi_align(int channels, const std::string& name) {
    constexpr int BATCH = 2, QUERIES = 60;
    Maps<T> maps(BATCH, 203, 317, channels);
    Twin<float> boxes(BATCH * QUERIES * 4);
    for (int i = 0; i < BATCH * QUERIES; ++i) {
        float* box = &boxes.host[4 * i];
        const float x = uniform(-40, 350), y = uniform(-40, 240), half = std::exp(uniform(0, 5.5f));
        box[0] = x - half, box[1] = y - half, box[2] = x + half, box[3] = y + half * uniform(0.2f, 2);
    }
    boxes.host[0] = NAN;
    Twin<T> out(static_cast<size_t>(BATCH) * QUERIES * 49 * channels);
    const AsagMultiscaleRoIAlign on_host = {maps.host, boxes.host.data(), out.host.data(), QUERIES};
    const AsagMultiscaleRoIAlign on_device = {maps.device, boxes.upload(), out.upload(), QUERIES};
    must(asag_host_multiscale_roi_align(&on_host, &BLOCK), name);
    must(asag_cuda_multiscale_roi_align(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    const size_t first = 49 * static_cast<size_t>(channels);  // of the box that is none: whatever comes out
    std::vector<T> device = out.download();
    for (size_t i = 0; i < first; ++i) out.host[i] = device[i];
    compare(out, tolerance<T>(), name);
}

template <class T>
void check_pyramid_sample(int channels, int groups, const std::string& name) {
    constexpr int BATCH = 2, QUERIES = 30, POINTS = 40;
    Maps<T> maps(BATCH, 203, 317, channels);
    const size_t points = static_cast<size_t>(BATCH) * QUERIES * groups * POINTS;
    Twin<float> xy(points * 2), weight(points * ASAG_MAX_LEVELS);
    for (float& value : xy.host) value = uniform(-60, 380);
    for (float& value : weight.host) value = uniform(0, 0.5f);
    xy.host[0] = NAN, xy.host[2] = INFINITY, xy.host[4] = -3e38f;
    Twin<T> out(points * (channels / groups));
    const AsagPyramidSample on_host = {
        maps.host, xy.host.data(), weight.host.data(), out.host.data(), QUERIES, groups, POINTS};
    const AsagPyramidSample on_device = {
        maps.device, xy.upload(), weight.upload(), out.upload(), QUERIES, groups, POINTS};
    must(asag_host_pyramid_sample(&on_host, &BLOCK), name);
    must(asag_cuda_pyramid_sample(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    compare(out, tolerance<T>(), name);
}

template <class T>
void check_deformable_sample(int channels, int groups, const std::string& name) {
    constexpr int BATCH = 2, QUERIES = 300, POINTS = 4;
    Maps<T> maps(BATCH, 203, 317, channels);
    const size_t points = static_cast<size_t>(BATCH) * QUERIES * groups * ASAG_MAX_LEVELS * POINTS;
    Twin<float> xy(points * 2), weight(points);
    for (float& value : xy.host) value = uniform(-0.2f, 1.2f);
    for (float& value : weight.host) value = uniform(0, 0.1f);
    xy.host[0] = NAN, xy.host[2] = INFINITY, xy.host[4] = -3e38f;
    Twin<T> out(static_cast<size_t>(BATCH) * QUERIES * channels);
    const AsagDeformableSample on_host = {
        maps.host, xy.host.data(), weight.host.data(), out.host.data(), QUERIES, groups, POINTS};
    const AsagDeformableSample on_device = {
        maps.device, xy.upload(), weight.upload(), out.upload(), QUERIES, groups, POINTS};
    must(asag_host_deformable_sample(&on_host, &BLOCK), name);
    must(asag_cuda_deformable_sample(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    compare(out, tolerance<T>(), name);
}

struct Candidates {
    Twin<float> anchors;
    Twin<uint8_t> flags;
    Twin<int64_t> image_size;

    Candidates(int batch, int count, float share)
        : anchors(5 * batch * count), flags(batch * count), image_size(2 * batch) {
        for (int i = 0; i < batch * count; ++i) {
            float* anchor = &anchors.host[5 * i];
            anchor[0] = uniform(0, 1333), anchor[1] = uniform(0, 800), anchor[2] = anchor[3] = uniform(3, 90);
            anchor[4] = std::round(uniform(0, 1) * 50) / 50;  // many a tie
            flags.host[i] = uniform(0, 1) < share;
        }
        for (int i = 0; i < batch; ++i) {
            image_size.host[2 * i] = 800 - 96 * i;
            image_size.host[2 * i + 1] = 1333 - 50 * i;
        }
    }
};

void check_patch_nms(int count, float share, int candidates) {
    constexpr int BATCH = 3, CAPACITY = 128;
    Candidates given(BATCH, count, share);
    Twin<int64_t> origins(BATCH * CAPACITY * 2), counts(BATCH * ASAG_COUNT_COLUMNS);
    for (int64_t& value : counts.host) value = static_cast<int64_t>(uniform(100, 999));  // other columns stay
    const AsagPatchNMS on_host = {
        given.anchors.host.data(), given.flags.host.data(), given.image_size.host.data(), origins.host.data(),
        counts.host.data(), ASAG_FLOAT32, BATCH, count, 16, 15, CAPACITY, candidates, 0.25f};
    AsagPatchNMS on_device = on_host;
    on_device.anchors = given.anchors.upload();
    on_device.selected = given.flags.upload();
    on_device.image_size = given.image_size.upload();
    on_device.origins = origins.upload();
    on_device.counts = counts.upload();
    const std::string name = "patch NMS of " + std::to_string(count) + ", " + std::to_string(candidates) + " at most";
    must(asag_host_patch_nms(&on_host, &BLOCK), name);
    must(asag_cuda_patch_nms(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    compare(origins, 0, name + ": origins");
    compare(counts, 0, name + ": counts");
}

void check_pad_anchors(int count, float share, int floor) {
    constexpr int BATCH = 3, SLOTS = 224;
    Candidates given(BATCH, count, share);
    Twin<float> queries(BATCH * SLOTS * 4);
    Twin<int64_t> counts(BATCH);
    const AsagPadAnchors on_host = {
        given.anchors.host.data(), given.flags.host.data(), given.image_size.host.data(), queries.host.data(),
        counts.host.data(), ASAG_FLOAT32, BATCH, count, SLOTS, 250, floor, 200};
    AsagPadAnchors on_device = on_host;
    on_device.anchors = given.anchors.upload();
    on_device.keep = given.flags.upload();
    on_device.image_size = given.image_size.upload();
    on_device.queries = queries.upload();
    on_device.counts = counts.upload();
    const std::string name = "pad anchors of " + std::to_string(count) + ", floor " + std::to_string(floor);
    must(asag_host_pad_anchors(&on_host, &BLOCK), name);
    must(asag_cuda_pad_anchors(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    compare(queries, 0, name + ": queries");
    compare(counts, 0, name + ": counts");
}

void check_preprocess(int new_height, int new_width, int room, int type) {
    constexpr int HEIGHT = 190, WIDTH = 270;
    Twin<uint8_t> image(3 * HEIGHT * WIDTH);
    for (uint8_t& value : image.host) value = static_cast<uint8_t>(uniform(0, 256));
    const int batch_height = new_height + room, batch_width = new_width + room;
    const size_t values = 3 * static_cast<size_t>(batch_height) * batch_width;
    Twin<uint8_t> bytes(values);
    Twin<float> floats(values);
    AsagPreprocess on_host = {};
    on_host.image = image.host.data();
    on_host.out = type == ASAG_UINT8 ? static_cast<void*>(bytes.host.data()) : floats.host.data();
    on_host.height = HEIGHT, on_host.width = WIDTH;
    on_host.new_height = new_height, on_host.new_width = new_width;
    on_host.batch_height = batch_height, on_host.batch_width = batch_width;
    on_host.type = type;
    on_host.bgr = new_height % 2;
    for (int i = 0; i < 3; ++i) on_host.mean[i] = 100.0f + i, on_host.deviation[i] = 58.395f - i;
    AsagPreprocess on_device = on_host;
    on_device.image = image.upload();
    on_device.out = type == ASAG_UINT8 ? static_cast<void*>(bytes.upload()) : floats.upload();
    const std::string name = "preprocess to " + std::to_string(new_height) + " x " + std::to_string(new_width);
    must(asag_host_preprocess(&on_host, &BLOCK), name);
    must(asag_cuda_preprocess(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    if (type == ASAG_UINT8) compare(bytes, 0, name + ", bytes");
    if (type != ASAG_UINT8) compare(floats, 0, name + ", floats");
}

void check_postprocess(int count, float nms_iou) {
    constexpr int BATCH = 3;
    Twin<float> scores(BATCH * count), boxes(4 * BATCH * count), xyxy(4 * BATCH * count), confidence(BATCH * count);
    Twin<int64_t> labels(BATCH * count), shape(2 * BATCH), class_id(BATCH * count), counts(BATCH);
    for (int i = 0; i < BATCH * count; ++i) {
        scores.host[i] = std::round(uniform(-0.2f, 1) * 40) / 40;
        labels.host[i] = static_cast<int64_t>(uniform(0, 3));
        float* box = &boxes.host[4 * i];
        box[0] = uniform(-0.1f, 0.9f), box[1] = uniform(-0.1f, 0.9f);
        box[2] = box[0] + uniform(0, 0.4f), box[3] = box[1] + uniform(0, 0.4f);
    }
    for (int64_t& side : shape.host) side = static_cast<int64_t>(uniform(20, 1400));
    const AsagPostprocess on_host = {
        scores.host.data(), labels.host.data(), boxes.host.data(), shape.host.data(), xyxy.host.data(),
        confidence.host.data(), class_id.host.data(), counts.host.data(), ASAG_FLOAT32, BATCH, count, nms_iou};
    const AsagPostprocess on_device = {
        scores.upload(), labels.upload(), boxes.upload(), shape.upload(), xyxy.upload(),
        confidence.upload(), class_id.upload(), counts.upload(), ASAG_FLOAT32, BATCH, count, nms_iou};
    const std::string name = "postprocess of " + std::to_string(count);
    must(asag_host_postprocess(&on_host, &BLOCK), name);
    must(asag_cuda_postprocess(&on_device, nullptr), name);
    must(cudaDeviceSynchronize(), name);
    compare(xyxy, 0, name + ": boxes");
    compare(confidence, 0, name + ": confidence");
    compare(class_id, 0, name + ": classes");
    compare(counts, 0, name + ": counts");
}

void check_kernels() {
    check_roi_align<float>(64, "RoIAlign, float, 64 channels");
    check_roi_align<float>(5, "RoIAlign, float, 5 channels");
    check_roi_align<asag::Half>(64, "RoIAlign, half, 64 channels");
    check_roi_align<asag::Half>(5, "RoIAlign, half, 5 channels");
    check_pyramid_sample<float>(64, 4, "pyramid sample, float, 64 channels");
    check_pyramid_sample<float>(6, 3, "pyramid sample, float, 6 channels");
    check_pyramid_sample<asag::Half>(64, 4, "pyramid sample, half, 64 channels");
    check_pyramid_sample<asag::Half>(6, 3, "pyramid sample, half, 6 channels");
    check_deformable_sample<float>(64, 8, "deformable sample, float, 64 channels");
    check_deformable_sample<float>(6, 3, "deformable sample, float, 6 channels");
    check_deformable_sample<asag::Half>(64, 8, "deformable sample, half, 64 channels");
    check_deformable_sample<asag::Half>(6, 3, "deformable sample, half, 6 channels");
    for (int count : {1, 250, 2560}) {
        check_patch_nms(count, 0.4f, 2048);
        check_patch_nms(count, 1.0f, 100);
        check_pad_anchors(count, 0.05f, 5);
        check_pad_anchors(count, 0.9f, 5);
        check_pad_anchors(count, 0.1f, 200);
    }
    for (int type : {ASAG_UINT8, ASAG_FLOAT32}) {
        check_preprocess(400, 568, 7, type);
        check_preprocess(190, 301, 0, type);
        check_preprocess(100, 142, 5, type);
        check_preprocess(33, 65, 70, type);
        check_preprocess(95, 135, 9, type);
        check_preprocess(190, 270, 33, type);
    }
    check_postprocess(100, -1);
    check_postprocess(100, 0.5f);
    check_postprocess(700, 0.3f);
}

}  // namespace

int main(int count, char** words) {
    const std::string part = count > 1 ? words[1] : "";
    if (count > 2 || (count == 2 && part != "kernels" && part != "graph")) {
        std::fprintf(stderr, "usage: asag_check_device [kernels | graph]\n");
        return 2;
    }
    // By line, so that whatever ends the process, what it did last can be read.
    std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || devices == 0) {
        std::fprintf(stderr, "no GPU: %s\n", cudaGetErrorString(status));
        return NO_GPU;
    }
    if (part != "graph") check_kernels();
    if (part != "kernels") check_conditional_graph();
    if (failures == 0) std::printf("the GPU computes what the CPU does\n");
    return failures == 0 ? 0 : 1;
}
