"""Scores, verdicts and subjects over HTTP, for programs: `nearid serve`."""
