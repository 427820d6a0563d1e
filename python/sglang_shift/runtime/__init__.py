"""Holds our subclasses of SGLang's classes, in ranks and in the HTTP server. A file has the name of SGLang's file."""
