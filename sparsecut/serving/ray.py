"""Replicas of the server by Ray Serve, which balances, restarts and scales them.

`serve run sparsecut.serving.ray:app model=FOLDER replicas=2` starts it. Each replica is the server
of this package with a model of its own. Settings are those of `Settings`, as `name=value`.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve

from .. import load
from ..hub import check_model_place
from ..schema import UserError
from .admission import ServerConfig
from .engine import Engine
from .server import make_app


class Settings(BaseModel):
    """What an application is made of.

    Attributes:
        model: Folder of a saved model, or its name on the hub; every machine must reach it.
        name: The model's name in requests; by default the folder's.
        replicas: Copies of the model at the start, and the fewest.
        max_replicas: The most copies. Above `replicas`, Ray adds some while requests wait.
        max_batch: Answers that a replica writes together.
        max_queue: Requests that may wait at a replica.
        cpus: Processors that a replica claims.
        gpus: GPUs that a replica claims; with 0 it computes on processors.
        dtype: Data type of the weights: auto, float32, bfloat16 or float16.
        token: The api_key that clients must send.
        allowed_hosts: Names by which clients call the server, beside its addresses.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    name: str | None = None
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    max_batch: int = Field(16, ge=1)
    max_queue: int = Field(64, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    dtype: str = "auto"
    token: str | None = None
    allowed_hosts: list[str] = []

    @model_validator(mode="after")
    def _check_numbers_of_replicas(self) -> Settings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, but must be at least replicas,"
                f" {self.replicas}"
            )
        return self


def app(settings: Settings) -> serve.Application:
    """Return the application for `serve run`.

    Args:
        settings: See `Settings`.

    Raises:
        UserError: The model is not there.
    """
    check_model_place(settings.model)

    @serve.ingress(lambda: make_replica_app(settings))
    class Replica:
        """One server with one model."""

    options: dict = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        scaling = {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch,
        }
        options = {"autoscaling_config": scaling}
    deployment = serve.deployment(
        Replica,
        name="sparsecut",
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        **options,
    )
    return deployment.bind()


def make_replica_app(settings: Settings) -> FastAPI:
    """Load the model and return the web application of a replica."""
    try:
        model, processor = load(settings.model, dtype=settings.dtype)
    except UserError as error:  # Ray shows the end of a traceback only
        raise RuntimeError(str(error)) from None
    if settings.gpus:
        model.to("cuda")
    engine = Engine(model, processor, max_batch=settings.max_batch, max_queue=settings.max_queue)
    config = ServerConfig(
        name=settings.name or Path(settings.model).name,
        # Every request comes from Ray's proxy, so addresses tell nothing.
        max_per_address=settings.max_batch + settings.max_queue,
        token=settings.token,
        allowed_hosts=tuple(settings.allowed_hosts),
    )
    return make_app(engine, config)
