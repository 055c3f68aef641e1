"""Adapters to other libraries, imported on demand only: `from mmrpt_kernels.integrations import transformers`."""
