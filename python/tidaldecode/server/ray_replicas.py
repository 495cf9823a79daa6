"""Several servers on this machine, started, watched and ended by Ray Serve.

Each replica is the single server (run.py) in a process of its own, at a port of loopback. Ray says
which replica has a request and holds its place there until the answer has ended, so that a replica
that is told to end is left alone until then; the answer itself does not pass through Ray.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tidaldecode import errors
from tidaldecode.decoder import Decoder
from tidaldecode.errors import BackendError
from tidaldecode.server.prefix_choice import Chosen
from tidaldecode.server.run import Run
from tidaldecode.server.settings import ServeConfig

# What Ray reads when it is imported: it reports to nobody, and takes orders only from who has this
# token, for its ports are open to everyone.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica  # noqa: E402
from ray.serve.schema import LoggingConfig  # noqa: E402

Rank = Callable[[Sequence[str]], list[str]]  # replicas, in the order in which they are tried

APP = "tidaldecode"
_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; nothing is kept there
_NO_LIMIT = 10**6  # of requests to a replica: it has limits of its own
_A_DAY_S = 86400.0
_END_S = 10.0
_PROBLEM = re.compile(r"tidaldecode\.errors\.(\w+): ([^\n]+)")


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What each replica serves, and how."""

    model_dir: Path
    engine: dict[str, Any]  # options of the Decoder
    settings: ServeConfig

    def load(self, progress: Callable[[int, int], None]) -> Decoder:
        """Loads the model."""
        return Decoder(self.model_dir, **self.engine, progress=progress)


class Replica:
    """One server, in a process that Ray has started."""

    def __init__(self, spec: ReplicaSpec) -> None:
        """Serves; returns once the model is loaded.

        Raises: what keeps it from being loaded.
        """
        plain: dict[str, Any] = {"ray": None, "ssl_certfile": None, "ssl_keyfile": None}
        self._run = Run(spec.load, replace(spec.settings, host="127.0.0.1", port=0, **plain))
        self._thread = threading.Thread(target=self._run.run, daemon=True)
        self._thread.start()
        while self._run.service.state == "loading":
            time.sleep(0.01)
        if self._run.service.problem is not None:
            raise self._run.service.problem
        self._what = self._run.service.in_words()

    def record_replica_metadata(self) -> dict[str, str]:
        """What whoever chooses a replica is told of it."""
        name = serve.get_replica_context().replica_id.unique_id
        return {"name": name, "address": self._run.address, "what": self._what}

    def __del__(self) -> None:
        """Frees the model; Ray calls it when all answers have ended."""
        if self._thread.is_alive():
            self._run.service.loop.call_soon_threadsafe(self._run.end)
            self._thread.join(_END_S)


class AsAsked(RequestRouter):
    """Ray's choice of a replica, left to the request: it brings a Rank."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas, the best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # behind the last of them
        by_name = {each.replica_metadata["name"]: each for each in candidate_replicas}
        return [[by_name[name]] for name in pending_request.args[0](list(by_name))]


class RayReplicas:
    """A Ray cluster of this machine, with nothing on it but the replicas."""

    def __init__(self, spec: ReplicaSpec, count: int, num_gpus: int) -> None:
        """Takes what to serve, by how many, and the GPUs that they share, one each; 0: none."""
        self.count = count
        self.most = num_gpus or _NO_LIMIT
        self._spec = spec
        self._num_gpus = num_gpus
        self._folder = tempfile.mkdtemp(prefix="tidal-ray-")
        self._handle: Any = None
        self._starting = threading.Lock()  # held while Ray is

    def start_ray(self) -> None:
        """Starts Ray, without replicas."""
        for name in ("ray", "ray._private.worker", "ray.serve"):  # what matters of it is said by us
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with self._starting:
            ray.init(
                address="local", include_dashboard=False, num_gpus=self._num_gpus,
                object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=self._folder,
                _system_config={"memory_monitor_refresh_ms": 0},
                configure_logging=False,
            )  # fmt: skip

    def start(self) -> None:
        """Starts the replicas; returns when all have loaded their model.

        Raises: a TidalError for what keeps them from it.
        """
        quiet = LoggingConfig(log_level="CRITICAL", enable_access_log=False)
        longest_s = self._spec.settings.request_timeout_s or _A_DAY_S
        serve.start(proxy_location="Disabled", logging_config=quiet)
        deployment = serve.deployment(Replica).options(
            num_replicas=self.count,
            ray_actor_options={"num_cpus": 0, "num_gpus": min(1, self._num_gpus)},
            request_router_config=RequestRouterConfig(request_router_class=AsAsked),
            max_ongoing_requests=_NO_LIMIT,
            max_constructor_retry_count=1,
            graceful_shutdown_timeout_s=longest_s + _END_S,
            graceful_shutdown_wait_loop_s=0.1,
            logging_config=quiet,
        )
        try:
            self._handle = serve.run(
                deployment.bind(self._spec),
                name=APP,
                route_prefix=None,
                external_scaler_enabled=True,
            )
        except RuntimeError as failure:
            raise self._problem() from failure

    def _problem(self) -> errors.TidalError:
        """What has kept a replica from being ready."""
        state = serve.status().applications[APP]
        said = " ".join([state.message, *(each.message for each in state.deployments.values())])
        found = _PROBLEM.search(said)
        kind = getattr(errors, found.group(1), None) if found else None
        if found is None or kind is None:
            return BackendError(f"ray: the replicas cannot be started: {said}")
        problem: errors.TidalError = kind(found.group(2))
        return problem

    @asynccontextmanager
    async def choose(self, rank: Rank) -> AsyncIterator[Chosen]:
        """A replica, which does not end within the block. Waits while there is none."""
        async with self._handle.choose_replica(rank) as selection:
            known = selection.replica_metadata
            yield Chosen(name=known["name"], address=known["address"])

    async def all(self) -> list[dict[str, str]]:
        """What each replica says of itself."""
        found: list[dict[str, str]] = await self._handle.broadcast(
            "record_replica_metadata"
        ).results_async(timeout_s=5)
        return found

    def scale(self, count: int) -> None:
        """Has Ray start replicas, or end some as soon as their answers have."""
        # What Ray's own REST call does, for which its dashboard would have to run.
        from ray.serve._private.common import DeploymentID
        from ray.serve.context import _get_global_client

        controller = _get_global_client()._controller
        place = DeploymentID(name=Replica.__name__, app_name=APP)
        ray.get(controller.update_deployment_replicas.remote(place, count))

    def failure(self) -> str | None:
        """What of Ray itself has ended, if something has."""
        node = ray._private.worker._global_node
        dead = [] if node is None else node.dead_processes()
        return ", ".join(str(kind) for kind, _ in dead) or None

    def close(self) -> None:
        """Ends Ray, and the replicas with it, also while they start."""
        with self._starting:
            ray.shutdown()
        deadline = time.monotonic() + _END_S  # processes that are ending may write a last line
        while os.path.exists(self._folder) and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.05)
