// AsagPadAnchors as a TensorRT plugin; see plugins/README.md for its inputs, outputs and attributes.
#pragma once

#include "plugin.h"

namespace asag {

// Inputs: anchors (B, N, 5), keep (B, N), image_size (B, 2), slots (Q,), of which only the length matters.
// Outputs: queries (B, Q, 4), counts (B,).
class PadAnchorsPlugin final : public Plugin<PadAnchorsPlugin> {
public:
    static constexpr const char* NAME = "AsagPadAnchors";
    static constexpr int32_t OUTPUTS = 2;

    template <class Visit>
    void attributes(Visit& visit) {
        visit("first_level", first_level_);
        visit("floor", floor_);
        visit("cap", cap_);
    }

    int32_t inputs() const { return 4; }
    int32_t rank_of(int32_t input, int32_t) const { return input == 0 ? 3 : input == 3 ? 1 : 2; }

    nvinfer1::DataType type_of(int32_t position, int32_t inputs, nvinfer1::DataType first) const {
        if (position == 0 || position == inputs) return first;
        return position == 1 ? nvinfer1::DataType::kBOOL : nvinfer1::DataType::kINT64;
    }

    int check() const {
        const AsagPadAnchors arguments = with_attributes();
        return asag::check(&arguments);
    }

    void shapes(
        const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::DimsExprs* outputs,
        nvinfer1::IExprBuilder& builder) const {
        outputs[0].nbDims = 3;
        outputs[0].d[0] = inputs[0].d[0];
        outputs[0].d[1] = inputs[3].d[0];
        outputs[0].d[2] = builder.constant(4);
        outputs[1].nbDims = 1;
        outputs[1].d[0] = inputs[0].d[0];
    }

    int run(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* data,
        void* const* out, cudaStream_t stream) const {
        AsagPadAnchors arguments = with_attributes();
        arguments.anchors = data[0];
        arguments.keep = static_cast<const uint8_t*>(data[1]);
        arguments.image_size = static_cast<const int64_t*>(data[2]);
        arguments.queries = out[0];
        arguments.counts = static_cast<int64_t*>(out[1]);
        arguments.type = element_type(inputs[0].type);
        arguments.batch = size(inputs[0], 0);
        arguments.anchor_count = size(inputs[0], 1);
        arguments.slots = size(inputs[3], 0);
        return asag_cuda_pad_anchors(&arguments, stream);
    }

private:
    AsagPadAnchors with_attributes() const {
        AsagPadAnchors arguments = {};
        arguments.first_level = first_level_;
        arguments.floor = floor_;
        arguments.cap = cap_;
        return arguments;
    }

    int32_t first_level_ = 0;
    int32_t floor_ = 0;
    int32_t cap_ = 0;
};

}  // namespace asag
