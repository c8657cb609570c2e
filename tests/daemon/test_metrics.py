"""The exposition: well-formed, complete from the start, and without a series per stream."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from recurd.errors import BREAKING, Code
from recurd.metrics import Collector, ModelLabels, open_registry
from recurd.stats import Stats

MODELS = {"pump": ModelLabels("1", "cpu", "abc"), "valve": ModelLabels("2", "cuda:0", "def")}


@pytest.fixture
def stats() -> Stats:
    stats = Stats()
    for name in MODELS:
        stats.add_model(name, slots=8)
    return stats


@pytest.fixture
def registry(stats: Stats) -> CollectorRegistry:
    return open_registry(Collector(stats, MODELS, device_fallback=True))


def series(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label values -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_every_number_of_stats_is_exposed(stats: Stats, registry: CollectorRegistry) -> None:
    hidden = []
    for owner in (stats, stats.models["pump"]):
        for name, value in vars(owner).items():
            before = own_series(registry)
            if name != "models":
                bump(owner, name, value)
                hidden += [name] if own_series(registry) == before else []

    assert hidden == []


def own_series(registry: CollectorRegistry) -> dict[str, dict[tuple[str, ...], float]]:
    """Without those of the process, which change by themselves."""
    return {name: values for name, values in series(registry).items() if name.startswith("recurd_")}


def bump(owner: object, name: str, value: object) -> None:
    if isinstance(value, int):
        setattr(owner, name, value + 1)
    elif isinstance(value, list):
        value[Code.FAILED if name == "broken" else Code.GAP] += 1
    elif isinstance(value, dict):
        value[next(iter(value))] += 1
    else:
        value.observe(0.25)  # type: ignore[attr-defined]


def test_every_label_is_there_from_the_start_at_zero(registry: CollectorRegistry) -> None:
    found = series(registry)

    assert {key[0] for key in found["recurd_refused_total"]} >= {"gap", "busy", "not_finite", "internal", "draining"}
    assert {key[0] for key in found["recurd_broken_total"]} == {code.word for code in BREAKING}
    assert {key[0] for key in found["recurd_streams_ended_total"]} == {
        "closed",
        "expired",
        "failed",
        "moved",
        "poisoned",
        "reloaded",
        "replaced",
    }
    assert {key[0] for key in found["recurd_send_failures_total"]} == {"again", "unreachable"}
    assert {key[0] for key in found["recurd_chunks_processed_total"]} == {"pump", "valve"}
    totals = [value for name in found for value in found[name].values() if name.endswith("_total")]
    assert sum(totals) == found["process_cpu_seconds_total"][()]


def test_what_is_served_and_on_what_is_told(registry: CollectorRegistry) -> None:
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}

    labels = [sample.labels for sample in families["recurd_model_info"].samples]
    assert {"model": "valve", "version": "2", "device": "cuda:0", "weights": "def"} in labels
    assert {"version", "python"} == families["recurd_build_info"].samples[0].labels.keys()
    assert families["recurd_device_fallback"].samples[0].value == 1
    assert {"process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"} <= families.keys()


def test_histograms_are_cumulative_and_agree_with_their_count(stats: Stats, registry: CollectorRegistry) -> None:
    stats.models["pump"].request_seconds.observe_many(np.array([40e-6, 150e-6, 3.0]))

    found = series(registry)

    buckets = [value for key, value in found["recurd_request_seconds_bucket"].items() if "pump" in key]
    assert buckets[:3] == [1, 1, 2]
    assert buckets[-2:] == [2, 3]
    assert found["recurd_request_seconds_count"]["pump",] == 3
    assert found["recurd_request_seconds_sum"]["pump",] == pytest.approx(3.00019)


def test_slots_add_up(stats: Stats, registry: CollectorRegistry) -> None:
    stats.models["pump"].slots_used = 3

    slots = {key: value for key, value in series(registry)["recurd_stream_slots"].items() if "pump" in key}

    assert sorted(slots.values()) == [3, 5]


def test_a_code_on_an_unexpected_side_is_not_hidden(stats: Stats, registry: CollectorRegistry) -> None:
    stats.broken[Code.STALE] += 1

    assert series(registry)["recurd_broken_total"]["stale",] == 1


def test_openmetrics_can_be_read_too(registry: CollectorRegistry) -> None:
    families = list(parse_openmetrics(generate_openmetrics(registry).decode()))  # type: ignore[no-untyped-call]

    assert "recurd_ticks" in {family.name for family in families}


def test_the_global_registry_stays_untouched(registry: CollectorRegistry) -> None:
    assert b"recurd" in generate_latest(registry)
    assert b"recurd" not in generate_latest(REGISTRY)


def test_promtool_finds_nothing_to_say(registry: CollectorRegistry) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert "CI" not in os.environ, "promtool is missing (Debian: apt-get install prometheus)"
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")

    check = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registry), capture_output=True, check=False
    )

    assert (check.returncode, check.stdout + check.stderr) == (0, b"")
