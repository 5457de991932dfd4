// AsagPatchNMS as a TensorRT plugin; see plugins/README.md for its inputs, outputs and attributes.
#pragma once

#include "plugin.h"

namespace asag {

// Inputs: anchors (B, N, 5), selected (B, N), image_size (B, 2).  Outputs: origins (B, capacity, 2), counts (B,).
class PatchNMSPlugin final : public Plugin<PatchNMSPlugin> {
public:
    static constexpr const char* NAME = "AsagPatchNMS";
    static constexpr int32_t OUTPUTS = 2;

    template <class Visit>
    void attributes(Visit& visit) {
        visit("stride", stride_);
        visit("patch_size", patch_size_);
        visit("iou_threshold", iou_threshold_);
        visit("capacity", capacity_);
        visit("max_candidates", max_candidates_);
    }

    int32_t inputs() const { return 3; }
    int32_t rank_of(int32_t input, int32_t) const { return input == 0 ? 3 : 2; }

    nvinfer1::DataType type_of(int32_t position, int32_t, nvinfer1::DataType first) const {
        if (position == 0) return first;
        return position == 1 ? nvinfer1::DataType::kBOOL : nvinfer1::DataType::kINT64;
    }

    int check() const {
        const AsagPatchNMS arguments = with_attributes();
        return asag::check(&arguments);
    }

    void shapes(
        const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::DimsExprs* outputs,
        nvinfer1::IExprBuilder& builder) const {
        outputs[0].nbDims = 3;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = builder.constant(capacity_);
        outputs[0].d[2] = builder.constant(2);
        outputs[1].nbDims = 1;
        outputs[1].d[0] = inputs[0].d[0];
    }

    int run(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* data,
        void* const* out, cudaStream_t stream) const {
        AsagPatchNMS arguments = with_attributes();
        arguments.anchors = data[0];
        arguments.selected = static_cast<const uint8_t*>(data[1]);
        arguments.image_size = static_cast<const int64_t*>(data[2]);
        arguments.origins = static_cast<int64_t*>(out[0]);
        arguments.counts = static_cast<int64_t*>(out[1]);
        arguments.type = element_type(inputs[0].type);
        arguments.batch = size(inputs[0], 0);
        arguments.anchor_count = size(inputs[0], 1);
        return asag_cuda_patch_nms(&arguments, stream);
    }

private:
    AsagPatchNMS with_attributes() const {
        AsagPatchNMS arguments = {};
        arguments.stride = stride_;
        arguments.patch_size = patch_size_;
        arguments.iou_threshold = iou_threshold_;
        arguments.capacity = capacity_;
        arguments.max_candidates = max_candidates_;
        return arguments;
    }

    int32_t stride_ = 0;
    int32_t patch_size_ = 0;
    float iou_threshold_ = 0;
    int32_t capacity_ = 0;
    int32_t max_candidates_ = 0;
};

}  // namespace asag
