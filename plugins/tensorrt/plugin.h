// What the plugins have in common: TensorRT's three capabilities around a list of attributes and one kernel call.
#pragma once

#include <NvInferRuntime.h>

#include <new>

#include "attributes.h"

namespace asag {

// The ONNX parser looks a node up as (op_type, plugin_version or "1", plugin_namespace or "").
constexpr const char* PLUGIN_VERSION = "1";
constexpr const char* PLUGIN_NAMESPACE = "";

// Derived provides: NAME, INPUTS (0: as it says itself), OUTPUTS; attributes(visit); check(); fits(inputs);
// type_of(position, inputs, types of the inputs before); shapes(inputs, outputs, builder); and
// run(inputs, outputs, input pointers, output pointers, stream).
template <class Derived>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin() = default;
    Plugin(const Plugin& other)
        : nvinfer1::IPluginV3(other),
          nvinfer1::IPluginV3OneCore(other),
          nvinfer1::IPluginV3OneBuild(other),
          nvinfer1::IPluginV3OneRuntime(other) {}  // the fields point into the plugin, and so are its own

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Derived(self()); }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const char* getPluginName() const noexcept override { return Derived::NAME; }
    const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
    const char* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }
    int32_t getNbOutputs() const noexcept override { return Derived::OUTPUTS; }

    int32_t configurePlugin(
        const nvinfer1::DynamicPluginTensorDesc*, int32_t inputs, const nvinfer1::DynamicPluginTensorDesc*,
        int32_t outputs) noexcept override {
        return counts(inputs, outputs);
    }

    int32_t onShapeChange(
        const nvinfer1::PluginTensorDesc*, int32_t inputs, const nvinfer1::PluginTensorDesc*,
        int32_t outputs) noexcept override {
        return counts(inputs, outputs);
    }

    int32_t getOutputDataTypes(
        nvinfer1::DataType* types, int32_t outputs, const nvinfer1::DataType* input_types,
        int32_t inputs) const noexcept override {
        if (counts(inputs, outputs) != ASAG_OK) return -1;
        for (int32_t i = 0; i < outputs; ++i) types[i] = self().type_of(inputs + i, inputs, input_types[0]);
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
        int32_t outputs) noexcept override {
        if (counts(inputs, outputs) != ASAG_OK) return false;
        const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (position == 0) {  // the one whose type is free; others follow it
            return tensor.type == nvinfer1::DataType::kFLOAT || tensor.type == nvinfer1::DataType::kHALF;
        }
        return tensor.type == self().type_of(position, inputs, tensors[0].desc.type);
    }

    int32_t getOutputShapes(
        const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*, int32_t,
        nvinfer1::DimsExprs* outputs, int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override {
        if (counts(input_count, output_count) != ASAG_OK) return -1;
        for (int32_t i = 0; i < input_count; ++i) {
            const int32_t rank = self().rank_of(i, input_count);
            if (inputs[i].nbDims != rank) {
                return problem(
                    ASAG_OUT_OF_RANGE, "input %d of %s has %d dimensions, expected %d", i, Derived::NAME,
                    inputs[i].nbDims, rank);
            }
        }
        self().shapes(inputs, input_count, outputs, builder);
        return 0;
    }

    int32_t enqueue(
        const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
        const void* const* input_data, void* const* output_data, void*, cudaStream_t stream) noexcept override {
        return self().run(inputs, outputs, input_data, output_data, stream);
    }

    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
        WriteFields writer;
        self().attributes(writer);
        fields_.swap(writer.fields);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

protected:
    // ASAG_FLOAT32 or ASAG_FLOAT16.
    static int32_t element_type(nvinfer1::DataType type) {
        return type == nvinfer1::DataType::kHALF ? ASAG_FLOAT16 : ASAG_FLOAT32;
    }

    static int32_t size(const nvinfer1::PluginTensorDesc& tensor, int32_t axis) {
        return static_cast<int32_t>(tensor.dims.d[axis]);
    }

    // A pyramid of `strides.count` maps, which are the first inputs; without data where there is none yet.
    static AsagPyramid pyramid(
        const Strides& strides, const nvinfer1::PluginTensorDesc* inputs, const void* const* data) {
        AsagPyramid features = {};
        features.levels = strides.count;
        for (int32_t i = 0; i < strides.count; ++i) {
            features.maps[i] = data[i];
            features.heights[i] = size(inputs[i], 1);
            features.widths[i] = size(inputs[i], 2);
            features.strides[i] = strides.values[i];
        }
        features.batch = size(inputs[0], 0);
        features.channels = size(inputs[0], 3);
        features.type = element_type(inputs[0].type);
        return features;
    }

    // A pyramid with nothing in it, on which the attributes can be checked.
    static AsagPyramid empty_pyramid(const Strides& strides, int32_t channels) {
        AsagPyramid features = {};
        features.levels = strides.count;
        for (int32_t i = 0; i < strides.count; ++i) {
            features.heights[i] = features.widths[i] = 1;
            features.strides[i] = strides.values[i];
        }
        features.channels = channels;
        return features;
    }

private:
    Derived& self() { return static_cast<Derived&>(*this); }
    const Derived& self() const { return static_cast<const Derived&>(*this); }

    int counts(int32_t inputs, int32_t outputs) const {
        const int32_t expected = self().inputs();
        if (inputs == expected && outputs == Derived::OUTPUTS) return ASAG_OK;
        return problem(
            ASAG_OUT_OF_RANGE, "%s has %d inputs and %d outputs, expected %d and %d", Derived::NAME, inputs, outputs,
            expected, Derived::OUTPUTS);
    }

    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// Makes plugins from the attributes of an ONNX node, or of a serialised engine.
template <class Made>
class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    Creator() {
        Made none;
        none.attributes(declared_);
        collection_ = {static_cast<int32_t>(declared_.fields.size()), declared_.fields.data()};
    }

    nvinfer1::IPluginV3* createPlugin(
        const char*, const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override {
        if (fields == nullptr) {
            problem(ASAG_NULL_POINTER, "%s was given no attributes", Made::NAME);
            return nullptr;
        }
        Made* plugin = new (std::nothrow) Made;
        if (plugin == nullptr) {
            problem(ASAG_NO_MEMORY, "no memory is left for a plugin");
            return nullptr;
        }
        ReadFields reader(*fields);
        plugin->attributes(reader);
        if (reader.status() == ASAG_OK && plugin->check() == ASAG_OK) return plugin;
        delete plugin;
        return nullptr;
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return Made::NAME; }
    const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
    const char* getPluginNamespace() const noexcept override { return PLUGIN_NAMESPACE; }

private:
    DeclareFields declared_;
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace asag
