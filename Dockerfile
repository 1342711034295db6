# RAP Lab in a container.
#
#   docker build -t rap-lab .                                        the simulator and its reports: no torch
#   docker build -t rap-lab:full --build-arg EXTRAS=agents,hw,report .     training and the real engine; its torch runs on
#                                                                    CPUs and, with `docker run --gpus all`, on GPUs
#   docker run --rm -v "$PWD/runs:/home/rap/runs" rap-lab replay policy=greedy_stop
#
# BASE is any image with Python 3.11 to 3.14, such as one with CUDA's compilers, which FlashInfer and Triton may want.
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=report
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sim ./sim
COPY hw ./hw
COPY agents ./agents
COPY conf ./conf
RUN python -m pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"
# The first start compiles the simulator; this does it once, for the user that runs it.
RUN useradd --create-home rap
USER rap
WORKDIR /home/rap
ENV OMP_NUM_THREADS=1
RUN rap replay trace.duration_s=5 hydra.run.dir=/tmp/first && rm -r /tmp/first
ENTRYPOINT ["rap"]
