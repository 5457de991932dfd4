// AsagDeformableSample as a TensorRT plugin; see plugins/README.md for its inputs and outputs.
#pragma once

#include "plugin.h"

namespace asag {

// Inputs: four maps (B, h, w, C), xy (B, Q, G, 4, P, 2), weight (B, Q, G, 4, P).  Output: (B, Q, C).
class DeformableSamplePlugin final : public Plugin<DeformableSamplePlugin> {
public:
    static constexpr const char* NAME = "AsagDeformableSample";
    static constexpr int32_t OUTPUTS = 1;

    template <class Visit>
    void attributes(Visit&) {}

    int32_t inputs() const { return LEVELS + 2; }
    int32_t rank_of(int32_t input, int32_t) const { return input < LEVELS ? 4 : input == LEVELS ? 6 : 5; }

    nvinfer1::DataType type_of(int32_t position, int32_t inputs, nvinfer1::DataType first) const {
        return position >= LEVELS && position < inputs ? nvinfer1::DataType::kFLOAT : first;
    }

    int check() const { return ASAG_OK; }

    void shapes(
        const nvinfer1::DimsExprs* inputs, int32_t, nvinfer1::DimsExprs* outputs, nvinfer1::IExprBuilder&) const {
        const nvinfer1::DimsExprs& xy = inputs[LEVELS];
        outputs[0].nbDims = 3;
        outputs[0].d[0] = xy.d[0];
        outputs[0].d[1] = xy.d[1];
        outputs[0].d[2] = inputs[0].d[3];
    }

    int run(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*, const void* const* data,
        void* const* out, cudaStream_t stream) const {
        const nvinfer1::PluginTensorDesc& xy = inputs[LEVELS];
        if (size(xy, 3) != LEVELS) {
            return problem(ASAG_OUT_OF_RANGE, "xy has %d levels, expected one for each of %d maps", size(xy, 3), LEVELS);
        }
        Strides none;
        none.count = LEVELS;
        AsagDeformableSample arguments = {};
        arguments.features = pyramid(none, inputs, data);
        arguments.xy = static_cast<const float*>(data[LEVELS]);
        arguments.weight = static_cast<const float*>(data[LEVELS + 1]);
        arguments.out = out[0];
        arguments.queries = size(xy, 1);
        arguments.groups = size(xy, 2);
        arguments.points = size(xy, 4);
        return asag_cuda_deformable_sample(&arguments, stream);
    }

private:
    static constexpr int32_t LEVELS = ASAG_MAX_LEVELS;
};

}  // namespace asag
