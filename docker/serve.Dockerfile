# asag-serve on the CPU: a bundle, mounted at /bundle, behind HTTP.  See docker/README.md.
ARG PYTHON_VERSION=3.12.12

FROM python:${PYTHON_VERSION}-slim-trixie AS install
ARG EXTRAS=openvino,serve
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
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["asag-entrypoint"]
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--port", "8000"]
