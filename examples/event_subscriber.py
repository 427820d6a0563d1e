"""Print every change of mode. Name an endpoint, start the server with it, and then start this program:

    export SGLANG_SHIFT_EVENTS=tcp://127.0.0.1:5800
    python -m sglang_shift.launch_server --tp-size 2 --enable-shift-parallel --shift-threshold 32
    python examples/event_subscriber.py          # in another terminal, with the same variable; Ctrl-C ends it

A subscriber never slows the server: events that it does not read in time are dropped.
"""

import os

from sglang_shift.events import ENDPOINT_VARIABLE, StepEvent, Subscriber


def main() -> None:
    if not os.environ.get(ENDPOINT_VARIABLE):
        raise SystemExit(f"set {ENDPOINT_VARIABLE} to the endpoint that the server was started with")
    subscriber = Subscriber(replicas=1)
    print("waiting for changes of mode", flush=True)
    try:
        while True:
            event = subscriber.receive()  # None after half a second without an event
            if isinstance(event, StepEvent) and event.switched:
                print(f"step {event.step}: {event.mode.upper()} for {event.tokens} tokens ({event.reason})", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        subscriber.close()


if __name__ == "__main__":
    main()
