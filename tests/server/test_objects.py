"""Object storage: a folder, and S3's API as moto's server speaks it, through the real s3fs."""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from abmll.errors import StoreFailure, TaskConflict, TaskNotFound
from abmll.store import Record, StoredPosterior, replace_file
from server.objects import Objects
from server.service import REFRESH_SECONDS
from server.store import TaskStore
from tests.server.conftest import Server, all_processes, assert_ended, free_port, random_posterior, wait_for
from tests.server.test_faults import probabilities
from tests.server.test_http import adapt
from tests.server.test_load import metric


class S3:
    """A server of S3's API that can go away and come back with what it had."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self.up()

    def up(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def down(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    running = S3()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", running.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield running
    running.down()


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/models"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/objects" if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture
def open_store(place: str, global_posterior: tuple[Path, StoredPosterior], tmp_path: Path) -> Callable[..., TaskStore]:
    def open_one(name: str, *, shared: bool = True) -> TaskStore:
        return TaskStore(tmp_path / name, global_posterior[1], objects=Objects(place) if shared else None)

    return open_one


def record(task: str) -> Callable[[int], Record]:
    return lambda version: Record(task=task, version=version)


def test_what_one_store_does_the_others_do_too(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    one, other = open_store("one"), open_store("other")
    made = [one.add("t", random_posterior(tiny_model_folder, seed), None, record("t")) for seed in (1, 2)]
    assert other.names() == ["global"]
    other.refresh()
    assert other.names() == ["global", "t"]
    assert [v.stored.digest for v in other.versions("t") if v.stored] == [stored.digest for stored in made]
    other.serve("t", {1: 1.0})
    one.refresh()
    assert one.choose("t", None, 0.5).digest == made[0].digest
    one.serve("t", None)
    other.refresh()
    assert other.serving("t") is None
    third = other.add("t", random_posterior(tiny_model_folder, 3), None, record("t"))
    assert third.record.version == 3
    other.current("t")
    assert one.delete_version("t", 1) == [made[0].digest]
    assert sorted(Objects(place).listing().versions["t"]) == [2, 3]
    with pytest.raises(TaskNotFound):
        other.serve("t", {1: 1.0})  # it has not been told yet, and looks
    assert other.serving("t") is None
    assert other.refresh() == {("t", 1): [made[0].digest]}
    assert [version.number for version in other.versions("t")] == [2, 3]
    with pytest.raises(TaskConflict):
        other.delete_version("t", 3)
    one.delete("t")
    assert Objects(place).listing().versions == {}
    (gone,) = other.refresh().items()
    assert (gone[0], set(gone[1])) == (("t", None), {made[1].digest, third.digest})
    assert other.refresh() == {}
    assert other.names() == ["global"]
    with pytest.raises(TaskNotFound):
        other.current("t")
    again = other.add("t", random_posterior(tiny_model_folder, 4), None, record("t"))
    one.refresh()
    assert one.current("t").digest == again.digest


def test_old_versions_go_from_object_storage_too(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    one, other = open_store("one"), open_store("other")
    made = [one.add("t", random_posterior(tiny_model_folder, seed), None, record("t")) for seed in (1, 2, 3)]
    other.refresh()
    other.versions("t")
    assert one.prune("t", 3) == {}
    assert {number: set(digests) for number, digests in one.prune("t", 1).items()} == {
        1: {made[0].digest},
        2: {made[1].digest},
    }
    assert sorted(Objects(place).listing().versions["t"]) == [3]
    assert other.refresh() == {("t", 1): [made[0].digest], ("t", 2): [made[1].digest]}


def test_a_store_that_was_there_before_goes_to_object_storage_once(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path
) -> None:
    before = open_store("one", shared=False)
    before.add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    newest = before.add("t", random_posterior(tiny_model_folder, 2), None, record("t"))
    before.serve("t", {1: 0.5, 2: 0.5})
    one, other = open_store("one"), open_store("other")
    one.refresh()
    other.refresh()
    assert other.current("t").digest == newest.digest
    assert other.serving("t") == {1: 0.5, 2: 0.5}
    other.delete("t")
    one.refresh()
    assert one.names() == ["global"], "a deleted task must not come back from a folder that still had it"


def test_an_empty_place_is_filled_and_takes_nothing_from_the_disk(
    open_store: Callable[..., TaskStore],
    tiny_model_folder: Path,
    global_posterior: tuple[Path, StoredPosterior],
    tmp_path: Path,
    place: str,
) -> None:
    one = open_store("one")
    made = one.add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    one.serve("t", {1: 1.0})
    empty = TaskStore(tmp_path / "one", global_posterior[1], objects=Objects(f"{place}-of-another-name"))
    empty.refresh()
    fetched = TaskStore(tmp_path / "two", global_posterior[1], objects=Objects(f"{place}-of-another-name"))
    fetched.refresh()
    for store in (empty, fetched):
        assert store.current("t").digest == made.digest
        assert store.serving("t") == {1: 1.0}
    back = open_store("one")
    back.refresh()
    assert back.current("t").digest == made.digest
    open_store("other").delete("t")
    back.refresh()
    assert back.names() == ["global"]


def test_a_place_that_is_gone_while_the_server_runs_takes_nothing_from_the_disk(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    store = open_store("one")
    made = store.add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    files, root = url_to_fs(place)
    files.rm(root, recursive=True)  # as where a share is not mounted any more
    with pytest.raises(StoreFailure, match="is not the place that it was"):
        store.refresh()
    assert store.current("t").digest == made.digest
    anew = open_store("one")
    anew.refresh()
    assert Objects(place).listing().versions["t"].keys() == {1}


def test_a_version_that_cannot_be_fetched_is_passed_over_and_can_be_deleted(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    open_store("one").add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    files, root = url_to_fs(place)
    files.rm(f"{root}/blobs", recursive=True)
    other = open_store("other")
    other.refresh()
    assert other.add("t", random_posterior(tiny_model_folder, 2), None, record("t")).record.version == 2
    third = open_store("third")
    third.delete("t")
    other.refresh()
    assert other.names() == ["global"]


def test_a_pointer_whose_reply_was_lost_is_ours(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = url_to_fs(place, use_listings_cache=False)  # the one that the store uses
    write = files.pipe_file

    def lose_the_reply(path: str, data: bytes, mode: str = "overwrite") -> None:
        write(path, data, mode=mode)
        if path.endswith("v0001.json"):
            raise FileExistsError(path)

    monkeypatch.setattr(files, "pipe_file", lose_the_reply)
    made = open_store("one").add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    other = open_store("other")
    other.refresh()
    assert other.current("t").digest == made.digest


def test_an_upload_that_fails_leaves_nothing(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, root = url_to_fs(place, use_listings_cache=False)

    def failing_on_tensors(write: Callable[..., None]) -> Callable[..., None]:
        def fail_on_tensors(path: str | Path, data: bytes, **more: Any) -> None:
            if str(path).endswith(".safetensors"):
                raise OSError("quota exceeded")
            write(path, data, **more)

        return fail_on_tensors

    monkeypatch.setattr(files, "pipe_file", failing_on_tensors(files.pipe_file))
    monkeypatch.setattr("server.objects.replace_file", failing_on_tensors(replace_file))
    with pytest.raises(StoreFailure, match="quota exceeded"):
        open_store("one").add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    assert [path.removeprefix(f"{root}/") for path in files.find(root)] == ["PLACE"]


def test_two_tasks_of_one_name_are_told_and_neither_is_lost(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path
) -> None:
    mine = open_store("one", shared=False).add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    theirs = open_store("other").add("t", random_posterior(tiny_model_folder, 2), None, record("t"))
    one, other = open_store("one"), open_store("other")
    with pytest.raises(StoreFailure, match=r"version 1 of task 't': it is in .* another one"):
        one.refresh()
    other.refresh()
    assert one.current("t").digest == mine.digest
    assert other.current("t").digest == theirs.digest


def test_a_version_that_cannot_be_brought_holds_up_no_other(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path
) -> None:
    posterior = random_posterior(tiny_model_folder, 1)
    open_store("one", shared=False).add("a", posterior, None, record("a"))
    other = open_store("other")
    for name in ("a", "z"):
        other.add(name, random_posterior(tiny_model_folder, 2), None, record(name))
    one = open_store("one")
    with pytest.raises(StoreFailure, match="version 1 of task 'a'"):
        one.refresh()
    assert one.names() == ["global", "a", "z"]
    one.add("z", posterior, None, record("z"))
    other.refresh()
    assert [version.number for version in other.versions("z")] == [1, 2]
    with pytest.raises(StoreFailure, match="version 1 of task 'a'"):
        one.add("a", posterior, None, record("a"))


def test_a_disk_that_takes_nothing_and_a_place_that_gives_nothing_are_tried_once(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, one = open_store("other"), open_store("one")
    for name in ("a", "b", "c"):
        other.add(name, random_posterior(tiny_model_folder, 1), None, record(name))
    for error in (OSError(errno.ENOSPC, "no space left"), StoreFailure("nobody answers")):
        tried: list[object] = []

        def fetch(*_: object, error: Exception = error, tried: list[object] = tried) -> None:
            tried.append(error)
            raise error

        monkeypatch.setattr(Objects, "fetch", fetch)
        with pytest.raises(StoreFailure, match=str(error.args[-1])):
            one.refresh()
        assert len(tried) == 1
    one.names()


def test_of_two_servers_that_make_a_version_at_once_one_is_told_to_try_again(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path
) -> None:
    one, other = open_store("one"), open_store("other")
    posterior = random_posterior(tiny_model_folder, 1)

    def while_other_is_faster(version: int) -> Record:
        other.add("t", random_posterior(tiny_model_folder, 2), None, record("t"))
        return Record(task="t", version=version)

    with pytest.raises(StoreFailure, match="version 1 of task 't'; try again"):
        one.add("t", posterior, None, while_other_is_faster)
    assert one.names() == ["global"]
    assert one.add("t", posterior, None, record("t")).record.version == 2


def test_a_pointer_that_cannot_be_read_deletes_nothing_and_its_number_is_taken(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    one = open_store("one")
    first = one.add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    files, root = url_to_fs(place)
    files.pipe_file(f"{root}/tasks/t/v0001.json", b"")
    one.refresh()
    assert one.current("t").digest == first.digest
    assert one.add("t", random_posterior(tiny_model_folder, 2), None, record("t")).record.version == 2
    assert open_store("other").add("t", random_posterior(tiny_model_folder, 3), None, record("t")).record.version == 3
    one.refresh()
    one.delete("t")
    assert files.find(f"{root}/tasks") == []


def test_a_version_that_arrives_damaged_is_not_taken(
    open_store: Callable[..., TaskStore], tiny_model_folder: Path, place: str
) -> None:
    open_store("one").add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    files, root = url_to_fs(place)
    (path,) = (path for path in files.find(root) if path.endswith("posterior.safetensors"))
    whole: bytes = files.cat_file(path)
    files.pipe_file(path, whole[: len(whole) // 2])
    other = open_store("other")
    other.refresh()
    assert other.names() == ["global"]
    files.pipe_file(path, whole)
    other.refresh()
    assert other.names() == ["global", "t"]


def test_nothing_is_made_here_that_object_storage_did_not_take(
    s3: S3, bucket: str, global_posterior: tuple[Path, StoredPosterior], tiny_model_folder: Path, tmp_path: Path
) -> None:
    store = TaskStore(tmp_path / "store", global_posterior[1], objects=Objects(bucket))
    posterior = random_posterior(tiny_model_folder, 1)
    first = store.add("t", posterior, None, record("t"))
    s3.down()
    try:
        for change in (
            lambda: store.add("t", posterior, None, record("t")),
            lambda: store.delete("t"),
            lambda: store.serve("t", {1: 1.0}),
            store.refresh,
        ):
            with pytest.raises(StoreFailure, match=bucket):
                change()
        assert [version.number for version in store.versions("t")] == [1]
        assert store.serving("t") is None
    finally:
        s3.up()
    assert store.add("t", posterior, None, record("t")).record.version == 2
    assert first.digest == store.choose("t", 1, 0.0).digest


def test_names_that_somebody_else_put_there_lead_nowhere(
    open_store: Callable[..., TaskStore], tmp_path: Path, tiny_model_folder: Path, place: str
) -> None:
    store = open_store("one")
    store.add("t", random_posterior(tiny_model_folder, 1), None, record("t"))
    files, root = url_to_fs(place)
    pointer: bytes = files.cat_file(f"{root}/tasks/t/v0001.json")
    for path in ("tasks/UP/v0001.json", "tasks/t/v1.json", "tasks/a b/v0001.json"):
        if place.startswith("file"):
            files.makedirs(f"{root}/{path}".rsplit("/", 1)[0], exist_ok=True)
        files.pipe_file(f"{root}/{path}", pointer)
    files.pipe_file(f"{root}/tasks/t/v0002.json", b'{"blob": "../../elsewhere"}')
    other = open_store("other")
    other.refresh()
    assert other.names() == ["global", "t"]
    assert [version.number for version in other.versions("t")] == [1]
    assert sorted(p.name for p in (tmp_path / "other" / "tasks").iterdir()) == ["t"]


@pytest.mark.parametrize(
    ("url", "said"),
    [("nowhere://a/b", "nowhere"), ("s3://no-such-bucket-here/a", "no-such-bucket-here")],
)
def test_a_place_that_is_not_there_is_told_before_serving(
    s3: S3, start_server: Callable[..., Server], url: str, said: str
) -> None:
    server = start_server(objects=url, wait=False)
    assert server.process.wait(240) == 1
    last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("abmll: ")
    assert said in last
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_task_outlives_the_disk_and_is_seen_by_other_servers(
    s3: S3, bucket: str, start_server: Callable[..., Server], tmp_path: Path
) -> None:
    one, other = (start_server(store=tmp_path / name, objects=bucket) for name in ("one", "other"))
    done = one.wait_job(adapt(one, "t")["job"])
    assert done["status"] == "done", done
    expected = probabilities(one, "t")
    wait_for(lambda: other.http.get("/tasks/t").status_code == 200, 20 * REFRESH_SECONDS)
    assert probabilities(other, "t") == expected

    processes = all_processes(one)
    one.process.send_signal(signal.SIGKILL)
    one.process.wait(30)
    assert_ended(processes, 30)
    shutil.rmtree(tmp_path / "one")
    left = tmp_path / "one" / "tasks" / ".deleted.left"
    left.mkdir(parents=True)
    anew = start_server(store=tmp_path / "one", objects=bucket)
    assert not left.exists()
    assert probabilities(anew, "t") == expected

    s3.down()
    try:
        job = adapt(anew, "later")["job"]
        wait_for(lambda: metric(anew, "abmll_store_up") == 0)
        assert probabilities(anew, "t") == expected
        refused = anew.http.delete("/tasks/t")
        assert refused.status_code == 503
        assert bucket in refused.json()["error"]["message"]
        wait_for(lambda: "trying again" in anew.log.read_text())
        wait_for(lambda: anew.http.get(f"/adapt/{job}").json()["status"] == "running")
    finally:
        s3.up()
    assert anew.wait_job(job)["status"] == "done"
    wait_for(lambda: metric(anew, "abmll_store_up") == 1)
    assert anew.http.delete("/tasks/t").status_code == 204
    wait_for(lambda: other.http.get("/tasks/t").status_code == 404, 20 * REFRESH_SECONDS)
    assert other.http.get("/tasks/later").status_code == 200
