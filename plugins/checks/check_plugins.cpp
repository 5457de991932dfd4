// Checks the plugin library with a real TensorRT library and no GPU:
//
//     asag_check_plugins path/to/libnvinfer_lean.so.11
//
// The creators are registered and looked up as the ONNX parser does; every plugin is made from fields, serialised,
// made again from what was serialised, cloned, and asked for its types, formats and shapes.  Prints what fails and
// returns 1, or returns 0.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../tensorrt/asag_plugins.h"

namespace {

using namespace nvinfer1;

int failures = 0;

void expect(bool holds, const std::string& what) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "failed: %s (last message: %s)\n", what.c_str(), asag_message(ASAG_OUT_OF_RANGE));
}

// A dimension with a known size, and the builder of such: what TensorRT gives getOutputShapes, for constants.
class Size final : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    explicit Size(int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

    int64_t value() const { return value_; }

private:
    int64_t value_;
};

class Sizes final : public IExprBuilder, private apiv::VExprBuilder {
public:
    Sizes() { mImpl = this; }

    const IDimensionExpr* constant(int64_t value) override { return &sizes_.emplace_back(value); }

    const IDimensionExpr* operation(
        DimensionOperation operation, const IDimensionExpr& first, const IDimensionExpr& second) override {
        const int64_t a = first.getConstantValue(), b = second.getConstantValue();
        if (operation != DimensionOperation::kFLOOR_DIV) return nullptr;
        return constant(a / b);
    }

    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }

    IExprBuilder& builder() { return *this; }
    const IDimensionExpr* of(int64_t value) { return &sizes_.emplace_back(value); }

private:
    std::deque<Size> sizes_;  // whose addresses stay
};

using Shape = std::vector<int64_t>;

// What a plugin should be: its attributes, and the types and shapes of its inputs and outputs.
struct Case {
    std::string name;
    std::vector<std::pair<std::string, std::vector<int32_t>>> integers;
    std::vector<Shape> input_shapes;
    std::vector<Shape> output_shapes;
    // 'f': the free type, float or half; '4': float; 'b': bool; 'i': int64.
    std::string input_types, output_types;
};

const std::vector<Case>& cases() {
    static const std::vector<Case> all = {
        {"AsagMultiscaleRoIAlign",
         {{"strides", {4, 8, 16, 32}}},
         {{2, 50, 68, 256}, {2, 25, 34, 256}, {2, 13, 17, 256}, {2, 7, 9, 256}, {2, 100, 4}},
         {{2, 100, 7, 7, 256}},
         "ffff4",
         "f"},
        {"AsagPyramidSample",
         {{"strides", {4, 8, 16, 32}}},
         {{2, 50, 68, 256}, {2, 25, 34, 256}, {2, 13, 17, 256}, {2, 7, 9, 256}, {2, 100, 4, 32, 2}, {2, 100, 4, 32, 4}},
         {{2, 100, 4, 32, 64}},
         "ffff44",
         "f"},
        {"AsagDeformableSample",
         {},
         {{2, 50, 68, 256},
          {2, 25, 34, 256},
          {2, 13, 17, 256},
          {2, 7, 9, 256},
          {2, 4471, 8, 4, 4, 2},
          {2, 4471, 8, 4, 4}},
         {{2, 4471, 256}},
         "ffff44",
         "f"},
        {"AsagPadAnchors",
         {{"first_level", {250}}, {"floor", {5}}, {"cap", {200}}},
         {{2, 900, 5}, {2, 900}, {2, 2}, {160}},
         {{2, 160, 4}, {2}},
         "fbii",
         "fi"},
    };
    return all;
}

struct Fields {
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};

    explicit Fields(const Case& made) {
        for (const auto& [name, values] : made.integers) {
            fields.emplace_back(
                name.c_str(), values.data(), PluginFieldType::kINT32, static_cast<int32_t>(values.size()));
        }
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
    }
};

using PluginPointer = std::unique_ptr<IPluginV3>;

template <class Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

DataType type_of(char kind, DataType free_type) {
    switch (kind) {
        case 'f':
            return free_type;
        case '4':
            return DataType::kFLOAT;
        case 'b':
            return DataType::kBOOL;
        default:
            return DataType::kINT64;
    }
}

void check_fields(const Case& made, const PluginFieldCollection& written, const std::string& what) {
    const Fields expected(made);
    expect(written.nbFields == expected.collection.nbFields, what + ": number of fields");
    for (const PluginField& field : expected.fields) {
        bool found = false;
        for (int32_t i = 0; i < written.nbFields; ++i) {
            const PluginField& other = written.fields[i];
            if (std::strcmp(field.name, other.name) != 0) continue;
            found = other.type == field.type && other.length == field.length &&
                    std::memcmp(other.data, field.data, 4 * static_cast<size_t>(field.length)) == 0;
        }
        expect(found, what + ": field " + field.name);
    }
}

void check_types(const Case& made, IPluginV3OneBuild& build, DataType free_type) {
    const std::string kinds = made.input_types + made.output_types;
    const auto inputs = static_cast<int32_t>(made.input_types.size());
    const auto outputs = static_cast<int32_t>(made.output_types.size());
    std::vector<DataType> input_types, output_types(made.output_types.size());
    std::vector<DynamicPluginTensorDesc> tensors(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) {
        tensors[i].desc.type = type_of(kinds[i], free_type);
        tensors[i].desc.format = TensorFormat::kLINEAR;
        if (i < made.input_types.size()) input_types.push_back(tensors[i].desc.type);
    }
    const int32_t status = build.getOutputDataTypes(output_types.data(), outputs, input_types.data(), inputs);
    expect(status == 0, made.name + ": getOutputDataTypes");
    for (size_t i = 0; i < output_types.size(); ++i) {
        expect(output_types[i] == type_of(made.output_types[i], free_type), made.name + ": type of an output");
    }
    for (int32_t i = 0; i < inputs + outputs; ++i) {
        DynamicPluginTensorDesc& tensor = tensors[static_cast<size_t>(i)];
        const auto supported = [&] { return build.supportsFormatCombination(i, tensors.data(), inputs, outputs); };
        expect(supported(), made.name + ": a combination that is right");
        const PluginTensorDesc right = tensor.desc;
        tensor.desc.format = TensorFormat::kCHW32;
        expect(!supported(), made.name + ": a format that is not linear");
        tensor.desc = right;
        tensor.desc.type = DataType::kINT32;
        expect(!supported(), made.name + ": a type that is wrong");
        if (i > 0 && kinds[static_cast<size_t>(i)] == 'f') {
            tensor.desc.type = free_type == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
            expect(!supported(), made.name + ": two types of features");
        }
        tensor.desc = right;
    }
    const auto configure = [&](int32_t of_inputs) {
        return build.configurePlugin(tensors.data(), of_inputs, tensors.data() + inputs, outputs);
    };
    expect(configure(inputs) == 0, made.name + ": configure");
    expect(configure(inputs - 1) != 0, made.name + ": an input less");
}

void check_shapes(const Case& made, IPluginV3OneBuild& build) {
    Sizes sizes;
    std::vector<DimsExprs> inputs(made.input_shapes.size()), outputs(made.output_shapes.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
        inputs[i].nbDims = static_cast<int32_t>(made.input_shapes[i].size());
        for (size_t j = 0; j < made.input_shapes[i].size(); ++j) inputs[i].d[j] = sizes.of(made.input_shapes[i][j]);
    }
    const auto shapes = [&] {
        return build.getOutputShapes(
            inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs.data(),
            static_cast<int32_t>(outputs.size()), sizes.builder());
    };
    expect(shapes() == 0, made.name + ": getOutputShapes");
    for (size_t i = 0; i < outputs.size(); ++i) {
        Shape shape;
        for (int32_t j = 0; j < outputs[i].nbDims; ++j) shape.push_back(outputs[i].d[j]->getConstantValue());
        expect(shape == made.output_shapes[i], made.name + ": shape of output " + std::to_string(i));
    }
    inputs[0].nbDims = 2;
    expect(shapes() != 0, made.name + ": an input of the wrong rank");
}

void check_without_gpu(const Case& made, IPluginV3& plugin) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return;  // the GPU tests run it for real
    std::vector<PluginTensorDesc> inputs(made.input_shapes.size()), outputs(made.output_shapes.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
        inputs[i].type = type_of(made.input_types[i], DataType::kFLOAT);
        inputs[i].dims.nbDims = static_cast<int32_t>(made.input_shapes[i].size());
        for (size_t j = 0; j < made.input_shapes[i].size(); ++j) inputs[i].dims.d[j] = made.input_shapes[i][j];
    }
    alignas(16) static char memory[16];  // never read: there is no device
    const std::vector<const void*> from(inputs.size(), memory);
    const std::vector<void*> to(outputs.size(), memory);
    auto& runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    const int status = runtime.enqueue(inputs.data(), outputs.data(), from.data(), to.data(), nullptr, nullptr);
    expect(status > 0, made.name + ": enqueue without a GPU returned " + std::to_string(status));
}

void check_plugin(const Case& made, IPluginV3& plugin, const std::string& what) {
    auto& core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    auto& build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto& runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    expect(made.name == core.getPluginName(), what + ": name");
    expect(std::strcmp(core.getPluginVersion(), "1") == 0, what + ": version");
    expect(std::strcmp(core.getPluginNamespace(), "") == 0, what + ": namespace");
    expect(build.getNbOutputs() == static_cast<int32_t>(made.output_shapes.size()), what + ": outputs");
    check_fields(made, *runtime.getFieldsToSerialize(), what);
    check_types(made, build, DataType::kFLOAT);
    check_types(made, build, DataType::kHALF);
    check_shapes(made, build);
    check_without_gpu(made, plugin);
}

// Every attribute is needed, and one that makes no sense is refused.
void check_refusals(const Case& made, IPluginCreatorV3One& creator) {
    const Fields complete(made);
    for (size_t i = 0; i < complete.fields.size(); ++i) {
        Fields fields(made);
        const std::string name = fields.fields[i].name;
        fields.fields.erase(fields.fields.begin() + static_cast<std::ptrdiff_t>(i));
        fields.collection = {static_cast<int32_t>(fields.fields.size()), fields.fields.data()};
        PluginPointer plugin(creator.createPlugin("short", &fields.collection, TensorRTPhase::kBUILD));
        expect(plugin == nullptr, made.name + " without " + name);
        const std::string message = asag_message(ASAG_NULL_POINTER);
        expect(message.find(name) != std::string::npos, made.name + ": message on a missing " + name);
    }
    if (!complete.fields.empty()) {
        Fields fields(made);
        const int32_t nonsense = -3;
        fields.fields[0] = PluginField(fields.fields[0].name, &nonsense, PluginFieldType::kINT32, 1);
        PluginPointer plugin(creator.createPlugin("nonsense", &fields.collection, TensorRTPhase::kBUILD));
        expect(plugin == nullptr, made.name + " with a negative attribute");
    }
    expect(creator.createPlugin("none", nullptr, TensorRTPhase::kBUILD) == nullptr, made.name + " without fields");
}

void check_case(const Case& made, IPluginRegistry& registry) {
    IPluginCreatorInterface* found = registry.getCreator(made.name.c_str(), "1", "");
    expect(found != nullptr, made.name + " is registered");
    if (found == nullptr) return;
    expect(std::strcmp(found->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, made.name + ": kind of creator");
    auto& creator = *static_cast<IPluginCreatorV3One*>(found);
    const Fields fields(made);
    expect(creator.getFieldNames()->nbFields == fields.collection.nbFields, made.name + ": declared fields");

    PluginPointer plugin(creator.createPlugin("made", &fields.collection, TensorRTPhase::kBUILD));
    expect(plugin != nullptr, made.name + " is made");
    if (plugin == nullptr) return;
    check_plugin(made, *plugin, made.name);
    auto& runtime = capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME);
    const PluginPointer again(creator.createPlugin("again", runtime.getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    PluginPointer copy(plugin->clone()), attached(runtime.attachToContext(nullptr));
    expect(again != nullptr && copy != nullptr && attached != nullptr, made.name + ": copies");
    if (again == nullptr || copy == nullptr || attached == nullptr) return;
    plugin.reset();  // nothing of a copy may point into what it was copied from
    check_plugin(made, *again, made.name + " deserialised");
    check_plugin(made, *copy, made.name + " cloned");
    check_plugin(made, *attached, made.name + " attached");
    check_refusals(made, creator);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) {
        std::fprintf(stderr, "usage: %s libnvinfer_lean.so (or libnvinfer.so)\n", arguments[0]);
        return 2;
    }
    expect(asag_register_plugins(nullptr) == ASAG_NOT_SUPPORTED, "registering before TensorRT is loaded");
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "failed: %s\n", dlerror());
        return 1;
    }
    const auto get_registry = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
    if (get_registry == nullptr || get_registry() == nullptr) {
        std::fprintf(stderr, "failed: %s has no plugin registry\n", arguments[1]);
        return 1;
    }
    const int status = asag_register_plugins(nullptr);
    if (status != ASAG_OK) {
        std::fprintf(stderr, "failed: asag_register_plugins: %s\n", asag_message(status));
        return 1;
    }
    expect(asag_register_plugins(get_registry()) == ASAG_OK, "registering again");
    for (const Case& made : cases()) check_case(made, *get_registry());
    if (failures == 0) std::printf("TensorRT %d: %zu plugins are right\n", NV_TENSORRT_MAJOR, cases().size());
    return failures == 0 ? 0 : 1;
}
