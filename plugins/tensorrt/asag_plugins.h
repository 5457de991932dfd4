/* The C interface of the TensorRT plugin library. */
#ifndef ASAG_PLUGINS_H
#define ASAG_PLUGINS_H

#include "asag/asag_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Registers the creators of all plugins, with the nvinfer1::IPluginRegistry given, or for a null pointer with that of
 * the TensorRT library this process has loaded (full, dispatch or lean), wherever it came from.  Registering again
 * changes nothing.
 *
 * Returns 0, or a negative AsagStatus, on which asag_message() has a sentence: no TensorRT library is loaded, it is
 * of another major version than this library was compiled for, or other plugins already have these names. */
ASAG_API int asag_register_plugins(void* registry);

/* The major version of TensorRT that this library was compiled for. */
ASAG_API int asag_plugins_tensorrt_major(void);

#ifdef __cplusplus
}
#endif

#endif
