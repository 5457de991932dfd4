// A plugin's attributes: named once, and from that declared, read and written as TensorRT's plugin fields.
//
// A plugin lists them in attributes(visit): visit("stride", stride_); visit("strides", strides_); ...
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "../src/checks.h"

namespace asag {

// Pixels per cell of each level, finest first.
struct Strides {
    int32_t values[ASAG_MAX_LEVELS] = {};
    int32_t count = 0;
};

// The fields that a creator asks for.
class DeclareFields {
public:
    void operator()(const char* name, const int32_t&) { add(name, nvinfer1::PluginFieldType::kINT32, 1); }
    void operator()(const char* name, const Strides&) { add(name, nvinfer1::PluginFieldType::kINT32, 0); }

    std::vector<nvinfer1::PluginField> fields;

private:
    void add(const char* name, nvinfer1::PluginFieldType type, int32_t length) {
        fields.emplace_back(name, nullptr, type, length);
    }
};

// The attributes as fields that point into the plugin.
class WriteFields {
public:
    void operator()(const char* name, const int32_t& value) { add(name, &value, nvinfer1::PluginFieldType::kINT32, 1); }

    void operator()(const char* name, const Strides& strides) {
        add(name, strides.values, nvinfer1::PluginFieldType::kINT32, strides.count);
    }

    std::vector<nvinfer1::PluginField> fields;

private:
    void add(const char* name, const void* data, nvinfer1::PluginFieldType type, int32_t length) {
        fields.emplace_back(name, data, type, length);
    }
};

// Reads the attributes from fields, of 32 or 64 bits.  status() is that of the first that is missing or malformed.
class ReadFields {
public:
    explicit ReadFields(const nvinfer1::PluginFieldCollection& fields) : fields_(fields) {}

    int status() const { return status_; }

    void operator()(const char* name, int32_t& value) {
        const nvinfer1::PluginField* field = find(name, 1, 1);
        if (field != nullptr) value = integer(*field, 0);
    }

    void operator()(const char* name, Strides& strides) {
        const nvinfer1::PluginField* field = find(name, 1, ASAG_MAX_LEVELS);
        if (field == nullptr) return;
        strides.count = field->length;
        for (int32_t i = 0; i < field->length; ++i) strides.values[i] = integer(*field, i);
    }

private:
    const nvinfer1::PluginField* find(const char* name, int32_t shortest, int32_t longest) {
        if (status_ != ASAG_OK) return nullptr;
        for (int32_t i = 0; i < fields_.nbFields; ++i) {
            const nvinfer1::PluginField& field = fields_.fields[i];
            if (field.name == nullptr || std::strcmp(field.name, name) != 0 || field.data == nullptr) continue;
            if (field.length >= shortest && field.length <= longest) return &field;
            status_ = problem(
                ASAG_OUT_OF_RANGE, "attribute %s has %d values, expected %d to %d", name, field.length, shortest,
                longest);
            return nullptr;
        }
        status_ = problem(ASAG_NULL_POINTER, "attribute %s is missing", name);
        return nullptr;
    }

    int32_t integer(const nvinfer1::PluginField& field, int32_t index) {
        if (field.type == nvinfer1::PluginFieldType::kINT32) return at<int32_t>(field, index);
        if (field.type == nvinfer1::PluginFieldType::kINT64) {
            const int64_t value = at<int64_t>(field, index);
            if (value >= INT32_MIN && value <= INT32_MAX) return static_cast<int32_t>(value);
            status_ = problem(
                ASAG_OUT_OF_RANGE, "attribute %s is %lld, which is beyond 32 bits", field.name,
                static_cast<long long>(value));
            return 0;
        }
        status_ = problem(ASAG_BAD_TYPE, "attribute %s is no integer", field.name);
        return 0;
    }

    template <class T>
    static T at(const nvinfer1::PluginField& field, int32_t index) {
        T value;  // copied, for nothing says that a field is aligned
        const char* bytes = static_cast<const char*>(field.data);
        std::memcpy(&value, bytes + sizeof(T) * static_cast<size_t>(index), sizeof value);
        return value;
    }

    const nvinfer1::PluginFieldCollection& fields_;
    int status_ = ASAG_OK;
};

}  // namespace asag
