// What the checks on the GPU share: memory on both sides, random numbers, and comparing.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "asag/asag_kernels.h"
#include "asag/platform.h"

namespace asag::checks {

constexpr int NO_GPU = 77;
constexpr AsagHostBlock BLOCK = {64, 0};

inline int failures = 0;

inline void must(int status, const std::string& what) {
    if (status == 0) return;
    std::fprintf(stderr, "failed: %s: %s\n", what.c_str(), asag_message(status));
    std::exit(1);
}

// Memory on both sides.
template <class T>
class Twin {
public:
    explicit Twin(size_t count) : host(count) {
        must(cudaMalloc(&device_, bytes() + 16), "cudaMalloc");
    }

    ~Twin() { cudaFree(device_); }

    Twin(const Twin&) = delete;
    Twin& operator=(const Twin&) = delete;

    T* upload() {
        must(cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice), "upload");
        // It may come back before the last of it has arrived, for which streams that do not block do not wait.
        must(cudaDeviceSynchronize(), "upload");
        return device_;
    }

    std::vector<T> download() const {
        std::vector<T> result(host.size());
        must(cudaMemcpy(result.data(), device_, bytes(), cudaMemcpyDeviceToHost), "download");
        return result;
    }

    std::vector<T> host;

private:
    size_t bytes() const { return host.size() * sizeof(T); }

    T* device_ = nullptr;
};

inline std::mt19937 generator(1);

inline float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

template <class T>
void compare(const Twin<T>& twin, double tolerance, const std::string& what) {
    const std::vector<T> device = twin.download();
    double worst = 0;
    for (size_t i = 0; i < device.size(); ++i) {
        double a, b;
        if constexpr (std::is_same_v<T, asag::Half>) {
            a = asag::to_float(device[i]), b = asag::to_float(twin.host[i]);
        } else {
            a = static_cast<double>(device[i]), b = static_cast<double>(twin.host[i]);
        }
        const double apart = std::abs(a - b);
        worst = std::isnan(apart) ? INFINITY : std::max(worst, apart);
    }
    std::printf("%-40s %zu values, largest difference %g\n", what.c_str(), device.size(), worst);
    if (worst <= tolerance) return;
    ++failures;
    std::fprintf(stderr, "failed: %s differs by %g, over %g\n", what.c_str(), worst, tolerance);
}

// A CUDA graph whose conditional nodes take the stop decision; nothing before CUDA 13.
void check_conditional_graph();

}  // namespace asag::checks
