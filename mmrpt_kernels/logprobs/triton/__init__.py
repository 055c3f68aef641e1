"""Row kernels in Triton: behind the vendor's matrix product ("triton"), or with one of their own ("triton-fused")."""

from __future__ import annotations

from mmrpt_kernels.logprobs.rows import register_rows
from mmrpt_kernels.logprobs.triton.product import exponentials_of_product
from mmrpt_kernels.logprobs.triton.rows import ROW_KERNELS

register_rows("triton", ROW_KERNELS)
register_rows("triton-fused", ROW_KERNELS._replace(product=exponentials_of_product))
