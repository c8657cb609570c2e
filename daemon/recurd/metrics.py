"""The daemon's numbers as Prometheus reads them.

A collector on a registry of its own (never the global one) that reads :class:`recurd.stats.Stats` when somebody
scrapes. Names start with ``recurd_``, units are base units, every series is there from the start, and no label grows
with the number of streams.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector as PrometheusCollector
from prometheus_client.utils import floatToGoString

from recurd import __version__
from recurd.errors import BREAKING, Code
from recurd.stats import Histogram, Stats

#: Name without ``recurd_`` (and ``_total``), help, attribute of Stats or ModelStats.
Row = tuple[str, str, str]

MODEL_COUNTERS: tuple[Row, ...] = (
    (
        "chunks_received",
        "Chunks that came in their turn, also those then refused.",
        "chunks_received",
    ),
    ("chunks_processed", "Chunks that were run and answered.", "chunks_processed"),
    ("steps_processed", "Time steps that were run, without padding.", "steps_processed"),
    ("steps_padded", "Time steps that were run only to square up ragged rows.", "padded_steps"),
    ("resets", "Resets that were carried out.", "resets"),
    ("streams_paged_out", "Streams whose slot was given to others; their states wait elsewhere.", "paged_out"),
    ("streams_paged_in", "Streams whose state came back onto the device for a tick.", "paged_in"),
    ("ticks", "Runs of the model.", "ticks"),
    ("ticks_failed", "Runs of the model that raised.", "ticks_failed"),
    ("results_not_finite", "Results with NaN or infinity; nobody was given them.", "results_not_finite"),
)
MODEL_HISTOGRAMS: tuple[Row, ...] = (
    ("tick_rows", "Streams in one run of the model.", "rows"),
    ("queue_seconds", "From a chunk's arrival to the start of its first tick.", "queue_seconds"),
    ("page_in_seconds", "Bringing back the states that one tick needs.", "page_in_seconds"),
    ("run_seconds", "One run of the model.", "run_seconds"),
    ("request_seconds", "From a chunk's arrival to its result.", "request_seconds"),
)
COUNTERS: tuple[Row, ...] = (
    (
        "journal_failures",
        "Commits to the journal that could not be written; nothing is accepted meanwhile.",
        "journal_failures",
    ),
    ("internal_errors", "Bugs met while serving; each has a traceback in the log.", "internal_errors"),
    ("duplicates", "Records that had been accepted before and were answered again.", "duplicates"),
    ("streams_opened", "Streams started new.", "streams_opened"),
    ("peers_expired", "Connections forgotten because they were silent.", "peers_expired"),
    ("auth_failures", "Connections refused because their key is not known.", "auth_failures"),
    (
        "subscriptions_refused",
        "Subscriptions to published results that the subscriber may not have.",
        "subscriptions_refused",
    ),
    ("results_published", "Results published while there were subscribers to anything.", "results_published"),
    ("frames_received", "Messages received.", "frames_received"),
    ("received_bytes", "Bytes of the messages received.", "bytes_received"),
    ("frames_sent", "Messages sent.", "frames_sent"),
    ("sent_bytes", "Bytes of the messages sent.", "bytes_sent"),
)


class ModelLabels(NamedTuple):
    """What ``recurd_model_info`` tells of a model."""

    version: str
    device: str
    weights: str


class Collector(PrometheusCollector):
    """Reads ``stats`` at every scrape; owns nothing. ``models`` has a model's labels once it is loaded."""

    def __init__(self, stats: Stats, models: Mapping[str, ModelLabels], *, device_fallback: bool) -> None:
        self._stats = stats
        self._models = models
        self._device_fallback = device_fallback

    def collect(self) -> Iterable[Metric]:
        """All metrics, as they stand now."""
        yield from self._collect_info()
        yield from self._collect_models()
        yield from self._collect_labelled()
        for name, text, attribute in COUNTERS:
            yield CounterMetricFamily(f"recurd_{name}", text, value=getattr(self._stats, attribute))

    def _collect_info(self) -> Iterator[Metric]:
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("recurd_build", "The daemon.", value=build)
        info = InfoMetricFamily("recurd_model", "A model that is served.", labels=["model"])
        for name, labels in list(self._models.items()):
            info.add_metric([name], labels._asdict())
        yield info
        text = "1 when a GPU was wished for, could not be had, and the CPU is used."
        yield GaugeMetricFamily("recurd_device_fallback", text, value=float(self._device_fallback))

    def _collect_models(self) -> Iterator[Metric]:
        models = list(self._stats.models.items())
        for name, text, attribute in MODEL_COUNTERS:
            counter = CounterMetricFamily(f"recurd_{name}", text, labels=["model"])
            for model, stats in models:
                counter.add_metric([model], getattr(stats, attribute))
            yield counter
        for name, text, attribute in MODEL_HISTOGRAMS:
            histograms = {model: getattr(stats, attribute) for model, stats in models}
            yield _histogram(f"recurd_{name}", text, histograms)
        operations = CounterMetricFamily(
            "recurd_state_operations", "What clients did with whole states.", labels=["model", "operation"]
        )
        for model, stats in models:
            for operation, count in stats.state_operations.items():
                operations.add_metric([model, operation], count)
        yield operations
        queued = GaugeMetricFamily("recurd_queued_chunks", "Chunks that wait for their run.", labels=["model"])
        slots = GaugeMetricFamily(
            "recurd_stream_slots",
            "Slots: streams whose state the device holds or could hold.",
            labels=["model", "kind"],
        )
        for model, stats in models:
            queued.add_metric([model], stats.queued_chunks)
            slots.add_metric([model, "used"], stats.slots_used)
            slots.add_metric([model, "free"], stats.slots - stats.slots_used)
        yield from (queued, slots)

    def _collect_labelled(self) -> Iterator[Metric]:
        stats = self._stats
        # a code on the side where it is not expected is shown once it was counted there
        refused = {code.word: stats.refused[code] for code in Code if code not in BREAKING or stats.refused[code]}
        broken = {code.word: stats.broken[code] for code in Code if code in BREAKING or stats.broken[code]}
        yield _counter("recurd_refused", "Requests that were refused; the stream lives.", "code", refused)
        yield _counter("recurd_broken", "Answers that said a stream's state is lost.", "code", broken)
        yield _counter("recurd_streams_ended", "Streams whose state was dropped.", "reason", stats.streams_ended)
        text = "Model files looked at by a reload, by what became of them."
        yield _counter("recurd_reloads", text, "outcome", stats.reloads)
        text = "Messages that could not be sent: the connection's queue was full (again) or gone (unreachable)."
        yield _counter("recurd_send_failures", text, "reason", stats.send_failures)
        yield _gauge("recurd_streams", "Known streams, with a connection or without.", "state", stats.streams)
        states = {"device": stats.state_bytes, "host": sum(model.host_bytes for model in list(stats.models.values()))}
        yield _gauge("recurd_state_bytes", "Memory for the streams' states.", "where", states)
        yield GaugeMetricFamily("recurd_peers", "Connections that said HELLO.", value=stats.peers)
        text = "Drains to this daemon that were cut off or go on; no stream begins meanwhile that is not known."
        yield GaugeMetricFamily("recurd_drains_unfinished", text, value=stats.drains_unfinished)
        text = "One commit to the journal, of all that a round of the loop changed."
        commits = stats.commit_seconds
        yield HistogramMetricFamily("recurd_commit_seconds", text, _buckets(commits), commits.sum)


def open_registry(collector: Collector) -> CollectorRegistry:
    """A registry with the daemon's numbers and the process's (CPU, memory, open files, start time)."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _histogram(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model"])
    for model, histogram in histograms.items():
        family.add_metric([model], _buckets(histogram), histogram.sum)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, int]]:
    edges = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return list(zip(edges, histogram.cumulative(), strict=True))
