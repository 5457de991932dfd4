// Whether the arguments of a call make sense, before anything is launched.
#pragma once

#include <cstddef>

#include "asag/asag_kernels.h"

namespace asag {

// ASAG_OK, or what is wrong, of which last_problem() then has a sentence.  Pointers may be null where there is nothing
// to read or write.
int check(const AsagMultiscaleRoIAlign* arguments);
int check(const AsagPyramidSample* arguments);
int check(const AsagDeformableSample* arguments);
int check(const AsagPatchNMS* arguments, bool in_a_block = true);  // of a GPU, into which not all candidates fit
int check(const AsagPadAnchors* arguments);
int check(const AsagPreprocess* arguments);
int check(const AsagPostprocess* arguments);
int check(const AsagDecide* arguments);
int check(const AsagHostBlock* block);
int check(const AsagAdaptiveMixing* arguments);
int check(const AsagCpu* how);

// The same of the place that a node is to have in a graph.
int check_place(const void* graph, void* const* dependencies, size_t count, void* const* node);

// Notes a problem of the calling thread and returns its status.
int problem(AsagStatus status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The calling thread's last problem in one sentence.
const char* last_problem();

}  // namespace asag
