"""`python -m benchmarks.gpu --suite kernels|step|offline|adapters`: how near the GPU's limits hf_paged comes."""
