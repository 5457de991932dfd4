// AsagMultiscaleRoIAlign as a TensorRT plugin; see plugins/README.md for its inputs, outputs and attributes.
#pragma once

#include "asag/multiscale_roi_align.h"
#include "plugin.h"

namespace asag {

// Inputs: a map per level (B, h, w, C), boxes (B, Q, 4).  Output: (B, Q, 7, 7, C).
class MultiscaleRoIAlignPlugin final : public Plugin<MultiscaleRoIAlignPlugin> {
public:
    static constexpr const char* NAME = "AsagMultiscaleRoIAlign";
    static constexpr int32_t OUTPUTS = 1;

    template <class Visit>
    void attributes(Visit& visit) {
        visit("strides", strides_);
    }

    int32_t inputs() const { return strides_.count + 1; }
    int32_t rank_of(int32_t input, int32_t) const { return input < strides_.count ? 4 : 3; }

    nvinfer1::DataType type_of(int32_t position, int32_t, nvinfer1::DataType first) const {
        return position == strides_.count ? nvinfer1::DataType::kFLOAT : first;
    }

    int check() const {
        AsagMultiscaleRoIAlign arguments = {};
        arguments.features = empty_pyramid(strides_, 1);
        return asag::check(&arguments);
    }

    void shapes(
        const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::DimsExprs* outputs,
        nvinfer1::IExprBuilder& builder) const {
        const nvinfer1::DimsExprs& boxes = inputs[strides_.count];
        outputs[0].nbDims = 5;
        outputs[0].d[0] = boxes.d[0];
        outputs[0].d[1] = boxes.d[1];
        outputs[0].d[2] = outputs[0].d[3] = builder.constant(ROI_BINS);
        outputs[0].d[4] = inputs[0].d[3];
    }

    int run(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* data,
        void* const* out, cudaStream_t stream) const {
        AsagMultiscaleRoIAlign arguments = {};
        arguments.features = pyramid(strides_, inputs, data);
        arguments.boxes = static_cast<const float*>(data[strides_.count]);
        arguments.out = out[0];
        arguments.queries = size(inputs[strides_.count], 1);
        return asag_cuda_multiscale_roi_align(&arguments, stream);
    }

private:
    Strides strides_;
};

}  // namespace asag
