"""Load the plugin for this repository, installed or not."""

pytest_plugins = ["harness.plugin"]
