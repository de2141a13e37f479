"""What a small inference server withstands, in 19 points: the tests of each one.

`POINTS` names the tests that are in other files; what they do not cover is tested here.
"""

from __future__ import annotations

import ast
import contextlib
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import INFER, Server, infer_body, launch, refused, wait_until

import mexit

TESTS = Path(__file__).parents[1]
PACKAGE = Path(mexit.__file__).parent

POINTS = {
    "01 malformed JSON": [
        "serving/test_bad_requests.py::test_bad_json",
        "serving/test_bad_requests.py::test_bad_index_requests",
        "serving/test_bad_requests.py::test_mutated_requests_never_break_the_server",
        "serving/test_request_body.py::test_the_depth_limit_is_exact",
    ],
    "02 sizes, shapes, types and names": [
        "serving/test_bad_requests.py::test_bad_requests",
        "serving/test_bad_requests.py::test_bad_binary_tensors",
        "serving/test_bad_requests.py::test_bad_raw_requests",
        "serving/test_bad_requests.py::test_unknown_names_are_404",
        "serving/test_binary_fuzz.py::test_mutated_binary_requests",
        "serving/test_grpc_fuzz.py::test_mutated_messages",
        "serving/test_random_requests.py::test_random_requests",
    ],
    "03 length of the JSON part": ["serving/test_bad_requests.py::test_bad_header_lengths"],
    "04 Content-Length and request smuggling": [
        "serving/test_bad_requests.py::test_request_smuggling",
        "serving/test_limits.py::test_an_announced_size_over_64_mib_is_refused_unread",
        "serving/test_limits.py::test_many_tiny_chunks_take_no_memory",
    ],
    "05 compressed bombs": [
        "serving/test_limits.py::test_the_limit_applies_after_decompression",
        "serving/test_request_body.py::test_the_size_after_each_coding_is_bounded",
        "serving/test_request_body.py::test_members_and_lengths_at_the_borders_of_blocks",
    ],
    "06 slow clients": [
        "serving/test_limits.py::test_connections_without_a_request_are_closed",
        "serving/test_limits.py::test_a_slow_body_times_out",
        "serving/test_limits.py::test_an_unread_response_is_dropped",
        "serving/test_limits.py::test_slow_clients_do_not_stop_others",
        "serving/test_supervisor.py::test_the_limit_of_connections",
        "serving/test_access.py::test_tls",
    ],
    "07 large batches and overload": [
        "serving/test_bad_requests.py::test_bad_requests",
        "serving/test_limits.py::test_a_full_queue_answers_503",
        "serving/test_worker_pool.py::test_short_jobs_are_refused_only_if_they_would_wait_for_tokens",
        "serving/test_service_rate_limit.py::test_a_flood_does_not_affect_another_client",
    ],
    "08 NaN and infinity": [
        "serving/test_bad_requests.py::test_bad_binary_tensors",
        "core/test_exit_policy.py::test_reaching_the_threshold_is_enough_and_nan_reaches_none",
        "core/test_exit_policy.py::test_nan_walks_to_the_last_exit",
    ],
    "09 reloads under load": [
        "serving/test_reload_under_load.py::test_every_answer_is_of_one_version",
        "serving/test_replaced_worker.py::test_versions_that_the_others_do_not_serve",
        "serving/test_repository.py::test_a_damaged_version_is_refused",
    ],
    "10 a process that is killed": [
        "serving/test_supervisor.py::test_connections_are_shared_and_a_killed_worker_is_replaced",
        "serving/test_reload_under_load.py::test_a_killed_worker_under_load",
        "serving/test_supervisor.py::test_workers_end_with_the_supervisor",
        "export/test_stopped_run.py::*",
        "train/test_interrupted_training.py::*",
    ],
    "11 a full disk and other failures of writing": ["test_write_failures.py::*"],
    "12 SIGTERM": [
        "serving/test_uvicorn_server.py::test_a_request_in_flight_is_answered",
        "serving/test_uvicorn_server.py::test_a_second_signal_ends_the_process",
        "serving/test_uvicorn_server.py::test_a_signal_under_load",
        "serving/test_supervisor.py::test_a_request_in_flight_is_answered_and_health_is_not_ready",
        "serving/test_supervisor.py::test_a_second_signal_ends_all",
        "serving/test_checklist.py::test_12_a_signal_during_the_start",
    ],
    "13 memory, files and threads over many requests": [
        "long/test_soak.py::test_memory_over_many_predictions",
        "long/test_soak.py::test_memory_of_the_server_over_many_requests",
        "serving/test_checklist.py::test_13_files_and_threads_over_many_requests",
    ],
    "14 access": [
        "serving/test_uvicorn_server.py::test_no_route_without_the_token",
        "serving/test_uvicorn_server.py::test_a_public_host_needs_a_token",
        "serving/test_uvicorn_server.py::test_loopback_by_default",
        "serving/test_uvicorn_server.py::test_internal_errors_are_logged_and_not_sent",
        "serving/test_access.py::test_tokens_of_a_file_and_the_admin",
        "serving/test_checklist.py::test_14_no_access_for_other_sites",
        "serving/test_checklist.py::test_14_tokens_are_compared_in_constant_time",
    ],
    "15 clients that disconnect": ["serving/test_limits.py::test_requests_of_clients_that_disconnect"],
    "16 jumps of the clock": ["serving/test_checklist.py::test_16_durations_do_not_follow_the_wall_clock"],
    "17 head and body of a response at once": ["serving/test_metrics.py::test_no_delayed_acknowledgement"],
    "18 damaged models": [
        "core/test_bundle.py::test_a_changed_bit_is_an_error_that_names_the_file",
        "core/test_bundle.py::test_a_missing_file_is_named",
        "serving/test_repository.py::test_a_folder_without_a_usable_model",
        "serving/test_checklist.py::test_18_a_damaged_model_is_not_served",
    ],
    "19 options, ports and two servers at once": [
        "serving/test_uvicorn_server.py::test_invalid_options",
        "serving/test_uvicorn_server.py::test_a_port_in_use",
        "serving/test_access.py::test_servers_that_do_not_start",
        "serving/test_access.py::test_unix_sockets_that_cannot_be_bound",
        "serving/test_first_start.py::test_of_two_first_starts_at_once_one_measures",
    ],
}


@pytest.mark.parametrize("point", POINTS)
def test_the_tests_of_a_point_exist(point: str) -> None:
    """A test that is renamed or removed is noticed here."""
    for reference in POINTS[point]:
        file, _, name = reference.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        assert names, file
        assert name == "*" or name in names, reference


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("delay_s", [0.2, 0.8, 1.5])
def test_12_a_signal_during_the_start(digits_bundle: Path, tmp_path: Path, workers: int, delay_s: float) -> None:
    """A server that is told to stop while it starts ends soon, and leaves no worker and no traceback."""
    log = tmp_path / "log"
    with launch(digits_bundle, log, workers=workers) as process:
        time.sleep(delay_s)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    wait_until(lambda: not any(is_running(int(pid)) for pid in children))
    assert "Traceback" not in log.read_text()


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def test_13_files_and_threads_over_many_requests(server: Server, images: NDArray[np.float32]) -> None:
    """Good, bad and cut requests leave neither open files nor threads."""

    def counts() -> tuple[int, int]:
        folder = Path(f"/proc/{server.process.pid}")
        return len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))

    def send_all() -> None:
        good, kept = infer_body(images[:1]), server.connect()
        for number in range(100):
            assert server.ask("POST", INFER, good)[0] == 200
            assert server.ask("POST", INFER, good[: number * 5])[0] == 400
            kept.request("POST", INFER, b"{")
            assert kept.getresponse().read()
            with socket.create_connection(("127.0.0.1", server.port)) as cut:
                cut.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        kept.close()

    send_all()
    before = counts()
    send_all()
    wait_until(lambda: counts() <= before)


@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
def test_14_no_access_for_other_sites(server: Server, images: NDArray[np.float32], method: str) -> None:
    """A page of another site gets no permission to read answers."""
    headers = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    status, answer, _ = server.ask(method, INFER, infer_body(images[:1]), headers)
    assert status == (405 if method == "OPTIONS" else 200)
    assert not [name for name in answer if name.startswith("access-control-")]
    assert not {"server", "x-powered-by"} & set(answer)


def test_14_tokens_are_compared_in_constant_time() -> None:
    """The comparison is `hmac.compare_digest`, and no token is compared by ==."""
    text = (PACKAGE / "serving" / "middleware.py").read_text()
    assert "hmac.compare_digest(" in text
    assert not re.search(r"token\s*[!=]=|[!=]=\s*token", text)


def test_16_durations_do_not_follow_the_wall_clock() -> None:
    """Only what a person reads is a time of day: Triton's `last_inference`. Deadlines and limits are monotonic."""
    wall = re.compile(r"\btime\.(?:time|time_ns|localtime|gmtime)\(|\bdatetime\b")
    found = {
        path.relative_to(PACKAGE).as_posix(): len(matches)
        for folder in ("serving", "runtime")
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if (matches := wall.findall(path.read_text()))
    }
    assert found == {"serving/metrics.py": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_18_a_damaged_model_is_not_served(bundle_copy: Path, tmp_path: Path, workers: int) -> None:
    """The message names the file."""
    segment = next((bundle_copy / "segments").rglob("*.onnx"))
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    message = refused(bundle_copy, tmp_path, workers=workers)
    assert message.startswith("mexit.errors.Damaged: ")
    assert segment.name in message
