"""SGLang's hardware platforms, with the extensions of this package."""
