"""Prometheus' format: cumulative buckets, escaped labels, a help line for every name."""

from moedge.serve.metrics import HELP, Histogram, Metrics


def test_buckets_are_cumulative_and_closed_above() -> None:
    metrics = Metrics(whole=Histogram((1.0, 2.0)))
    for value in (0.5, 1.0, 1.5, 3.0):
        metrics.whole.observe(value)
    text = metrics.text("m", {}, {})
    name = "vllm:e2e_request_latency_seconds"
    found = [
        line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith((f"{name}_bucket", f"{name}_count"))
    ]
    assert found == ["2.0", "3.0", "4.0", "4.0"]
    assert f'{name}_sum{{model_name="m"}} 6.0' in text


def test_labels_are_escaped() -> None:
    assert 'model_name="a\\"b\\\\c\\n"' in Metrics().text('a"b\\c\n', {"moedge:slots": 1}, {})


def test_every_name_is_explained() -> None:
    given = [name for name in HELP if not name.endswith(("_total", "_seconds"))]
    counted = [name.removesuffix("_total") for name in HELP if name.startswith("moedge:") and name.endswith("_total")]
    counted.remove("moedge:requests_refused")
    text = Metrics().text("m", dict.fromkeys(given, 0.0), dict.fromkeys(counted, 0.0))
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} == set(HELP)
