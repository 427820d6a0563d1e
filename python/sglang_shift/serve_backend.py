"""``sglang serve ... --sp-size S``: SGLang's entry point for serve backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.cli.serve_backends import ServeBackend, ServeBackendDetection, ServeRequest

FLAGS = (
    "--sp-size",
    "--sequence-parallel-size",
    "--enable-shift-parallel",
    "--shift-policy",
    "--shift-threshold",
    "--shift-enter-requests",
    "--shift-leave-requests",
    "--shift-enter-tokens",
    "--shift-leave-tokens",
    "--shift-calibration",
    "--shift-exchange",
    "--shift-exchange-dtype",
    "--shift-graph-buckets",
)


def asks_for_us(argv: tuple[str, ...]) -> bool:
    """Whether a command line, or the YAML file its ``--config`` names, has one of our flags."""
    names = [arg.split("=")[0] for arg in argv]
    if any(name in FLAGS for name in names):
        return True
    if "--config" not in names:
        return False
    import yaml

    i = names.index("--config")
    path = argv[i].partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
    try:
        with open(path, encoding="utf-8") as file:
            keys = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError):
        return False  # SGLang's own parser will say what is wrong with the file
    return any("--" + str(key).replace("_", "-") in FLAGS for key in keys)


def detect(request: ServeRequest) -> ServeBackendDetection:
    """Take the requests that carry our flags; leave all others to SGLang."""
    from sglang.cli.serve_backends import ServeBackendDetection

    return ServeBackendDetection.MATCH if asks_for_us(request.argv) else ServeBackendDetection.NO_MATCH


def run(request: ServeRequest) -> None:
    """Serve until stopped."""
    from sglang_shift.launch_server import main

    main(list(request.argv), prog="sglang serve")


def backend() -> ServeBackend:
    """The factory named in the package's entry points."""
    from sglang.cli.serve_backends import SERVE_BACKEND_API_VERSION, ServeBackend

    return ServeBackend(api_version=SERVE_BACKEND_API_VERSION, run=run, detect=detect, requires_model_path=False)
