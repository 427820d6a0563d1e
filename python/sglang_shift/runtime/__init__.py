"""What runs in each rank and in the HTTP server: our subclasses of SGLang's classes, in files named as SGLang's."""
