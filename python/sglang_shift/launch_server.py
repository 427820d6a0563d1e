"""``python -m sglang_shift.launch_server`` starts SGLang's server with Shift Parallelism.

It takes every flag of ``python -m sglang.launch_server``, and our flags (``--help``). Without our flags, it serves with
stock SGLang.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sglang_shift.errors import ShiftError, print_error
from sglang_shift.start_up_log import LAUNCHER_MESSAGES, leave_out

if TYPE_CHECKING:
    from sglang_shift.args.server_args import ShiftServerArgs
    from sglang_shift.config import ShiftConfig

logger = logging.getLogger(__name__)

LAST_PORT = 65535


def run_server(server_args: ShiftServerArgs, run_rank: Callable[..., None] | None = None) -> None:
    """Serve until the server is stopped.

    Args:
        server_args: The arguments, which need not be resolved.
        run_rank: The function that each rank's process runs, if it is not our ``run_scheduler_process``.

    Raises:
        ShiftError: there is a problem before any process is started. The error has one sentence.
    """
    from sglang.launch_server import run_server as run_stock_server
    from sglang.srt.entrypoints.http_server import launch_server

    from sglang_shift import seams
    from sglang_shift.platforms import cpu
    from sglang_shift.resolution import shift_config_of
    from sglang_shift.runtime.scheduler import run_scheduler_process

    resolve(server_args)
    check_port(server_args.host, server_args.port, server_args.node_rank)
    config = shift_config_of(server_args)
    if config is None:
        run_stock_server(server_args)
    else:
        from sglang_shift.runtime.tokenizer_manager import init_tokenizer_manager

        seams.check_sources()
        leave_out(LAUNCHER_MESSAGES)
        if cpu.is_active():
            logger.info("sglang_shift: PyTorch sees no accelerator, so this server runs on the CPU.")
        if server_args.node_rank == 0:
            observe(server_args, config)
        if config.instances:
            from sglang_shift.engine import serve_from_our_engine

            serve_from_our_engine()
        launch_server(
            server_args,
            run_scheduler_process_func=run_rank or run_scheduler_process,
            init_tokenizer_manager_func=init_tokenizer_manager,
        )


def observe(server_args: ShiftServerArgs, config: ShiftConfig) -> None:
    """Add the status page and the metrics to SGLang's HTTP server.

    With instances, each rank may lead one, and sends events then. Their controller sends events, too.
    """
    from sglang.srt.arg_groups.overrides import resolution_result

    from sglang_shift.observe import routes

    name = resolution_result(server_args, "served_model_name") or server_args.model_path
    labels = {"model_name": name, **(server_args.extra_metric_labels or {})}
    senders = config.world_size + 1 if config.instances else server_args.dp_size
    routes.start(senders, labels if server_args.enable_metrics else None)


def resolve(server_args: ShiftServerArgs) -> None:
    """Resolve the server arguments. Any error becomes one sentence.

    Raises:
        ShiftError: the arguments cannot be resolved; the error has the reason.
    """
    path = server_args.model_path
    if not path:  # a shell variable may be unset
        raise ShiftError("--model-path is empty; give a folder with a config.json, or a hub name")
    if path.startswith(("/", "./", "../", "~")) and not os.path.exists(os.path.expanduser(path)):
        raise ShiftError(f"--model-path {path} does not exist; give a folder with a config.json, or a hub name")
    with one_sentence(f"cannot serve --model-path {path} with these flags"):
        server_args.resolve_once()


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Inside of this context, any error becomes one sentence for the user.

    SGLang and transformers raise many kinds of errors, and the user only needs the reason.

    Raises:
        ShiftError: another error was raised. The sentence has ``what`` and the reason.
    """
    try:
        yield
    except ShiftError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ShiftError(f"{what}: {reason}") from error


def check_port(host: str, port: int, node_rank: int) -> None:
    """Check that the HTTP port is free, on the node that serves it.

    Raises:
        ShiftError: the port is none or in use, or the host is not an address of this machine.
    """
    if node_rank > 0:
        return
    if not 0 <= port <= LAST_PORT:  # getaddrinfo would take 70000 for 4464
        raise ShiftError(f"--port {port} is no port; give a number from 1 to {LAST_PORT}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host or "127.0.0.1", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
        reason = getattr(error, "strerror", None) or error
        raise ShiftError(f"--host {host} has no address: {reason}; give an address of this machine") from error
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        other = "--host, an address of this machine" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise ShiftError(
            f"cannot listen on --host {host} --port {port}: {error.strerror or error}; choose another {other}"
        ) from error


def main(
    argv: list[str],
    prog: str = "python -m sglang_shift.launch_server",
    run_rank: Callable[..., None] | None = None,
) -> None:
    """Parse and check the command line, and serve. At the end, no process is left."""
    try:
        from sglang_shift import seams

        seams.check_version()
        from sglang.srt.plugins import load_plugins
        from sglang.srt.utils import kill_process_tree
        from sglang.srt.utils.common import suppress_noisy_warnings

        from sglang_shift.args.server_args import prepare_server_args
        from sglang_shift.observe.events import remove_endpoint

        suppress_noisy_warnings()
        load_plugins()
        try:
            with one_sentence("these flags cannot be read"):
                server_args = prepare_server_args(argv, prog)
            run_server(server_args, run_rank)
        finally:
            kill_process_tree(os.getpid(), include_parent=False)
            remove_endpoint()
    except ShiftError as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main(sys.argv[1:])
