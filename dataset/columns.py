"""What encoding leaves: token columns in Arrow tables, and what became of the rows they were made of."""

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa


@dataclass
class Report:
    """What became of the rows of one part (training or validation)."""

    read: int = 0
    used: int = 0
    bad: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised: int = 0


@dataclass
class Encoded:
    """One part's token columns, its report, and the key that stands for its contents."""

    columns: pa.Table
    report: Report
    fingerprint: str
    paths: list[str] = field(default_factory=list)  # that the column `file` counts
