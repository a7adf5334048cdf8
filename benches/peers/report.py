"""What gpu.py prints: percentiles, and the Markdown table with ratios."""

import math

GPU_TIMES = {"gpu_graph_us": "GPU time with copies", "gpu_encoder_us": "GPU time of the encoder (peer: and pooling)"}
PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p999": 999, "max": 1000}  # thousandths


def percentiles(us: list[float]) -> dict[str, float]:
    """Nearest ranks, as trt-embed's."""
    us = sorted(us)
    return {name: us[max(math.ceil(len(us) * part / 1000), 1) - 1] for name, part in PERCENTILES.items()}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def line(name: str, ours: float | None, *peers: float | None) -> str:
    cells = [name, number(ours)]
    for peer in peers:
        cells += [number(peer), f"{ours / peer:.2f}" if ours and peer else ""]
    return f"| {' | '.join(cells)} |"


def table(report: dict) -> str:
    ours = {one["shape"]: one for one in (report["trt_embed"] or {}).get("shapes", [])}
    compiled, eager = report["compiled"]["shapes"], report["eager"]["shapes"]
    lines = [
        "| measurement | trt-embed | torch.compile + CUDA graph | ours / it | transformers eager | ours / it |",
        "|---|---|---|---|---|---|",
    ]

    def value(found: dict, shape: str, *path: str) -> float | None:
        found = found.get(shape)
        for key in path:
            found = found.get(key) if found else None
        return found

    for shape in dict.fromkeys([*ours, *compiled, *eager]):
        for key in PERCENTILES:
            values = [value(found, shape, "ids_to_vector_us", key) for found in (ours, compiled, eager)]
            lines.append(line(f"{shape} ids to vector, {key.replace('p999', 'p99.9')}, us", *values))
        for key, what in GPU_TIMES.items():
            values = [value(found, shape, key) for found in (ours, compiled)]
            if any(values):
                lines.append(line(f"{shape} {what}, us", *values, None))
    mixed, peer = (report["trt_embed"] or {}).get("mixed"), report["compiled"]["mixed"]
    if mixed or peer:
        one = mixed or peer
        for key, what in (("texts", "sentences/s"), ("tokens", "real tokens/s")):
            rates = mixed and mixed[key] / mixed["ids_total_s"], peer and peer[key] / peer["ids_total_s"]
            name = f"{one['texts']} mixed texts ({one['tokens']} tokens) from ids, {what} (more is better)"
            lines.append(line(name, *rates, None))
    return "\n".join(lines)
