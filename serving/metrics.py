"""What the server counts, as Prometheus reads it at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one server. Seconds are wall time."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each, which nobody reads
        self.registry = CollectorRegistry()

        def made(kind, name: str, about: str, labels: tuple[str, ...] = (), **more):
            return kind(f"seedling_{name}", about, labels, registry=self.registry, **more)

        self.requests: Counter = made(Counter, "requests", "Requests by path and status.", ("path", "status"))
        self.tokens: Counter = made(
            Counter, "tokens", "Tokens: prompt (cached ones included), cached, generated.", ("model", "kind")
        )
        self.waiting: Gauge = made(Gauge, "waiting_answers", "Answers that wait for a slot.", ("model",))
        self.active: Gauge = made(Gauge, "active_slots", "Slots in use.", ("model",))
        self.first_token: Histogram = made(
            Histogram, "time_to_first_token_seconds", "From a request's arrival on.", ("model",), buckets=SECONDS
        )
        self.step: Histogram = made(
            Histogram, "step_seconds", "One token for every active slot.", ("model",), buckets=STEP_SECONDS
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
