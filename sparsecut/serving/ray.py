"""Replicas of a server by Ray Serve, which balances, restarts and scales them.

`serve run sparsecut.serving.ray:app model=FOLDER replicas=2` starts it. Each replica is the server
of this package with a model of its own, or, with `engine=vllm`, vLLM's server in a process of its
own. Settings are those of `Settings`, as `name=value`.
"""

from __future__ import annotations

import asyncio
import shlex
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve
from starlette.responses import Response

from .. import load
from ..hub import check_model_place
from ..schema import UserError
from .admission import ServerConfig
from .engine import Engine
from .naming import get_default_name
from .protocol import RequestLimits
from .server import make_app
from .vllm.command import KEY_VARIABLE, VLLMSettings, check_installed, make_command
from .vllm.replica import HOST, ServerProcess, find_free_port

METHODS = ["GET", "HEAD", "POST", "OPTIONS"]


def _split(value: object) -> object:
    """`serve run` gives texts; a list is words in one of them, as in a shell."""
    return shlex.split(value) if isinstance(value, str) else value


Words = Annotated[list[str], BeforeValidator(_split)]


class Settings(BaseModel):
    """What an application is made of.

    Attributes:
        model: Folder of a saved model, or its name on the hub; every machine must reach it.
        engine: What runs a model: "local", the server of this package, or "vllm".
        name: The model's name in requests; by default the folder's, without /final.
        replicas: Copies of the model at the start, and the fewest.
        max_replicas: The most copies. Above `replicas`, Ray adds some while requests wait.
        max_batch: Answers that a replica writes together.
        max_queue: Requests that may wait at a replica.
        max_tokens: Tokens of an answer at most.
        max_pictures: Images of a request at most.
        cpus: Processors that a replica claims.
        gpus: GPUs that a replica claims; with 0 the local engine computes on processors.
        dtype: Data type of the weights: auto, float32, bfloat16 or float16.
        token: The api_key that clients must send.
        allowed_hosts: Names by which clients call the local engine, beside its addresses.
        engine_args: Further options of `vllm serve`, as in a shell.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: Literal["local", "vllm"] = "local"
    name: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    max_batch: int = Field(16, ge=1)
    max_queue: int = Field(64, ge=1)
    max_tokens: int = Field(1024, ge=1)
    max_pictures: int = Field(8, ge=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    dtype: str = "auto"
    token: str | None = None
    allowed_hosts: Words = []
    engine_args: Words = []

    @model_validator(mode="after")
    def _check_pairs(self) -> Settings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, but must be at least replicas,"
                f" {self.replicas}"
            )
        if self.engine == "local" and self.engine_args:
            raise ValueError(
                "engine_args are for vLLM's server; add engine=vllm, or leave them out"
            )
        if self.engine == "vllm" and self.allowed_hosts:
            raise ValueError("vLLM's server does not check names of hosts; leave allowed_hosts out")
        return self


def app(settings: Settings | dict[str, Any]) -> serve.Application:
    """Return the application for `serve run`.

    Args:
        settings: See `Settings`. Ray gives them by name.

    Raises:
        UserError: The model is not there, or vLLM cannot serve it.
    """
    settings = Settings.model_validate(settings)
    check_model_place(settings.model)
    if settings.engine == "vllm":
        check_installed()
        make_vllm_command(settings, 0)  # refuses what cannot be served before a replica starts
    options: dict = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch,
        }
        options = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        VLLMReplica if settings.engine == "vllm" else _make_local_replica(settings),
        name="sparsecut",
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        **options,
    )
    return deployment.bind(settings)


# ---- the server of this package


def _make_local_replica(settings: Settings) -> type:
    @serve.ingress(lambda: make_replica_app(settings))
    class LocalReplica:
        """One server with one model."""

        def __init__(self, settings: Settings):
            self.settings = settings

    return LocalReplica


def make_replica_app(settings: Settings) -> FastAPI:
    """Load the model and return the web application of a replica."""
    try:
        model, processor = load(settings.model, dtype=settings.dtype)
    except UserError as error:  # Ray shows the end of a traceback only
        raise RuntimeError(str(error)) from None
    if settings.gpus:
        model.to("cuda")
    engine = Engine(model, processor, max_batch=settings.max_batch, max_queue=settings.max_queue)
    limits = RequestLimits(
        max_tokens=settings.max_tokens,
        default_tokens=min(RequestLimits.default_tokens, settings.max_tokens),
        max_images=settings.max_pictures,
    )
    config = ServerConfig(
        name=settings.name or get_default_name(settings.model),
        request_limits=limits,
        # Every request comes from Ray's proxy, so addresses tell nothing.
        max_per_address=settings.max_batch + settings.max_queue,
        token=settings.token,
        allowed_hosts=tuple(settings.allowed_hosts),
    )
    return make_app(engine, config)


# ---- vLLM's server


def make_vllm_command(settings: Settings, port: int) -> list[str]:
    """The command line of a replica's server of vLLM.

    Raises:
        UserError: vLLM cannot serve the model exactly.
    """
    return make_command(
        VLLMSettings(
            model=settings.model,
            host=HOST,
            port=port,
            name=settings.name or get_default_name(settings.model),
            max_tokens=settings.max_tokens,
            max_images=settings.max_pictures,
            dtype=settings.dtype,
            further=("--max-num-seqs", str(settings.max_batch), *settings.engine_args),
        )
    )


proxy = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@serve.ingress(proxy)
class VLLMReplica:
    """One server of vLLM in a process of its own, and requests that are passed on to it."""

    async def __init__(self, settings: Settings):
        port = find_free_port()
        environment = {KEY_VARIABLE: settings.token} if settings.token else {}
        self.server = ServerProcess(make_vllm_command(settings, port), port, environment)
        await asyncio.to_thread(self.server.wait_until_ready)

    def check_health(self) -> None:
        """Ray calls this, and starts the replica anew where it raises."""
        self.server.check()

    def __del__(self):
        self.server.close()

    @proxy.api_route("/{path:path}", methods=METHODS)
    async def pass_on(self, request: Request) -> Response:
        """Answer a request as vLLM's server does."""
        return await self.server.pass_on(request)
