// AsagPyramidSample as a TensorRT plugin; see plugins/README.md for its inputs, outputs and attributes.
#pragma once

#include "plugin.h"

namespace asag {

// Inputs: a map per level (B, h, w, C), xy (B, Q, G, P, 2), weight (B, Q, G, P, levels).
// Output: (B, Q, G, P, C / G).
class PyramidSamplePlugin final : public Plugin<PyramidSamplePlugin> {
public:
    static constexpr const char* NAME = "AsagPyramidSample";
    static constexpr int32_t OUTPUTS = 1;

    template <class Visit>
    void attributes(Visit& visit) {
        visit("strides", strides_);
    }

    int32_t inputs() const { return strides_.count + 2; }
    int32_t rank_of(int32_t input, int32_t) const { return input < strides_.count ? 4 : 5; }

    nvinfer1::DataType type_of(int32_t position, int32_t inputs, nvinfer1::DataType first) const {
        return position >= strides_.count && position < inputs ? nvinfer1::DataType::kFLOAT : first;
    }

    int check() const {
        AsagPyramidSample arguments = {};
        arguments.features = empty_pyramid(strides_, 1);
        arguments.groups = 1;
        return asag::check(&arguments);
    }

    void shapes(
        const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::DimsExprs* outputs,
        nvinfer1::IExprBuilder& builder) const {
        const nvinfer1::DimsExprs& xy = inputs[strides_.count];
        outputs[0].nbDims = 5;
        for (int32_t i = 0; i < 4; ++i) outputs[0].d[i] = xy.d[i];
        outputs[0].d[4] = builder.operation(nvinfer1::DimensionOperation::kFLOOR_DIV, *inputs[0].d[3], *xy.d[2]);
    }

    int run(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* data,
        void* const* out, cudaStream_t stream) const {
        const nvinfer1::PluginTensorDesc& xy = inputs[strides_.count];
        AsagPyramidSample arguments = {};
        arguments.features = pyramid(strides_, inputs, data);
        arguments.xy = static_cast<const float*>(data[strides_.count]);
        arguments.weight = static_cast<const float*>(data[strides_.count + 1]);
        arguments.out = out[0];
        arguments.queries = size(xy, 1);
        arguments.groups = size(xy, 2);
        arguments.points = size(xy, 3);
        return asag_cuda_pyramid_sample(&arguments, stream);
    }

private:
    Strides strides_;
};

}  // namespace asag
