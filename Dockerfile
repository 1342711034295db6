# RAP Lab in a container.
#
#   docker build -t rap-lab .                  the simulator, its reports and its server: no torch
#   docker build -t rap-lab:full --build-arg EXTRAS=agents,hw,report .    training and the real engine; its torch runs on
#                                              CPUs and, with `docker run --gpus all`, on GPUs
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" rap-lab replay policy=greedy_stop
#
# BASE is any image with Python 3.11 to 3.14, such as one with CUDA's compilers, which FlashInfer and Triton may want.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=report,serve
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sim ./sim
COPY hw ./hw
COPY agents ./agents
COPY conf ./conf
RUN python -m pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" && rm -r build *.egg-info
# Files in a mounted folder belong to whoever runs the image, so it runs as any user (`--user`): each has this home, and
# the name rap, for those who are not in /etc/passwd.
RUN useradd --create-home rap && mkdir /work && chmod 1777 /home/rap /work
ENV HOME=/home/rap USER=rap NUMBA_CACHE_DIR=/home/rap/.cache/numba OMP_NUM_THREADS=1
USER rap
WORKDIR /work
# The first start compiles the simulator; this does it once, for processors like the one that builds.
RUN rap replay trace.duration_s=5 plot=true hydra.run.dir=/tmp/first && rm -r /tmp/first && \
    chmod -R a+rwX /home/rap/.cache
ENTRYPOINT ["rap"]
