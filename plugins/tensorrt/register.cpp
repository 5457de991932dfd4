// asag_register_plugins.  The library is not linked to TensorRT: it finds the one that the process has loaded, so that
// the same file serves the full library and the lean runtime, and a wrong version is a message, not a crash.

#include <dlfcn.h>

#include <cstdio>
#include <mutex>

#include "asag_plugins.h"
#include "deformable_sample_plugin.h"
#include "multiscale_roi_align_plugin.h"
#include "pad_anchors_plugin.h"
#include "pyramid_sample_plugin.h"

namespace {

using namespace asag;

// A function of a loaded TensorRT library, or null.  A library that was loaded for its own symbols only, as Python
// extensions load theirs, is found by its name.
void* loaded_symbol(const char* symbol) {
    if (void* found = dlsym(RTLD_DEFAULT, symbol)) return found;
    for (const char* library : {"nvinfer", "nvinfer_dispatch", "nvinfer_lean"}) {
        char name[64];
        std::snprintf(name, sizeof name, "lib%s.so.%d", library, NV_TENSORRT_MAJOR);
        if (void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
            void* found = dlsym(handle, symbol);
            dlclose(handle);  // it stays loaded: RTLD_NOLOAD only counted one more user
            if (found != nullptr) return found;
        }
    }
    return nullptr;
}

int find_registry(nvinfer1::IPluginRegistry*& registry) {
    const auto get_registry = reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(loaded_symbol("getPluginRegistry"));
    if (get_registry == nullptr) {
        return problem(
            ASAG_NOT_SUPPORTED,
            "no TensorRT %d library is loaded in this process; load libnvinfer.so.%d (or import tensorrt) first",
            NV_TENSORRT_MAJOR, NV_TENSORRT_MAJOR);
    }
    const auto get_version = reinterpret_cast<int32_t (*)()>(loaded_symbol("getInferLibVersion"));
    // 10.3.1 is 100301; before 10 it was four digits.
    const int32_t major = get_version == nullptr ? NV_TENSORRT_MAJOR : get_version() / 10000;
    if (major != NV_TENSORRT_MAJOR) {
        return problem(
            ASAG_NOT_SUPPORTED, "TensorRT %d is loaded, but these plugins were built for TensorRT %d; build them again",
            major, NV_TENSORRT_MAJOR);
    }
    registry = get_registry();
    if (registry != nullptr) return ASAG_OK;
    return problem(ASAG_NOT_SUPPORTED, "the TensorRT library that is loaded has no plugin registry");
}

template <class Made>
int register_one(nvinfer1::IPluginRegistry& registry) {
    static Creator<Made> creator;
    nvinfer1::IPluginCreatorInterface* there = registry.getCreator(Made::NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE);
    if (there == &creator) return ASAG_OK;
    if (there == nullptr && registry.registerCreator(creator, PLUGIN_NAMESPACE)) return ASAG_OK;
    return problem(
        ASAG_NOT_SUPPORTED, "TensorRT's registry refused the plugin %s: another library has registered that name",
        Made::NAME);
}

}  // namespace

int asag_register_plugins(void* registry) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    nvinfer1::IPluginRegistry* target = static_cast<nvinfer1::IPluginRegistry*>(registry);
    int status = target == nullptr ? find_registry(target) : ASAG_OK;
    if (status == ASAG_OK) status = register_one<MultiscaleRoIAlignPlugin>(*target);
    if (status == ASAG_OK) status = register_one<PyramidSamplePlugin>(*target);
    if (status == ASAG_OK) status = register_one<DeformableSamplePlugin>(*target);
    if (status == ASAG_OK) status = register_one<PadAnchorsPlugin>(*target);
    return status;
}

int asag_plugins_tensorrt_major(void) { return NV_TENSORRT_MAJOR; }
