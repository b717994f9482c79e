# The actuator alone: Python, NVML's bindings and the program. Build from the checkout's root:
#   docker build -f deploy/container/actuator.Dockerfile -t voltana-actuator:0.1.0 .
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && pip wheel --no-cache-dir --wheel-dir /wheels "nvidia-ml-py>=12.560"

FROM python:3.11-slim-bookworm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
# Root, as NVML asks for it; of root's rights give it SYS_ADMIN and CHOWN alone. The driver's
# libraries come from the NVIDIA container runtime.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=utility \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python", "-I", "-m", "voltana.hwreplay.actuator"]
CMD ["/run/voltana/actuator.sock", "--gpu", "all", "--uid", "990", "--restore-first"]
