"""Where this package meets SGLang's internals, and the check that SGLang is the one it was written against."""
