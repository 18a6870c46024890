"""Where the repository keeps what the tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FP32 = ROOT / "ds_configs/zero3_fp32.json"
