"""report.html: a training run on one page that needs no network, no server and no library."""

from fastllm.report.page import write_report

__all__ = ["write_report"]
