"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from typing import NamedTuple

from .admission import ServerContext


class Metric(NamedTuple):
    """One metric: its name without prefix, Prometheus' type, meaning and value."""

    name: str
    kind: str
    meaning: str
    value: float


def format_metrics(context: ServerContext) -> str:
    """All metrics of a server as text."""
    lines = []
    for metric in collect_metrics(context):
        lines += _format_head(metric.name, metric.kind, metric.meaning)
        lines.append(f"sparsecut_{metric.name} {metric.value}")
    lines += _format_head("responses_total", "counter", "responses by status")
    statuses = sorted(key for key in context.counts if isinstance(key, int))
    for status in statuses:
        lines.append(f'sparsecut_responses_total{{status="{status}"}} {context.counts[status]}')
    return "\n".join(lines) + "\n"


def collect_metrics(context: ServerContext) -> list[Metric]:
    """Every metric but the responses by status."""
    engine = context.engine
    counts = engine.counts
    image_counts = engine.runner.counts
    num_bytes = engine.runner.feature_cache.num_bytes
    tokens = context.counts
    uptime = round(time.time() - context.start_time, 1)
    return [
        Metric(
            "requests_in_flight", "gauge", "requests being read or answered", context.num_in_flight
        ),
        Metric("queue_length", "gauge", "requests that wait", len(engine.waiting)),
        Metric("rows_running", "gauge", "answers being written", engine.num_running),
        Metric(
            "prompt_tokens_total",
            "counter",
            "tokens read, those of images included",
            tokens["prompt_tokens"],
        ),
        Metric("completion_tokens_total", "counter", "tokens written", tokens["completion_tokens"]),
        Metric("batches_total", "counter", "batches generated", counts["batches"]),
        Metric("batch_rows_total", "counter", "answers in all batches", counts["rows"]),
        Metric("pictures_total", "counter", "images in requests", image_counts["images"]),
        Metric(
            "pictures_kept_total",
            "counter",
            "images whose features were cached",
            image_counts["cached_images"],
        ),
        Metric("kept_bytes", "gauge", "bytes of cached features", num_bytes),
        Metric("cancelled_total", "counter", "requests whose client left", counts["cancelled"]),
        Metric(
            "refused_total",
            "counter",
            "requests refused because the queue was full",
            counts["refused"],
        ),
        Metric("failed_total", "counter", "requests at which the model failed", counts["failed"]),
        Metric("uptime_seconds", "gauge", "seconds since the start", uptime),
    ]


def _format_head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP sparsecut_{name} {meaning}", f"# TYPE sparsecut_{name} {kind}"]
