"""The version, in the one place that the build, the lineage files and `--version` read."""

VERSION = "0.1.0"
