# One image for the workers, beat, Flower, the web app and the command line: the command chooses.
#
#   docker build -t stillroom .
#   docker run stillroom celery -A stillroom_workers worker     (or beat, flower; or: stillroom --help)
#
# An app adds its code: FROM stillroom, COPY shop /app/shop, ENV STILLROOM_LOADERS=shop.cache

# The base by tag, for its repairs; by digest, for the same image again: --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:…
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
# Without pip: nothing in the image installs anything later.
RUN python -m venv --without-pip /opt/stillroom
WORKDIR /build
# The lock in a layer of its own: a change of our code leaves it as it is. Hashes: what was tested, or nothing.
COPY requirements.lock ./
RUN pip --python /opt/stillroom/bin/python install --no-cache-dir --no-compile --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY workers workers
RUN pip --python /opt/stillroom/bin/python install --no-cache-dir --no-compile --no-deps . \
# Bytecode by content, not by time: a read-only container starts as fast, and two builds are the same.
 && /opt/stillroom/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/stillroom/lib

FROM ${PYTHON_IMAGE}
# The number is what secrets are given to, see stack.yml.
RUN groupadd --gid 10001 stillroom \
 && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin stillroom \
# A volume that is mounted here first belongs to it: Flower's history.
 && install --directory --owner 10001 --group 10001 /data
COPY --from=build /opt/stillroom /opt/stillroom
# The app's code goes here: `celery -A` and STILLROOM_LOADERS find it. A small shop until there is one.
WORKDIR /app
COPY deploy/shop.py ./
ENV PATH=/opt/stillroom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STILLROOM_HEARTBEAT_FILE=/tmp/heartbeat
USER 10001:10001
# A file that workers and beat touch while they do their work: 3 ms a check. `celery inspect ping` asks all
# workers, costs two seconds of CPU, and kills a worker for its neighbour's trouble. Other roles have their own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["sh", "-c", "test -n \"$(find /tmp/heartbeat -mmin -0.5)\""]
CMD ["celery", "-A", "stillroom_workers", "worker", "-l", "INFO"]
