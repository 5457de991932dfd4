// A block of threads that is the same code on the device and on the host.
//
// A kernel's body is a sequence of steps.  block.each(step) executes step(thread) for every thread and then waits for
// all: on the device each thread executes its own and meets the others at a barrier; on the host one loop executes
// them all, in any order.  What lives longer than a step lies in shared memory.
//
// Between two steps every thread executes the same instructions.  There a shared value is read through block.read
// alone, which lets no thread go on to overwrite it before all have read it.
#pragma once

#include "asag/platform.h"

namespace asag {

struct DeviceBlock {
    ASAG_HD int threads() const {
#ifdef __CUDA_ARCH__
        return static_cast<int>(blockDim.x);
#else
        return 0;
#endif
    }

    template <class Step>
    ASAG_HD void each(const Step& step) const {
#ifdef __CUDA_ARCH__
        step(static_cast<int>(threadIdx.x));
        __syncthreads();
#endif
    }

    template <class Value>
    ASAG_HD Value read(const Value& shared) const {
        const Value value = shared;
#ifdef __CUDA_ARCH__
        __syncthreads();
#endif
        return value;
    }
};

// Executes the threads of each step in the order given.
class HostBlock {
public:
    HostBlock(const int* order, int threads) : order_(order), threads_(threads) {}

    int threads() const { return threads_; }

    template <class Step>
    void each(const Step& step) const {
        for (int i = 0; i < threads_; ++i) step(order_[i]);
    }

    template <class Value>
    Value read(const Value& shared) const {
        return shared;
    }

private:
    const int* order_;
    int threads_;
};

ASAG_HD inline void atomic_increment(int* shared) {
#ifdef __CUDA_ARCH__
    atomicAdd(shared, 1);
#else
    ++*shared;
#endif
}

ASAG_HD inline void atomic_set(uint32_t* shared, uint32_t bits) {
#ifdef __CUDA_ARCH__
    atomicOr(shared, bits);
#else
    *shared |= bits;
#endif
}

}  // namespace asag
