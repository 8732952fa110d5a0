"""Settings of the server: one tree, with units and defaults; command line, environment and file are views of it.

What stands after ``; default:`` in a description is shown as the default, where the default itself says less.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from training.embedded import POSTERIOR, resolve


class Settings(BaseModel, frozen=True, extra="forbid"):
    """What ``abmll serve`` can be told. Built in code it reads nothing from outside: ``clients.config.load`` does."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on")
    engine: Literal["vllm", "torch"] = Field(
        default="torch", description="what runs the model; torch starts in seconds; default: vllm where it is installed"
    )
    model: str | None = Field(default=None, description="base model, hub name or folder; default: the embedded one")
    revision: str | None = Field(default=None, description="commit or tag of the base model on the hub")
    posterior: Path | None = Field(
        default=None, description="folder of the global posterior; default: the embedded one"
    )
    store: Path = Field(default=Path("abmll-store"), description="folder of task posteriors and adaptation jobs")
    objects: str | None = Field(
        default=None,
        description="object storage that has every task posterior too, such as s3://bucket/prefix; several servers may "
        "share one; default: none",
    )
    draws: int = Field(default=8, ge=1, description="draws of a question that says none, or auto, at most")
    max_draws: int = Field(default=64, ge=1, description="most draws that a question may ask for")
    context: int | None = Field(
        default=None, ge=16, description="longest prompt and answer, in tokens; default: the model's limit"
    )
    replicas: int | None = Field(
        default=None, ge=1, description="engines, each in a process of Ray Serve; default: one, without Ray"
    )
    max_replicas: int | None = Field(
        default=None, ge=1, description="engines at most, more of them as questions queue; default: as many as replicas"
    )
    replica_load: float = Field(
        default=16.0, gt=0, description="questions under way for each engine above which there come to be more of them"
    )
    ray_address: str | None = Field(
        default=None, description="Ray cluster to run engines and adaptation on; default: one begun on this machine"
    )
    ray_application: str = Field(
        default="abmll-engines",
        description="name of this server's engines in the Ray cluster; servers that share one each need their own",
    )
    device: str = Field(
        default="auto", description="device of the torch engine, such as cpu or cuda:1; auto: a GPU if there is one"
    )
    dtype: Literal["float32", "bfloat16", "float16", "nf4"] = Field(
        default="float32", description="base weights of the torch engine and of adaptation; nf4: in 4 bits"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of the torch engine; default: torch's choice"
    )
    vllm_options: dict[str, Any] = Field(
        default={},
        description="arguments of vLLM's engine, by their names; default: vLLM's own",
        json_schema_extra={"option": "--vllm-option"},
    )
    adapt_device: str = Field(
        default="cpu", description="device of adaptation, such as cuda:1; vLLM takes the whole of its own GPU"
    )
    adapt_threads: int = Field(default=1, ge=1, description="CPU threads of adaptation, which runs at low priority")
    adapt_jobs: int = Field(default=1, ge=1, description="adaptations at a time, with replicas; without: one")
    adapt_resources: dict[str, float] = Field(
        default={},
        description="what Ray sets aside for an adaptation, with replicas; default: its CPUs and its GPU",
        json_schema_extra={"option": "--adapt-resource"},
    )
    concurrency: int = Field(default=32, ge=1, description="questions in the engine, or in each, at a time")
    queue: int = Field(default=512, ge=0, description="questions that may wait for the engine; 429 past that")
    job_queue: int = Field(default=256, ge=1, description="adaptation jobs that may wait; 429 past that")
    timeout: float = Field(default=60.0, gt=0, description="seconds until an unanswered question is given up; 504")
    max_body: int = Field(default=16 << 20, ge=1024, description="largest body of a request, in bytes; 413 past that")
    cache: int = Field(
        default=1 << 30, ge=1 << 20, description="bytes of posteriors to keep in memory, and as many of draws"
    )
    feedback_kept: int = Field(default=200_000, ge=1, description="newest answers that feedback can be given on")
    versions_kept: int | None = Field(
        default=None,
        ge=1,
        description="newest versions of each task to keep, besides those that answer; older ones are deleted; default: "
        "all",
    )
    keys: Path | None = Field(
        default=None,
        description="file of API keys, as `abmll keys add` makes it; default: everybody may do everything",
        json_schema_extra={"variable": "ABMLL_KEY_FILE"},
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="OpenTelemetry collector of traces, http://HOST:4317 or http://HOST:4318/v1/traces; default: none",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least severe log")
    log_format: Literal["text", "json"] = Field(default="text", description="lines for people, or one JSON object each")
    log_prompts: bool = Field(default=False, description="write the questions into the log")

    @field_validator("device", "adapt_device")
    @classmethod
    def _is_device(cls, device: str, info: ValidationInfo) -> str:
        more = "auto, " if info.field_name == "device" else ""
        if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", device) and not (more and device == "auto"):
            raise ValueError(f"give {more}cpu, cuda, or one of several GPUs, such as cuda:1")
        return device

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
            raise ValueError("give http://HOST:4317 (gRPC) or http://HOST:4318/v1/traces (HTTP)")
        return endpoint

    @field_validator("ray_address")
    @classmethod
    def _is_cluster(cls, address: str | None) -> str | None:
        if address is not None and address != "auto" and not re.fullmatch(r"[^\s:/]+:\d+", address):
            raise ValueError("give auto, or HOST:PORT of the cluster's head, such as 10.0.0.5:6379")
        return address

    @field_validator("ray_application")
    @classmethod
    def _is_application(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise ValueError("give 1 to 63 letters, digits, '.', '_' and '-', such as team-b")
        return name

    @model_validator(mode="after")
    def _replicas_in_range(self) -> Settings:
        if self.max_replicas is not None and self.replicas is None:
            raise ValueError("max_replicas is for several engines; give replicas, the fewest, too")
        if self.ray_address is not None and self.replicas is None:
            raise ValueError("ray_address is for engines behind Ray; give replicas, their number, too")
        if self.max_replicas is not None and self.max_replicas < (self.replicas or 1):
            raise ValueError(f"max_replicas is {self.max_replicas}, below replicas {self.replicas}")
        return self

    @model_validator(mode="after")
    def _gpus_are_of_ray(self) -> Settings:
        for name in ("device", "adapt_device"):
            device: str = getattr(self, name)
            if self.replicas is not None and re.fullmatch(r"(cuda|xpu):[1-9]\d*", device):
                raise ValueError(
                    f"{name} is {device}, but with replicas Ray chooses the GPU of each process, which sees that one "
                    f"alone; give {device.partition(':')[0]}"
                )
        return self

    @model_validator(mode="after")
    def _draws_in_range(self) -> Settings:
        if self.draws > self.max_draws:
            raise ValueError(f"draws is {self.draws}, above max_draws {self.max_draws}")
        return self

    @property
    def base_model(self) -> str:
        """Hub name or folder of the base model."""
        return resolve(self.model)

    @property
    def global_posterior(self) -> Path:
        """Folder of the global posterior."""
        return self.posterior or POSTERIOR
