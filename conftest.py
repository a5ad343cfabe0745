"""Load the plugin for this repository, installed or not."""

pytest_plugins = ["grpo_harness.plugin"]
