"""Prometheus metrics of a running server: sums over clients only, no names and no accuracy.

fedprompt_rounds_total{outcome}        rounds that are over: done, aborted
fedprompt_learning_round               learning rounds that are done
fedprompt_learning_rounds_wanted       of the run
fedprompt_clients_in_sum               clients in the last sum
fedprompt_clients_dropped_total        that were in a cohort and not in its sum
fedprompt_bytes_total{direction}       of frames of rounds that are over: up, down
fedprompt_stage_seconds_total{stage}   of rounds that are over
fedprompt_events_total{kind}           what else happened, by kind, such as lost, fault, refused
"""

from __future__ import annotations

from typing import Any

from secure_fedprompt.protocol.errors import ConfigError
from secure_fedprompt.server.store import TROUBLE


class Exporter:
    """Counts a store's events, and serves them over HTTP until it is closed.

    Args:
        address: HOST:PORT to listen on.
        wanted: learning rounds of the run.

    Raises:
        ConfigError: prometheus_client is not installed, or the address is none or in use.
    """

    def __init__(self, address: str, wanted: int) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise ConfigError(
                f"metrics_bind = {address!r} needs: pip install 'secure-fedprompt[metrics]'"
            ) from None
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not int(port) < 1 << 16:
            raise ConfigError(f"metrics_bind = {address!r}: HOST:PORT, such as 127.0.0.1:9570")
        registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus.Counter(f"fedprompt_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Any:
            return prometheus.Gauge(f"fedprompt_{name}", text, registry=registry)

        self._rounds = counter("rounds", "rounds that are over", "outcome")
        self._bytes = counter("bytes", "of frames of rounds that are over", "direction")
        self._seconds = counter("stage_seconds", "of rounds that are over", "stage")
        self._dropped = counter("clients_dropped", "in a cohort and not in its sum")
        self._events = counter("events", "what else happened", "kind")
        self._learning = gauge("learning_round", "learning rounds that are done")
        self._in_sum = gauge("clients_in_sum", "clients in the last sum")
        gauge("learning_rounds_wanted", "learning rounds of the run").set(wanted)
        self._wanted = wanted
        for outcome in ("done", "aborted"):
            self._rounds.labels(outcome)
        for kind in TROUBLE:
            self._events.labels(kind)
        try:
            self._server, self._thread = prometheus.start_http_server(
                int(port), host.strip("[]"), registry
            )
        except OSError as error:
            raise ConfigError(
                f"metrics_bind = {address!r} cannot be listened on: {error.strerror or error}"
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    def on_event(self, kind: str, value: Any) -> None:
        """Take what the store tells."""
        if kind != "round":
            self._events.labels(kind if kind in TROUBLE else "other").inc()
            return
        self._rounds.labels(value["outcome"]).inc()
        for way, by_client in value["bytes"].items():
            self._bytes.labels(way).inc(sum(by_client.values()))
        for stage, seconds in value["seconds"].items():
            self._seconds.labels(stage).inc(seconds)
        self._dropped.inc(len(value["dropped"]))
        if value["outcome"] == "done":
            self._learning.set(min(value["learning_round"], self._wanted))
            self._in_sum.set(len(value["cohort"]) - len(value["dropped"]))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
