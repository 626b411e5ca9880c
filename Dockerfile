# The command `sparsecut` in a container, with what serving and reports need.
#
#     docker build -t sparsecut .                                    # for CPUs
#     docker build -t sparsecut:cuda --build-arg TORCH=cu130 .       # for NVIDIA GPUs; run it with --gpus all
#     docker run --rm -v "$PWD/runs:/home/sparsecut/runs" sparsecut train tiny
#     docker run --rm -p 8000:8000 -v "$PWD/runs:/home/sparsecut/runs" sparsecut serve runs/tiny/final --host 0.0.0.0 --token SECRET
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Which build of torch: cpu, or a version of CUDA as on https://download.pytorch.org/whl.
ARG TORCH=cpu
WORKDIR /opt/sparsecut
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" \
        --extra-index-url https://pypi.org/simple -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY sparsecut ./sparsecut
RUN pip install --no-cache-dir -c constraints.txt '.[serve,reports,lora]'

RUN useradd --create-home --uid 1000 sparsecut && mkdir /home/sparsecut/runs && chown sparsecut /home/sparsecut/runs
USER sparsecut
WORKDIR /home/sparsecut
ENV PYTHONUNBUFFERED=1
VOLUME /home/sparsecut/runs
EXPOSE 8000
# Tells whether a server answers. Containers of other commands have no server: start them with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["sparsecut"]
CMD ["--help"]
