"""Checks of what a server is told to use: settings, store, model and posterior, port, keys, hub."""

from __future__ import annotations

import difflib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from server.findings import Finding
from server.machine_checks import Child
from server.settings import Settings
from training.embedded import NAME
from training.hub import in_cache, reason

_GIB = 1 << 30


def environment(config: Path | None) -> Iterator[Finding]:
    """Variables that begin like ours and name no setting; ``config`` is the file that the command line names."""
    from clients.config import FILE_VARIABLE, find_file, variables
    from clients.settings import ClientSettings

    known = {FILE_VARIABLE}
    for table, model in (("serve", Settings), ("client", ClientSettings)):
        known |= {name for names in variables(model, table).values() for name in names}
    odd = sorted(name for name in os.environ if name.startswith("ABMLL_") and name not in known)
    file = find_file(config)
    where = f"file {file}" if file else "no file"
    if odd:
        close = difflib.get_close_matches(odd[0], known, n=1)
        mend = f"did you mean {close[0]}?" if close else "`abmll config init FILE` lists the settings"
        yield Finding("settings", "warn", f"{where}; {', '.join(odd)} names no setting", mend)
    else:
        yield Finding("settings", "ok", f"{where}; `abmll config show` tells what counts")


def store(settings: Settings) -> Iterator[Finding]:
    """Whether the store can be written, and has room."""
    folder = settings.store
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        yield Finding("store", "fail", f"{there} is no folder", "choose another --store")
        return
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x")
    except OSError as error:
        yield Finding("store", "fail", f"{there} cannot be written: {error.strerror}", "mend it, or choose --store")
        return
    free = shutil.disk_usage(there).free
    tasks = [path for path in folder.glob("tasks/*") if not path.name.startswith(".")]
    made = f"{len(tasks)} tasks" if folder.is_dir() else "will be made"
    detail = f"{folder}: {made}, {free / _GIB:.1f} GiB free"
    if free < _GIB:
        yield Finding("store", "warn", detail, "free space: teaching a task fails on a full disk")
    else:
        yield Finding("store", "ok", detail)


def start_probe(settings: Settings) -> Child:
    """Begins to import torch and to load the global posterior; downloads nothing."""
    compare = "compare" if _is_here(settings) else "alone"
    return Child(["-m", "server.probe", settings.model_dump_json(), compare])


def start_cluster(settings: Settings) -> Child | None:
    """Begins to join the Ray cluster, where the settings name one."""
    if settings.ray_address is None:
        return None
    return Child(["-m", "server.cluster.probe", settings.model_dump_json()])


def cluster(settings: Settings, probe: Child | None) -> Iterator[Finding]:
    """Whether the Ray cluster lets us in, and has what the engines and an adaptation want."""
    if probe is None:
        return
    found, why = probe.told()
    if not found:
        yield Finding("cluster", "fail", f"cannot be joined: {why}", "mend what packages tells of")
    elif "error" in found[0]:
        detail, _, mend = found[0]["error"].partition("; ")
        yield Finding("cluster", "fail", detail, mend)
    else:
        told = found[0]
        detail = f"{told['nodes']} machines at {settings.ray_address} with Ray {told['version']}: {told['has']}"
        if told["lacks"]:
            mend = "add machines, or ask for fewer --replicas, --threads, --adapt-threads, --adapt-resource"
            yield Finding("cluster", "warn", f"{detail}; wanted: {told['lacks']}", mend)
        else:
            yield Finding("cluster", "ok", detail)


def posterior(settings: Settings, probe: Child) -> Iterator[Finding]:
    """Whether the global posterior is whole, and made for the base model."""
    found, why = probe.told()
    if len(found) < 2:
        yield Finding("posterior", "fail", f"cannot be loaded: {why}", "mend what torch and packages tell of")
        return
    told = found[1]
    if "error" in told:
        yield Finding("posterior", "fail", told["error"], "restore it, or name others with --model and --posterior")
        return
    detail = f"{told['family']}, whole, made for {told['model']}"
    if not _is_here(settings):
        yield Finding("posterior", "warn", f"{detail}; not compared with {settings.model}", "download the model")
    elif not told["calibrated"]:
        yield Finding("posterior", "warn", f"{detail}, not calibrated", "`abmll calibrate`")
    else:
        yield Finding("posterior", "ok", detail)


def port(settings: Settings) -> Iterator[Finding]:
    """Whether the port is free, or what answers there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    address = f"{host}:{settings.port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.settimeout(2)
            if probe.connect_ex((host, settings.port)) == 0:  # raises where the host's name leads nowhere
                yield _answering(f"[{host}]:{settings.port}" if ":" in host else address, address)
                return
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((settings.host, settings.port))
        yield Finding("port", "ok", f"{settings.host}:{settings.port} is free")
    except OSError as error:
        detail = f"{settings.host}:{settings.port} cannot be had: {error.strerror or error}"
        yield Finding("port", "fail", detail, "choose another --host or --port")


def _answering(authority: str, address: str) -> Finding:
    import httpx

    try:
        info = httpx.get(f"http://{authority}/openapi.json", timeout=5).json()["info"]
        if info["title"] == "abmll":
            detail = f"abmll {info['version']} answers at {address} already"
            return Finding("port", "warn", detail, "for another server choose another --port")
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        pass
    return Finding("port", "fail", f"another program has {address}", "end it, or choose another --port")


def keys(settings: Settings) -> Iterator[Finding]:
    """Whether the file of keys can be used, and by nobody else."""
    from server.keys import Keys

    path = settings.keys
    if path is None:
        if settings.host in ("127.0.0.1", "::1", "localhost"):
            yield Finding("keys", "ok", "none: everybody on this machine may do everything")
        else:
            mend = "`abmll keys add`, then --keys FILE"
            yield Finding("keys", "warn", f"none: whoever reaches {settings.host} may ask, teach and delete", mend)
        return
    found = Keys(path).all() if path.exists() else []
    if not found:
        what = "holds no key" if path.exists() else "is not there"
        yield Finding("keys", "fail", f"{path} {what}", f"`abmll keys add NAME --keys {path}`")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    detail = f"{path}: {len(found)} keys, mode {mode:04o}"
    if mode & 0o077:
        yield Finding("keys", "warn", f"{detail}, others can open it", f"`chmod 600 {path}`")
    else:
        yield Finding("keys", "ok", detail)


def hub(settings: Settings) -> Iterator[Finding]:
    """Whether a model on the hub can be had."""
    model = settings.model
    if model in (None, NAME):
        yield Finding("model", "ok", f"the embedded one, {NAME}")
        return
    if Path(model).is_dir():
        whole = (Path(model) / "config.json").is_file()
        if whole:
            yield Finding("model", "ok", model)
        else:
            yield Finding("model", "fail", f"{model} has no config.json", "check --model")
        return
    if Path(model).is_absolute() or model.startswith("."):
        yield Finding("model", "fail", f"there is no folder {model}", "check --model")
        return
    if in_cache(model, settings.revision):
        yield Finding("model", "ok", f"{model} is in the hub's cache")
        return
    yield _remote(model, settings.revision)


def _is_here(settings: Settings) -> bool:
    model = settings.model
    return model in (None, NAME) or Path(model).is_dir() or in_cache(model, settings.revision)


def _remote(model: str, revision: str | None) -> Finding:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        HfApi().auth_check(model)
        HfApi().model_info(model, revision=revision)
    except Exception as error:  # the hub's client has had several HTTP libraries, each with its own errors
        told = reason(error, model, revision)
        return Finding("model", "fail", told.what, told.mend)
    token = "with HF_TOKEN" if get_token() else "without HF_TOKEN"
    return Finding("model", "ok", f"{model} can be had from the hub {token}")
