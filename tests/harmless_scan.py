"""A `scan.json` of four classes in which nothing stands out."""

from typing import Any

_MODEL = {
    "log_norms": [4.0, 4.1, 4.2, 4.3],
    "success": [0.9] * 4,
    "unreached": [],
    "statistic": None,
    "p_value": None,
    "method": "not-applicable",
    "flagged": None,
}
SCAN: dict[str, Any] = {
    "schema_version": 1,
    "model_digest": "a" * 64,
    "confounder_digest": "d" * 64,
    "trusted_digest": "c" * 64,
    "seed": 0,
    "num_classes": 4,
    "num_cal": 600,
    "num_test": 600,
    "num_controls": 0,
    "scan_alpha": 0.02,
    "candidate": _MODEL,
    "confounder": _MODEL,
    "transfer": [{"source": "candidate", "target": 0, "k": 250, "n": 450, "null": 0.55}],
    "seconds": 5.0,
}
