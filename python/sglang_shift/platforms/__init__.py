"""Extends SGLang's hardware platforms."""
