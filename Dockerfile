# syntax=docker/dockerfile:1
# The server, for CPUs, or for CUDA with --build-arg DEVICE=cuda: docs/container.md.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
# Where pip finds torch's builds for CPUs alone; without it the image carries CUDA's libraries, which do no harm there.
ARG TORCH_INDEX=
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch in a layer of its own, which a change of the code leaves as it is.
COPY constraints.txt ./
RUN case "$DEVICE" in \
      cpu|cuda) pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch ;; \
      *) echo "DEVICE: '$DEVICE' is neither cpu nor cuda" >&2; exit 2 ;; \
    esac
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY apps apps
COPY bytelatent bytelatent
RUN pip install -c constraints.txt '.[hf,serve]'

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
# Triton compiles a few lines of C where its kernels run.
RUN if [ "$DEVICE" = cuda ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 1000 --create-home blt
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 MPLCONFIGDIR=/tmp/matplotlib TRITON_CACHE_DIR=/tmp/triton
USER 1000
WORKDIR /home/blt
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=2m --start-interval=2s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["blt", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["tiny"]
