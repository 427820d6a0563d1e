"""Provides SGLang's app with our routes, for each worker of ``--tokenizer-worker-num``.

The workers import it through ``SGLANG_HTTP_SERVER_APP_PATH``. Each worker has its own hub for the page. Only the
launcher's process feeds the metrics.
"""

from __future__ import annotations

import os

from sglang.srt.entrypoints.http_server import app

from sglang_shift.observe.hub import Hub
from sglang_shift.observe.routes import REPLICAS_VARIABLE, install

__all__ = ["app"]

hub = Hub(int(os.environ.get(REPLICAS_VARIABLE, "1")))
hub.start()
install(hub, app)
