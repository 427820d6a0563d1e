"""SGLang's hardware platforms, as this package extends them."""
