# TensorRT 10 with the project's plugins and CUDA kernels.  See docker/README.md.
ARG CUDA_VERSION=13.0.1

# The kernels; only their libraries leave this stage, which has the compilers.
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS kernels
ARG CUDA_ARCHITECTURES="75-real;80-real;86-real;89-real;90-real;120"
ARG CMAKE_VERSION=4.1.2
ARG TENSORRT_VERSION=10.14.1.48-1+cuda13.0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      "libnvinfer-headers-dev=${TENSORRT_VERSION}" python3-venv=3.12.3-* \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/cmake \
 && /opt/cmake/bin/pip install --no-cache-dir "cmake==${CMAKE_VERSION}"
COPY plugins /source/plugins
RUN /opt/cmake/bin/cmake -S /source/plugins -B /build -DASAG_CHECKS=OFF -DCMAKE_INSTALL_PREFIX=/opt/kernels \
      -DTensorRT_ROOT=/usr "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES}" \
 && /opt/cmake/bin/cmake --build /build --parallel \
 && /opt/cmake/bin/cmake --install /build

# TensorRT's Python module belongs to the system's Python, so the environment is made from that one.
FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04 AS install
ARG EXTRAS=serve,tensorrt
WORKDIR /source
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv=3.12.3-* \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv --system-site-packages /opt/asag
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY asag_deploy asag_deploy
COPY training/asag_evaluation training/asag_evaluation
COPY training/asag_training training/asag_training
COPY export/asag_export export/asag_export
COPY benchmarks/asag_bench benchmarks/asag_bench
RUN /opt/asag/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu24.04
ARG TENSORRT_VERSION=10.14.1.48-1+cuda13.0
# All four by version: apt would take the newest of those that another one only asks for.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      python3=3.12.3-* \
      "libnvinfer10=${TENSORRT_VERSION}" \
      "libnvinfer-plugin10=${TENSORRT_VERSION}" \
      "libnvonnxparsers10=${TENSORRT_VERSION}" \
      "python3-libnvinfer=${TENSORRT_VERSION}" \
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 asag \
 && useradd --uid 10001 --gid asag --create-home --shell /usr/sbin/nologin asag \
 && install --directory --owner=asag --group=asag /home/asag/.cache /home/asag/.cache/asag
COPY --from=install /opt/asag /opt/asag
COPY --from=kernels /opt/kernels/lib /opt/kernels/lib
COPY docker/entrypoint.sh /usr/local/bin/asag-entrypoint
ENV PATH=/opt/asag/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ASAG_CACHE_DIR=/home/asag/.cache/asag \
    ASAG_KERNELS_LIBRARY=/opt/kernels/lib/libasag_kernels.so \
    ASAG_PLUGINS_LIBRARY=/opt/kernels/lib/libasag_plugins.so \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["asag-entrypoint"]
CMD ["--doctor"]
