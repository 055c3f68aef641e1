"""The method inside other trainers, imported on demand only: `from mmrpt.integrations import trl`."""
