"""Programs import this module to read the events of a server: :mod:`sglang_shift.observe.events`."""

from __future__ import annotations

from sglang_shift.observe.events import (
    ENDPOINT_VARIABLE,
    SCHEMA,
    Finished,
    InstancesEvent,
    StateEvent,
    StepEvent,
    Subscriber,
)

__all__ = ["ENDPOINT_VARIABLE", "SCHEMA", "Finished", "InstancesEvent", "StateEvent", "StepEvent", "Subscriber"]
