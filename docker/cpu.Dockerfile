# asag-detect on the CPU: ONNX Runtime and OpenVINO, no PyTorch.  See docker/README.md.
ARG PYTHON_VERSION=3.12.12

FROM python:${PYTHON_VERSION}-slim-trixie AS install
ARG EXTRAS=openvino,video
WORKDIR /source
RUN python -m venv /opt/asag
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY asag_deploy asag_deploy
COPY training/asag_evaluation training/asag_evaluation
COPY training/asag_training training/asag_training
COPY export/asag_export export/asag_export
COPY benchmarks/asag_bench benchmarks/asag_bench
RUN /opt/asag/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON_VERSION}-slim-trixie
RUN groupadd --gid 10001 asag \
 && useradd --uid 10001 --gid asag --create-home --shell /usr/sbin/nologin asag \
 && install --directory --owner=asag --group=asag /home/asag/.cache /home/asag/.cache/asag
COPY --from=install /opt/asag /opt/asag
COPY docker/entrypoint.sh /usr/local/bin/asag-entrypoint
ENV PATH=/opt/asag/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ASAG_CACHE_DIR=/home/asag/.cache/asag
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["asag-entrypoint"]
CMD ["--doctor"]
