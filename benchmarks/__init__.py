"""Benchmarks. Most files here are scripts of their own; `benchmarks.gpu` is a package with one command."""
