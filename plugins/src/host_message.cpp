// What the host library says about itself; apart, so that both kinds of kernels can be in one program.

#include "checks.h"

const char* asag_message(int status) {
    if (status == ASAG_OK) return "no error";
    return status < 0 ? asag::last_problem() : "unknown status";
}

int asag_interface_version(void) { return ASAG_INTERFACE_VERSION; }
