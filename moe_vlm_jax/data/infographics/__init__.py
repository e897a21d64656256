"""The embedded set of synthetic infographics."""
