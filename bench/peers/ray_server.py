"""Ray Serve: a deployment that takes raw bytes over HTTP."""

import os
import signal
import sys
import threading

import raw
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment
class Raw:
    """All models in each replica."""

    def __init__(self, spec: str) -> None:
        os.environ[raw.SPEC] = spec
        self._models = raw.models()

    async def __call__(self, request: Request) -> Response:
        """One call."""
        answer = self._models[request.url.path.rsplit("/", 1)[1]](await request.body())
        return Response(answer, media_type="application/octet-stream")


def main() -> None:
    """Serve until told to stop."""
    port, replicas, scratch = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=scratch, object_store_memory=256 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": port, "access_log": False}, logging_config={"enable_access_log": False})
    actor = {"num_cpus": 0, "runtime_env": {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}}
    serve.run(Raw.options(num_replicas=replicas, max_ongoing_requests=64, ray_actor_options=actor).bind(os.environ[raw.SPEC]))
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
