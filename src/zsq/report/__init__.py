"""One self-contained HTML page about a run, or about a comparison."""

from zsq.report.page import write_report

__all__ = ["write_report"]
