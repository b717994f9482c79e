# Router and agents, without root; the servers run elsewhere. Build from the checkout's root:
#   docker build -f deploy/container/voltana.Dockerfile -t voltana:0.1.0 .
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --wheel-dir /wheels ".[replay]"

FROM python:3.11-slim-bookworm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && useradd --uid 990 --no-create-home --home-dir /var/lib/voltana voltana
ENV PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp
USER 990
EXPOSE 8000 9470
ENTRYPOINT ["voltana"]
CMD ["serve", "/etc/voltana/fleet.toml"]
